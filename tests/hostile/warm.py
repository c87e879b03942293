"""One warm process that forks for every case: torch is imported once, with one thread, and not once a case.

It reads the name of a case a line and answers with what became of it, as a line of JSON. By hand, every case whose name
holds a word, and what is wrong with it:

    python -m tests.hostile.warm WORD
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Seconds that a case may take, and memory that it may ask for beyond what the warm process has.
PATIENCE, MEMORY = 20.0, 6 * 2**30


#: Commands that are run once, in a child, to learn what they import.
REHEARSED = (
    ["run", "config.yaml"],
    ["attribute", "config.yaml"],
    ["sweep", "config.yaml", "--lrs", "1e-6"],
    ["sample", "checkpoint", "prompts.txt", "--temperature", "1", "--output", "drawn.parquet", "--max-new-tokens", "2"],
)


class Warm:
    """The template of every room, and the way into one."""

    def __init__(self, place: Path) -> None:
        import torch

        from funcprobe.cli.main import main
        from tests.hostile.room import build, copied

        torch.set_num_threads(1)
        self.place, self.template, self.count = place, place / "template", 0
        self.template.mkdir()

        def rehearse() -> None:
            """Build the template, run every kind of command once, and write down what that imports."""
            build(self.template)
            os.chdir(copied(self.template, place / "rehearsal", place / "none").folder)
            for words in REHEARSED:
                assert main(words) == 0, words
            (place / "imported").write_text("\n".join(sys.modules))

        ended = _forked(rehearse, place / "built", 120.0)
        assert ended == 0, (place / "built.err").read_text()
        for name in (place / "imported").read_text().splitlines():
            with contextlib.suppress(Exception):
                importlib.import_module(name)

    def outcome(self, case: Any) -> Any:
        """Return what became of a case."""
        from tests.hostile.judge import Outcome, contents
        from tests.hostile.room import CANARY, copied

        self.count += 1
        inside = self.place / f"{self.count}"
        inside.mkdir()
        room = copied(self.template, inside / "room", inside / CANARY)
        os.environ["HOME"] = str(inside)
        words: list[object] = ["run", "config.yaml"]

        def prepare() -> None:
            os.chdir(room.folder)
            made = case.make(room)
            (inside / "words").write_text(json.dumps([str(w) for w in (words if made is None else made)]))

        assert _forked(prepare, inside / "made") == 0, f"{case.name}: {(inside / 'made.err').read_text()}"
        before, began = contents(room.folder), time.monotonic()
        code = _forked(lambda: _run(case, room, json.loads((inside / "words").read_text())), inside / "ran")
        after, seconds = contents(room.folder), time.monotonic() - began
        changed = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
        out, err = ((inside / f"ran.{s}").read_bytes().decode("utf-8", "replace") for s in ("out", "err"))
        executed = [p.name for p in inside.glob(f"{CANARY}*")]
        shutil.rmtree(inside, ignore_errors=True)
        return Outcome(code, out, err, changed, executed, round(seconds, 2))


def _run(case: Any, room: Any, words: list[str]) -> int:
    """Run a case as the command would, where nothing can be reached and memory is bounded."""
    import socket

    from funcprobe.cli.main import main
    from funcprobe.errors import FuncprobeError
    from funcprobe.visible_text import calm

    def unreachable(*_: object, **__: object) -> None:
        Path(f"{room.canary}-network").touch()
        raise OSError("the network is not there")

    socket.socket.connect = unreachable  # type: ignore[assignment,method-assign]
    socket.getaddrinfo = unreachable  # type: ignore[assignment]
    os.chdir(room.folder)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    if case.call is None:
        return main(words)
    try:
        case.call(room)
    except FuncprobeError as error:
        print(f"funcprobe: {calm(str(error))}", file=sys.stderr)
        return 2
    return 0


def _forked(do: Callable[[], int | None], name: Path, patience: float = PATIENCE) -> int:
    """Do something in a child whose output goes to files, and return its exit code; 124 if it takes too long."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = _in_child(do, name)
        finally:
            os._exit(code)
    ends = time.monotonic() + patience
    while time.monotonic() < ends:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 124


def _in_child(do: Callable[[], int | None], name: Path) -> int:
    import traceback

    for number, stream in ((0, None), (1, "out"), (2, "err")):
        path = os.devnull if stream is None else f"{name}.{stream}"
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    try:
        code = do() or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _serve(warm: Warm) -> None:
    from tests.hostile.catalogue import CASES

    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(warm.outcome(CASES[line.rstrip("\n")])), flush=True)


def _by_hand(warm: Warm, word: str) -> None:
    from tests.hostile.catalogue import CASES
    from tests.hostile.judge import judged

    wrong = 0
    for case in (case for name, case in CASES.items() if word in name):
        outcome = warm.outcome(case)
        problems = judged(outcome, case.said)
        wrong += bool(problems)
        mark = "wrong" if problems else "calm "
        if problems or "-v" in sys.argv:
            told = f"    {'; '.join(problems)}\n    {outcome.err[-300:].rstrip()}"
            print(f"{mark} {case.name} ({outcome.seconds} s)\n{told}", flush=True)
    print(f"{wrong} wrong of {sum(word in name for name in CASES)}; of all {len(CASES)}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        if sys.argv[1:]:
            _by_hand(Warm(Path(folder)), sys.argv[1])
        else:
            _serve(Warm(Path(folder)))
