"""First lines of docstrings: one sentence that a stranger understands without the rest of the file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import funcprobe

PACKAGE = Path(funcprobe.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

#: Words that name nothing to a stranger.
EMPTY = re.compile(r"\b(Inquiry|Grounds|Taken|the asked|the said|the told|the found)\b")
#: A clause that begins with "what" names nothing either; names in backticks or quotes are no clauses.
WHAT = re.compile(r"\bwhat\b", re.IGNORECASE)
QUOTED = re.compile(r'``?[^`]*``?|"[^"]*"|\(what, done, total\)')

#: The imperatives that a function begins with.
VERBS = frozenset(
    re.findall(
        r"\w+",
        "Add Bring Call Check Compute Count Cross Cut Describe Do Draw End Fill Find Give Head Hear Hold Issue Keep "
        "Lay Let Load Lock Log Look Mark Measure Move Name Note Open Parse Print Put Read Refuse Remove Rename "
        "Return Run Sample Save Say Search Send Set Show Stack Step Swap Take Turn Walk Warn Write Yield",
    )
)


def documented(tree: ast.Module) -> Iterator[tuple[ast.AST, str, str]]:
    """Yield (node, name, docstring) of the module and of everything in it that has, or has to have, a docstring.

    Public names have to have one, but for methods of a class with a base, which may say no more than the base does.
    """
    yield tree, "module", ast.get_docstring(tree) or ""
    for node in tree.body:
        of_class = node.body if isinstance(node, ast.ClassDef) else []
        for one in [node, *of_class]:
            if isinstance(one, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not is_overload(one):
                text = ast.get_docstring(one)
                inherits = one is not node and isinstance(node, ast.ClassDef) and bool(node.bases)
                if text is not None or not (one.name.startswith("_") or inherits):
                    yield one, one.name, text or ""


def is_overload(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether it is a signature alone, whose words stand at the function that has a body."""
    return any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list)


def is_noun_phrase(node: ast.AST) -> bool:
    """Return whether a first line names a thing: that of a module, a class or a property."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return True
    return any("property" in ast.unparse(decorator) for decorator in node.decorator_list)


def faults(source: str) -> list[str]:
    """Return a line for every first line of a docstring in `source` that breaks the rule."""
    found = []
    for node, name, text in documented(ast.parse(source)):
        line = text.partition("\n")[0]
        bare = QUOTED.sub("", line)
        reasons = [
            *(["there is none"] if not line else []),
            *(["it ends without a full stop"] if line and line[-1] not in ".:?" else []),
            *(["it has a clause that begins with 'what'"] if WHAT.search(bare) else []),
            *(["it has a word that names nothing"] if EMPTY.search(bare) else []),
        ]
        if line and not is_noun_phrase(node) and line.split()[0].rstrip(",") not in VERBS:
            reasons.append("it does not begin with a verb that is in use for functions")
        found += [f"{name}: {reason}: {line}" for reason in reasons]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_first_lines_say_what_a_stranger_understands(file: Path) -> None:
    assert not faults(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("docstring", "reason"),
    [
        ("What the step does.", "begins with 'what'"),
        ("Return what the step does.", "begins with 'what'"),
        ("Return the Grounds of a step.", "names nothing"),
        ("Return the step", "without a full stop"),
        ("The step.", "does not begin with a verb"),
        ("", "there is none"),
    ],
)
def test_a_first_line_that_breaks_the_rule_is_found(docstring: str, reason: str) -> None:
    (fault,) = [f for f in faults(f'"""A toy."""\ndef f():\n    """{docstring}"""\n') if reason in f]
    assert fault.startswith("f: ")


def test_properties_are_named_and_quoted_words_are_free() -> None:
    assert not faults(
        '"""A toy."""\nclass A:\n    """A toy."""\n    @property\n    def x(self):\n        """The size of `what`."""\n'
    )
