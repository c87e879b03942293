"""The graph of imports between layers, drawn from the code; an arrow that others imply is left out."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

from api_pages import layers
from writing import Folder

import funcprobe

#: Geometry of the drawing, in pixels.
ROW, BOX, LEFT, TOP = 40, 118, 16, 16


def imports(root: Path) -> Counter[tuple[str, str]]:
    """Return (layer, layer that it imports from) -> number of import statements, of the layers in the table alone."""
    order, found = set(layers()), Counter[tuple[str, str]]()
    for path in root.rglob("*.py"):
        own = path.relative_to(root).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "funcprobe":
                parts = (node.module or "").split(".")
                named = parts[1:2] or [alias.name for alias in node.names]
                found.update((own, other) for other in named if other in order and other != own and own in order)
    return found


def direct(edges: Counter[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the imports that no chain of others implies (the transitive reduction)."""
    below: dict[str, set[str]] = {}
    for layer in layers():
        near = {b for a, b in edges if a == layer}
        below[layer] = near.union(*(below[b] for b in near))
    return [(a, b) for a, b in edges if not any((a, c) in edges and b in below[c] for c in layers())]


def drawn(edges: list[tuple[str, str]]) -> str:
    """Return an SVG: layers down a column, an arc from each to every layer that it is built on."""
    at = {layer: TOP + ROW * i for i, layer in enumerate(layers())}
    reach = max(at[a] - at[b] for a, b in edges)
    width, height = LEFT + BOX + 40 + int(reach * 0.4), TOP * 2 + ROW * len(at)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="13" role="img">',
        "<title>Layers of the package, and what each is built on</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#7a8699"/></marker></defs>',
    ]
    for a, b in sorted(edges):
        start, end, bow = at[a] + 10, at[b] + 18, 14 + (at[a] - at[b]) * 0.45
        x = LEFT + BOX
        lines.append(
            f'<path d="M{x} {start} C{x + bow} {start} {x + bow} {end} {x + 3} {end}" fill="none" stroke="#7a8699" '
            f'stroke-width="1.4" marker-end="url(#tip)"><title>{a} imports {b}</title></path>'
        )
    for layer, y in at.items():
        lines.append(
            f'<rect x="{LEFT}" y="{y}" width="{BOX}" height="28" rx="5" fill="#eef2f8" stroke="#1b2a49"/>'
            f'<text x="{LEFT + BOX / 2}" y="{y + 18.5}" text-anchor="middle" fill="#1b2a49">{layer}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


def table(edges: Counter[tuple[str, str]]) -> str:
    """Return the whole graph as a table in Markdown: a row a layer, a column a layer that it imports from."""
    order = list(layers())
    rows = [["", *(f"{i + 1}" for i in range(len(order)))], ["---", *(["--:"] * len(order))]]
    rows += [[f"{i + 1} {a}", *(str(edges[a, b] or "") for b in order)] for i, a in enumerate(order)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def contents() -> str:
    """Return the layers and their contents as a table in Markdown."""
    rows = "\n".join(f"| `{layer}` | {text} |" for layer, text in layers().items())
    return f"| layer | contents |\n|---|---|\n{rows}\n"


def write(root: Path, folder: Folder) -> None:
    """Write the drawing and both tables, having seen that every arrow points up."""
    edges = imports(Path(funcprobe.__file__).parent)
    order = list(layers())
    if wrong := [(a, b) for a, b in edges if order.index(b) > order.index(a)]:
        raise RuntimeError(f"imports against the order of the layers: {wrong}")
    folder.write("layers.svg", drawn(direct(edges)))
    folder.write("layers-table.md", table(edges))
    folder.write("layers-contents.md", contents())
