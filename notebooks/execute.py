"""Execute every notebook of this folder from top to bottom, and store what it printed and drew in place.

`make notebooks` runs this; a cell that raises ends it with the cell's own error. `--check` executes and writes nothing.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def execute(path: Path, *, write: bool) -> None:
    """Run one notebook in its own kernel, in this folder."""
    start = time.perf_counter()
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # timestamps would change the file every time
    notebook.metadata.pop("language_info", None)
    if write:
        nbformat.write(notebook, path)
    print(f"{path.name}: {time.perf_counter() - start:.1f} s")


def main() -> None:
    """Execute the notebooks, in the order of their names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="execute, and leave the files as they are")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # the models are tiny: beside anything else that runs, two threads mostly wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # progress widgets would not survive in the file
    for path in sorted(HERE.glob("*.ipynb")):
        execute(path, write=not arguments.check)


if __name__ == "__main__":
    main()
