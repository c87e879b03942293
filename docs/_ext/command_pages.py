"""The pages of the command line: what each command prints when it is asked for help."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

from writing import Folder

from funcprobe.cli.main import COMMANDS, main

#: Columns of the help texts on the site.
COLUMNS = "86"


def write(root: Path, folder: Folder) -> None:
    """Write a page a command, and their index."""
    with _columns(COLUMNS):
        for name, registered in COMMANDS.items():
            folder.write(f"cli/{name}.md", f"# funcprobe {name}\n\nTo {registered.help}.\n\n{_block([name, '--help'])}")
        listed = "\n".join(COMMANDS)
        folder.write(
            "cli/index.md",
            f"# The command line\n\n{_block(['--help'])}\n```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n",
        )


def _block(words: list[str]) -> str:
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard), contextlib.suppress(SystemExit):
        main(words)
    if not heard.getvalue().strip():
        raise RuntimeError(f"funcprobe {' '.join(words)} printed nothing")
    return f"```text\n{heard.getvalue().rstrip()}\n```\n"


@contextlib.contextmanager
def _columns(width: str) -> Iterator[None]:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = width
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before
