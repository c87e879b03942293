"""The API reference: public names of the stub, a page a layer, and modules that stand for themselves."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections import defaultdict
from pathlib import Path

from writing import Folder

import funcprobe

#: Modules whose names are used through them, beside those that the stub names: dotted name -> title.
BESIDE = {
    "funcprobe.types": "Contracts (types)",
    "funcprobe.measurement.options": "Options of a measurement",
    "funcprobe.estimators.importance": "Importance weights",
    "funcprobe.report.figures": "Figures",
    "funcprobe.integrations.trl": "TRL",
    "funcprobe.integrations.trackers": "Experiment trackers",
    "funcprobe.compat": "The stateful system's names",
}


def layers() -> dict[str, str]:
    """Return layer -> contents, from the table in the package docstring."""
    table = (funcprobe.__doc__ or "").split("layer         contents\n")[1]
    return dict(line.split(None, 1) for line in table.splitlines() if line.strip())


def public() -> dict[str, list[str]]:
    """Return module -> public names of it, in the order of the stub; a module that is itself a name has none."""
    stub = Path(funcprobe.__file__).with_name("__init__.pyi").read_text(encoding="utf-8")
    found: dict[str, list[str]] = defaultdict(list)
    for node in ast.parse(stub).body:
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                found[f"{node.module}.{alias.name}" if node.module == "funcprobe" else node.module].extend(
                    [] if node.module == "funcprobe" else [alias.name]
                )
    return found


def write(root: Path, folder: Folder) -> None:
    """Write one page a layer that has public names, one a module that stands for itself, and their index."""
    names, pages = public(), []
    for layer, contents in layers().items():
        modules = [m for m in names if m.split(".")[1] == layer and names[m]]
        if modules:
            folder.write(f"api/{layer}.md", _layer_page(layer, contents, {m: names[m] for m in modules}))
            pages.append(layer)
    whole = {m: f"fp.{m.removeprefix('funcprobe.')} (module)" for m in names if not names[m]} | _there(BESIDE)
    for module, title in whole.items():
        short = module.removeprefix("funcprobe.")
        folder.write(f"api/{short}-module.md", _module_page(module, title))
        pages.append(f"{short}-module")
    folder.write("api/index.md", _index(pages))


def _there(modules: dict[str, str]) -> dict[str, str]:
    """Return the modules that this version of the package has."""
    root = Path(funcprobe.__file__).parent
    paths = {m: root.joinpath(*m.split(".")[1:]) for m in modules}
    return {m: modules[m] for m, path in paths.items() if path.is_dir() or path.with_suffix(".py").exists()}


def _layer_page(layer: str, contents: str, modules: dict[str, list[str]]) -> str:
    lines = [f"# {layer}", "", f"{contents[0].upper()}{contents[1:]}.", "", "```{eval-rst}"]
    for module, own in modules.items():
        for name in own:
            lines += _entry(f"{module}.{name}", f"fp.{name}")
    return "\n".join([*lines, "```", ""])


def _module_page(module: str, title: str) -> str:
    loaded = importlib.import_module(module)
    names = getattr(loaded, "__all__", None) or [
        name for name, thing in vars(loaded).items() if not name.startswith("_") and _is_of(thing, module)
    ]
    lines = [f"# {title}", "", "```{eval-rst}", f".. automodule:: {module}", "   :no-members:", ""]
    for name in names:
        lines += _entry(f"{module}.{name}", name)
    return "\n".join([*lines, "```", ""])


def _is_of(thing: object, module: str) -> bool:
    return (inspect.isclass(thing) or inspect.isfunction(thing)) and getattr(thing, "__module__", "") == module


def _entry(dotted: str, shown: str) -> list[str]:
    module, _, name = dotted.rpartition(".")
    thing = getattr(importlib.import_module(module), name)
    if inspect.isclass(thing):
        kind = "autoexception" if issubclass(thing, BaseException) else "autoclass"
        more = [] if kind == "autoexception" else ["   :members:"]
        return [f".. {kind}:: {dotted}", *more, ""]
    return [f".. autofunction:: {dotted}", ""] if callable(thing) else []


def _index(pages: list[str]) -> str:
    listed = "\n".join(pages)
    return f"""# API reference

Every public name, from its docstring. `import funcprobe as fp` has all that stand under a layer; a page called after a
module is used through it.

```{{toctree}}
:maxdepth: 1

{listed}
```
"""
