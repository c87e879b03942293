"""The options of a measurement: stated once, typed once more for keywords, read by verbs, keys and help."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import funcprobe as fp
from funcprobe.cli.config import Config, describe_keys
from funcprobe.errors import InputError
from funcprobe.measurement.options import Given, Options, options_of

ROOT = Path(fp.__file__).parent
FIELDS = {f.name: f for f in dataclasses.fields(Options)}

#: Rooms below the measurement have parameters of these names for things of their own, such as how U is cut.
ABOVE = ("measurement", "attribution", "results", "analysis", "report", "cli", "compat", "checkpoints")


def defaults(source: str) -> list[tuple[str, str]]:
    """Return (name, default) of every parameter and annotated field of some code that states one as a constant."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            a = node.args
            named = [*zip(reversed([*a.posonlyargs, *a.args]), reversed(a.defaults), strict=False)]
            named += [(k, d) for k, d in zip(a.kwonlyargs, a.kw_defaults, strict=True) if d is not None]
            found += [(k.arg, ast.unparse(d)) for k, d in named if isinstance(d, ast.Constant)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            values = [node.value, *(node.value.args[:1] if isinstance(node.value, ast.Call) else [])]
            found += [(node.target.id, ast.unparse(v)) for v in values if isinstance(v, ast.Constant)]
    return found


def again(source: str) -> list[tuple[str, str]]:
    """Return the options whose very default a piece of code states once more."""
    return [(n, d) for n, d in defaults(source) if n in FIELDS and d == repr(FIELDS[n].default)]


def test_no_default_is_written_twice() -> None:
    own = {"options.py", "demo_folder.py"}  # where they stand; and the demo, whose seed makes the demo
    files = [p for room in ABOVE for p in (ROOT / room).rglob("*.py") if p.name not in own]
    assert {str(p.relative_to(ROOT)): found for p in files if (found := again(p.read_text()))} == {}


def test_a_second_default_is_seen() -> None:
    assert again("def f(level: float = 0.95): ...") == [("level", "0.95")]
    assert again("def f(*, mode='auto', other='auto'): ...") == [("mode", "'auto'")]
    assert again("class C:\n    seed: int = key(0, 'an integer')") == [("seed", "0")]
    assert again("def f(level=LEVEL, seed=1): ...") == []


def test_keywords_have_the_names_and_types_of_the_bundle() -> None:
    assert get_type_hints(Given) == get_type_hints(Options)
    assert list(Given.__annotations__) == list(FIELDS)


@pytest.mark.parametrize("verb", [fp.probe, fp.sweep, fp.largest_lr, fp.attribute, fp.compare, fp.slope])
def test_every_verb_takes_them(verb: Any) -> None:
    (found,) = [p for p in inspect.signature(verb).parameters.values() if p.kind is p.VAR_KEYWORD]
    assert found.name == "options"
    assert "Unpack[Given]" in str(found.annotation)


def test_keys_and_their_help_are_made_of_it() -> None:
    text = describe_keys()
    for name, option in FIELDS.items():
        if name in ("keep_scores", "microbatch"):
            continue  # kept in memory only; two keys of its own
        assert Config.model_fields[name].default == option.default, name
        assert Config.model_fields[name].description == option.metadata["meaning"]
        assert f"  {name} " in text
    assert Config.model_fields["microbatch_tokens"].default == Options().microbatch.tokens  # type: ignore[union-attr]


def test_docs_name_every_option() -> None:
    assert Options.__doc__ is not None
    assert all(f"{name}:" in Options.__doc__ for name in FIELDS)


def test_what_a_verb_has_no_use_for_is_refused() -> None:
    with pytest.raises(InputError, match="top_k can do nothing in a sweep; leave it out"):
        options_of({"top_k": 3}, "a sweep", ("top_k",))
    with pytest.raises(InputError, match="There is no option 'ordr' here; the options are mode"):
        options_of({"ordr": 2}, "a probe")
    assert options_of({}, "a sweep", ("rounding",), rounding=False).rounding is False


@pytest.mark.parametrize(("name", "value"), [("top_k", -1), ("top_k", 1.5), ("seed", True), ("level", 1.0)])
def test_what_is_out_of_range_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name} is "):
        Options(**{name: value})
