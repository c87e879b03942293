"""What is encoded is decoded to the same: every type, every float, every tensor, to the bit."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from funcprobe.errors import Note
from funcprobe.estimators.importance import WeightHealth
from funcprobe.estimators.uncertainty import Bar, Replicates
from funcprobe.measurement.outcome import Outcome
from funcprobe.measurement.readings import Reading, Sampled
from funcprobe.measurement.routing import Routing
from funcprobe.results.codec import NOT_KEPT, DamagedError, Inline, decode, encode
from funcprobe.results.storage import ArrayFile
from tests.cases.kept import same

TEXTS = st.text(max_size=8)
FLOATS = st.floats()
MAYBE = st.none() | FLOATS
BARS = st.builds(Bar, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS)
NOTES = st.lists(st.builds(Note, TEXTS, TEXTS), max_size=2).map(tuple)


def named(values: st.SearchStrategy[Any], least: int = 0) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(TEXTS, values, min_size=least, max_size=3)


READINGS = st.builds(
    Reading,
    *(TEXTS, TEXTS, FLOATS, FLOATS, FLOATS, MAYBE),
    method=st.sampled_from(["path", "values", "difference"]),
    nodes=st.integers(0, 9),
    **dict.fromkeys(("float_error", "subtraction", "exact", "stored"), MAYBE),
    bars=named(BARS),
    caveats=st.lists(TEXTS, max_size=2).map(tuple),
    of_delta=st.booleans(),
)


@st.composite
def sampled(draw: st.DrawFn) -> Sampled:
    """Return replicates of any floats, none at all among them."""
    width, rows = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    numbers = st.lists(FLOATS, min_size=width, max_size=width)
    estimate = torch.tensor(draw(numbers), dtype=torch.float64)
    values = torch.tensor([draw(numbers) for _ in range(rows)], dtype=torch.float64).reshape(rows, width)
    method = draw(st.sampled_from(["jackknife", "infinitesimal", "bootstrap"]))
    return Sampled(Replicates(estimate, values, rows, method), draw(st.dictionaries(TEXTS, st.integers(0, 9))))


OUTCOMES = st.builds(
    Outcome,
    readings=named(READINGS, least=1),
    exchange=named(BARS),
    health=st.builds(WeightHealth, *[FLOATS] * 7, MAYBE, *[FLOATS] * 4),
    lr=MAYBE,
    **dict.fromkeys(("delta_norm", "rounding_ratio", "unmoved"), FLOATS),
    rounding=MAYBE,
    info=named(FLOATS | st.integers()),
    routing=st.none() | st.builds(Routing, *[st.integers(0, 99)] * 3),
    sampled=st.none() | sampled(),
    warnings=NOTES,
    notes=NOTES,
)


def through(value: Any, hint: Any) -> Any:
    """Return the value after a journey through strict JSON with arrays inside."""
    text = json.dumps(encode(value, hint, Inline()), allow_nan=False)
    return decode(json.loads(text), hint, Inline())


@given(OUTCOMES)
def test_any_outcome_comes_back(outcome: Outcome) -> None:
    assert same(through(outcome, Outcome), outcome)


@given(OUTCOMES)
def test_arrays_may_stand_beside(outcome: Outcome) -> None:
    kept = ArrayFile()
    text = json.dumps(encode(outcome, Outcome, kept), allow_nan=False)
    assert same(decode(json.loads(text), Outcome, ArrayFile(kept.stored)), outcome)
    assert len(kept.stored) == (0 if outcome.sampled is None else 2)


class Pair(NamedTuple):
    number: int
    words: tuple[str, float]
    by_number: dict[int, str]
    given: float | None = None


@dataclass(frozen=True)
class Everything:
    pairs: tuple[Pair, ...]
    arrays: Mapping[str, Tensor]
    mode: Literal["one", "two"]
    anything: Any
    flag: bool = False
    live: object = field(default=None, metadata=NOT_KEPT)


def everything() -> Everything:
    arrays = {
        "int": torch.arange(6).reshape(2, 3),
        "bool": torch.tensor([True, False]),
        "half": torch.tensor([1.5, -math.inf], dtype=torch.bfloat16),
        "single": torch.tensor(0.1),
        "none": torch.zeros(0, 4, dtype=torch.float64),
    }
    pairs = (Pair(1, ("a", math.nan), {7: "seven", -1: ""}), Pair(2, ("", -0.0), {}, math.inf))
    return Everything(pairs, arrays, "two", {"a": [1, None, math.inf, {"b": "nan"}], "c": True})


def test_tuples_numbers_as_keys_and_tensors_of_every_dtype_come_back() -> None:
    assert same(through(everything(), Everything), everything())
    kept = ArrayFile()
    plain = json.loads(json.dumps(encode(everything(), Everything, kept), allow_nan=False))
    assert same(decode(plain, Everything, kept), everything())


def test_what_is_not_kept_has_its_default() -> None:
    live = dataclasses.replace(everything(), live=object())
    assert through(live, Everything).live is None
    assert "live" not in encode(live, Everything, Inline())


def test_arrays_of_one_name_or_one_memory_are_kept_apart() -> None:
    x = torch.arange(4.0)
    value = {"a.b": {"c": x}, "a": {"b.c": x[1:]}}
    kept = ArrayFile()
    plain = encode(value, dict[str, dict[str, Tensor]], kept)
    assert list(kept.stored) == ["a.b.c", "a.b.c'"]
    assert same(decode(plain, dict[str, dict[str, Tensor]], kept), value)
    assert len({t.untyped_storage().data_ptr() for t in kept.stored.values()}) == 2


def damaged(**changes: Any) -> dict[str, Any]:
    plain = encode(everything(), Everything, Inline())
    return {name: x for name, x in {**plain, **changes}.items() if x is not ...}


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        ([], "it is of type list instead of dict"),
        (damaged(pairs=...), "pairs is missing"),
        (damaged(more=1), "more is unknown"),
        (damaged(mode="three"), "mode is 'three', none of one, two"),
        (damaged(mode=None), "mode is null"),
        (damaged(flag=1), "flag is of type int instead of bool"),
        (damaged(pairs=[{"number": 1}]), r"pairs\.0\.words is missing"),
        (damaged(pairs=[{"number": True, "words": ["", 1], "by_number": [], "given": None}]), r"pairs\.0\.number is"),
        (damaged(pairs=[{"number": 1, "words": [""], "by_number": [], "given": None}]), r"words holds 1 values"),
        (damaged(pairs=[{"number": 1, "words": ["", "1"], "by_number": [], "given": None}]), "'1' instead of a number"),
        (damaged(pairs=[{"number": 1, "words": ["", 1], "by_number": [[1]], "given": None}]), "pairs of key and value"),
        (damaged(arrays={"x": {"dtype": "float64", "shape": [2], "numbers": [1.0]}}), r"arrays\.x is no tensor"),
        (damaged(arrays={"x": {"dtype": "nonsense", "shape": [1], "numbers": [1.0]}}), r"arrays\.x is no tensor"),
        (damaged(arrays={"x": "x"}), r"arrays\.x is no tensor"),
    ],
)
def test_damage_is_named_by_its_field(plain: Any, said: str) -> None:
    with pytest.raises(DamagedError, match=said):
        decode(plain, Everything, Inline())


@settings(max_examples=50)
@given(
    st.recursive(
        st.none() | st.booleans() | FLOATS | st.integers() | TEXTS,
        lambda each: st.lists(each, max_size=3) | st.dictionaries(TEXTS, each, max_size=3),
    )
)
def test_garbage_is_damage_and_nothing_else(plain: Any) -> None:
    for hint in (Outcome, Everything, Pair):
        with pytest.raises(DamagedError):
            decode(plain, hint, Inline())


def test_what_cannot_be_kept_is_refused_when_it_is_written() -> None:
    for value in ({"number": 1}, object(), {1: 2}):
        with pytest.raises(TypeError, match=r"anything is .* cannot be kept"):
            encode(dataclasses.replace(everything(), anything=value), Everything, Inline())
    with pytest.raises(TypeError, match="expected dataclasses, NamedTuples and plain values"):
        encode(everything(), object, Inline())
