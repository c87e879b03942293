"""Kills at random moments, two runs at once, long and many rows, the same bits again: what must hold, and figures.

    python -m tests.soak [--kills 100] [--rows 20000] [--tokens 8192]

Every check prints one line; the first that fails ends it with a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.hostile.judge import contents
from tests.hostile.room import Room, copied
from tests.hostile.warm import Warm

#: Commands that are killed, with the folder that each leaves.
KILLED = {
    "results": ["run", "config.yaml"],
    "results-sweep": ["sweep", "config.yaml", "--lrs", "1e-6:1e-3:4"],
    "results-attribution": ["attribute", "config.yaml"],
}

#: Relative difference of a change between thread counts: float32 sums in another order, over terms that cancel.
THREADS = 1e-4


@contextlib.contextmanager
def child(do: Callable[[], int | None], said: Path) -> Iterator[int]:
    """Fork a child that does something, its output in a file; yield its number and reap it."""
    number = os.fork()
    if number == 0:
        code = 70
        try:
            for stream in (1, 2):
                os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            code = do() or 0
            sys.stdout.flush()
        finally:
            os._exit(code)
    yield number


def ended(number: int) -> int:
    """Return the exit code of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def command(room: Room, words: list[str], *, threads: int = 1, peak: Path | None = None) -> Callable[[], int]:
    """Return a function that runs a command in a room, and notes its peak of memory."""

    def run() -> int:
        import torch

        from funcprobe.cli.main import main

        os.chdir(room.folder)
        torch.set_num_threads(threads)
        code = main(words)
        if peak is not None:
            peak.write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
        return code

    return run


def whole(room: Room, words: list[str], **options: object) -> None:
    """Run a command to its end."""
    said = room.folder.parent / "said"
    with child(command(room, words, **options), said) as number:  # type: ignore[arg-type]
        assert ended(number) == 0, said.read_text()[-600:]


def kills(warm: Warm, count: int, place: Path) -> str:
    """Kill commands at random moments: results stay whole, inputs untouched, remains gone after the next run."""
    import funcprobe
    from funcprobe.data.ownership import MARKER

    draw, seen = random.Random(0), {"killed": 0, "late": 0, "kept": 0}
    rooms = {name: copied(warm.template, place / name / "room", place / name / "none") for name in KILLED}
    inputs = contents(warm.template)
    lasts = {}
    for name, words in KILLED.items():
        began = time.monotonic()
        whole(rooms[name], [*words, "--force"])
        lasts[name] = time.monotonic() - began
    for turn in range(count):
        name = list(KILLED)[turn % len(KILLED)]
        room, number = rooms[name], draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        output = room.folder / name
        with child(command(room, [*KILLED[name], "--force"]), place / name / "said") as process:
            time.sleep(draw.uniform(0, lasts[name]))
            os.kill(process, number)
            code = ended(process)
        seen["late" if code == 0 else "killed"] += 1
        assert code in (0, -number, 128 + number), (code, number)
        assert (output / MARKER).is_file(), "the results of before are lost"
        funcprobe.load(output)
        seen["kept"] += 1
        found = contents(room.folder)
        assert all(found[path] == digest for path, digest in inputs.items()), "an input has changed"
    for name, room in rooms.items():
        whole(room, [*KILLED[name], "--force"])
        left = [p.name for p in room.folder.iterdir() if p.name.startswith(".") or "unfinished" in p.name]
        assert not left, left
    told = f"{count} kills: {seen['killed']} hit, {seen['late']} came late"
    return f"{told}; results whole {seen['kept']} times; nothing left"


def two_at_once(warm: Warm, place: Path) -> str:
    """Run two commands into one output: one has it, the other says where its own results are."""
    room = copied(warm.template, place / "room", place / "none")
    said = [place / f"said-{k}" for k in (1, 2)]
    with (
        child(command(room, KILLED["results"]), said[0]) as one,
        child(command(room, KILLED["results"]), said[1]) as two,
    ):
        codes = sorted((ended(one), ended(two)))
    texts = [path.read_text() for path in said]
    assert codes == [0, 2], (codes, texts)
    late = any("results-2" in text for text in texts)
    assert late == (room.folder / "results-2" / "result.json").is_file()
    return (
        f"two runs at once: {'both kept, the second in results-2' if late else 'the second was refused at its start'}"
    )


