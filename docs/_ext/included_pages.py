"""Documents that lie elsewhere in the repository, and the notebooks with the outputs that are stored in them."""

from __future__ import annotations

from pathlib import Path

from writing import Folder

#: Page of the site -> the document that it is.
DOCUMENTS = {
    "benchmarks": "benchmarks/README.md",
    "security": "SECURITY.md",
    "changelog": "CHANGELOG.md",
    "contributing": "CONTRIBUTING.md",
    "tests": "tests/README.md",
}


def write(root: Path, folder: Folder) -> None:
    """Copy documents and notebooks, and write the index of the latter."""
    for page, path in DOCUMENTS.items():
        text = (root / path).read_text(encoding="utf-8")
        for other, source in DOCUMENTS.items():  # a document that names another one leads to its page
            text = text.replace(f"]({source})", f"]({other}.md)")
        folder.write(f"{page}.md", text)
    notebooks = sorted((root / "notebooks").glob("*.ipynb"))
    for path in notebooks:
        folder.write(f"notebooks/{path.name}", path.read_bytes())
    listed = "\n".join(path.stem for path in notebooks)
    folder.write(
        "notebooks/index.md",
        "# Notebooks\n\nWorked examples; outputs and figures are those that `make notebooks` stored when it executed "
        f"them.\n\n```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n",
    )
