"""One judge for every case: what a hostile input may do, and what must be said of it."""

from __future__ import annotations

import hashlib
import unicodedata
from pathlib import Path
from typing import NamedTuple

#: Lines and characters on standard error at most.
LINES, CHARACTERS = 3, 400


class Outcome(NamedTuple):
    """What became of one command."""

    code: int
    out: str
    err: str
    changed: list[str]  #: files of the room that are not what they were before
    executed: list[str]  #: what a payload left, or tried
    seconds: float


def judged(outcome: Outcome, said: str) -> list[str]:
    """Return everything that is wrong with an outcome; nothing where the input was refused as it should be."""
    err, wrong = outcome.err, []
    if outcome.code != 2:
        wrong.append(f"ended with {outcome.code}, expected 2")
    if err.count("\n") > LINES or len(err) > CHARACTERS:
        wrong.append(f"said {err.count(chr(10))} lines, {len(err)} characters")
    if "Traceback" in err or "Error(" in err:
        wrong.append("a traceback")
    if not err.startswith("funcprobe: ") or outcome.out:
        wrong.append(
            f"expected one line of funcprobe's on standard error alone; on standard output {outcome.out!r:.80}"
        )
    if said not in err:
        wrong.append(f"does not say {said!r}")
    if hidden := {f"U+{ord(c):04X}" for c in err if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs")}:
        wrong.append(f"lets {', '.join(sorted(hidden))} through")
    if outcome.changed:
        wrong.append(f"changed {outcome.changed}")
    if outcome.executed:
        wrong.append(f"executed {outcome.executed}")
    return wrong


def contents(folder: Path) -> dict[str, str]:
    """Return a digest of everything in a folder, by path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder)).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.stat().st_size < 2**26 else "large"
        else:
            found[name] = "a folder, or no ordinary file"
    return found