def many_rows(warm: Warm, place: Path, rows: int) -> str:
    """Run on few and on many rows: memory grows by the rollouts themselves and no more."""
    peaks = {}
    for count in (rows // 4, rows):
        room = copied(warm.template, place / str(count) / "room", place / "none")
        kinds = ([3, 4, 12], [3, 5, 12], [7, 12], [4, 4, 4])
        room.rows(*({"completion_ids": kinds[k % 4], "reward": float(k % 2), "group_id": k // 4} for k in range(count)))
        whole(room, ["run", "config.yaml"], peak=place / "peak")
        peaks[count] = int((place / "peak").read_text()) / 1024
    (few, low), (many, high) = peaks.items()
    each = (high - low) * 1024 / (many - few)
    assert each < 64, f"{each:.1f} KiB a row"
    return f"{many:,} rows: peak {high:.0f} MiB, {low:.0f} MiB with {few:,}; {each:.2f} KiB a row"


def long_row(warm: Warm, place: Path, tokens: int) -> str:
    """Run on one long completion."""
    room = copied(warm.template, place / "room", place / "none")
    room.edit("checkpoint/config.json", n_positions=tokens + 8)

    def longer(tensors: dict[str, object]) -> None:
        import torch

        width = tensors["transformer.wpe.weight"].shape[1]  # type: ignore[attr-defined]
        tensors["transformer.wpe.weight"] = torch.randn(tokens + 8, width, generator=torch.Generator().manual_seed(0))

    room.weights(longer)
    room.rows({"completion_ids": [3, 4, 5, 6] * (tokens // 4)}, {})
    began = time.monotonic()
    whole(room, ["run", "config.yaml", "--optimizer", "fresh", "--lr", "1e-6"], peak=place / "peak")
    peak = int((place / "peak").read_text()) / 1024
    return f"one completion of {tokens:,} tokens: {time.monotonic() - began:.1f} s, peak {peak:.0f} MiB"


def same_bits(warm: Warm, place: Path) -> str:
    """Run thrice: the same bits with one thread, the same numbers to rounding with two."""
    found = []
    for k, threads in enumerate((1, 1, 2)):
        room = copied(warm.template, place / str(k) / "room", place / "none")
        whole(room, ["run", "config.yaml"], threads=threads)
        plain = json.loads((room.folder / "results" / "result.json").read_text())
        found.append(json.dumps(plain["outcome"], sort_keys=True))
        change = _change(plain["outcome"])
        if k == 0:
            first = change
    assert found[0] == found[1], "two runs with one thread differ"
    apart = abs(change / first - 1)
    assert apart < THREADS, apart
    return f"the same bits again with one thread; with two ΔF differs by {apart:.1e} of itself (bound {THREADS:g})"


def _change(outcome: object) -> float:
    """Return the first number called `change` in an outcome."""
    if isinstance(outcome, dict):
        if isinstance(outcome.get("change"), float):
            return float(outcome["change"])
        outcome = list(outcome.values())
    if isinstance(outcome, list):
        for value in outcome:
            with contextlib.suppress(LookupError):
                return _change(value)
    raise LookupError("no change")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--tokens", type=int, default=8192)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        place = Path(folder)
        warm = Warm(place)
        for name, check in {
            "kills": lambda p: kills(warm, given.kills, p),
            "two": lambda p: two_at_once(warm, p),
            "rows": lambda p: many_rows(warm, p, given.rows),
            "long": lambda p: long_row(warm, p, given.tokens),
            "bits": lambda p: same_bits(warm, p),
        }.items():
            (place / name).mkdir()
            print(check(place / name), flush=True)


if __name__ == "__main__":
    main()
