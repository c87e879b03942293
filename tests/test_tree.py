"""The tree algebra is a vector space with float64 reductions and strict keys."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcprobe import tree
from funcprobe.errors import InputError
from funcprobe.types import Params

SHAPES = st.lists(st.sampled_from([(), (0,), (1,), (3,), (2, 3)]), min_size=1, max_size=4)


@st.composite
def vectors(draw: st.DrawFn, count: int = 2) -> list[Params]:
    """Draw trees of one structure, the empty leaf included, in float64."""
    shapes = draw(SHAPES)
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return [
        {f"layer.{i}": torch.randn(s, generator=g, dtype=torch.float64) for i, s in enumerate(shapes)}
        for _ in range(count)
    ]


def close(a: Params, b: Params) -> bool:
    # a handful of float64 operations on numbers of order one
    return all(torch.allclose(a[n], b[n], rtol=1e-14, atol=1e-14) for n in a) and a.keys() == b.keys()


@given(vectors(3), st.floats(-3, 3))
def test_vector_space_axioms(abc: list[Params], c: float) -> None:
    a, b, z = abc
    assert close(tree.add(a, b), tree.add(b, a))
    assert close(tree.add(tree.add(a, b), z), tree.add(a, tree.add(b, z)))
    assert close(tree.add(a, tree.zeros_like(a)), a)
    assert close(tree.sub(tree.add(a, b), b), a)
    assert close(tree.scale(c, tree.add(a, b)), tree.add(tree.scale(c, a), tree.scale(c, b)))
    assert close(tree.axpy(c, a, b), tree.add(tree.scale(c, a), b))


@given(vectors(3), st.floats(-3, 3))
def test_dot_is_an_inner_product(abc: list[Params], c: float) -> None:
    a, b, z = abc
    terms = float(tree.dot({n: x.abs() for n, x in a.items()}, {n: x.abs() for n, x in b.items()})) + 1
    assert math.isclose(tree.dot(a, b), tree.dot(b, a), abs_tol=1e-14 * terms)
    left = float(tree.dot(tree.axpy(c, a, z), b))
    # rounding of about twenty float64 products, relative to the sum of their magnitudes
    bound = 1e-13 * (terms * (1 + abs(c)) + 30)
    assert abs(left - float(c * tree.dot(a, b) + tree.dot(z, b))) <= bound
    assert float(tree.dot(a, a)) >= 0
    assert math.isclose(tree.norm(a) ** 2, tree.dot(a, a), rel_tol=1e-14, abs_tol=1e-300)


def test_reductions_accumulate_in_float64() -> None:
    # in float32, 2^24 + 1 is 2^24: a float32 sum would lose every one of these ones
    a = {"big": torch.tensor([2.0**12]), "ones": torch.ones(1000)}
    assert tree.dot(a, a).dtype == torch.float64
    assert float(tree.dot(a, a)) == 2.0**24 + 1000
    assert tree.dot(tree.cast(a, torch.bfloat16), tree.cast(a, torch.bfloat16)).dtype == torch.float64
    assert float(tree.dot({}, {})) == 0.0


def test_order_of_keys_does_not_matter() -> None:
    a = {"layer.10": torch.ones(2), "layer.2": torch.zeros(3)}
    b = dict(reversed(a.items()))
    assert float(tree.norm(tree.sub(a, b))) == 0.0
    assert list(tree.sub(a, b)) == ["layer.10", "layer.2"]


def test_keys_are_strict() -> None:
    with pytest.raises(InputError, match=r"missing 'a', unexpected 'b'"):
        tree.sub({"a": torch.ones(1)}, {"b": torch.ones(1)})
    with pytest.raises(InputError, match=r"differ in shape at 'a': \(1,\) against \(2,\)"):
        tree.dot({"a": torch.ones(1)}, {"a": torch.ones(2)})
    with pytest.raises(InputError, match="no leaf named 'x'; it has 'a'"):
        tree.select({"a": torch.ones(1)}, ["x"])


def test_a_long_list_of_keys_is_cut() -> None:
    with pytest.raises(InputError, match="'p0', 'p1', 'p2', 'p3' and 5 more"):
        tree.same_keys({f"p{i}": torch.ones(1) for i in range(9)}, {})


def test_choosing_leaves() -> None:
    a = {"x.weight": torch.tensor([3.0, 4.0]), "y.weight": torch.ones(1), "y.bias": torch.ones(1)}
    assert tree.top_k(a, 2) == [("x.weight", 5.0), ("y.bias", 1.0)]
    assert list(tree.select(a, lambda name: name.startswith("y"))) == ["y.weight", "y.bias"]
    assert tree.size(a) == 4
    assert tree.is_finite(a)
    assert not tree.is_finite({"x": torch.tensor([float("nan")])})


def test_nothing_is_mutated_and_dtypes_follow_the_first() -> None:
    a, b = {"x": torch.ones(2)}, {"x": torch.full((2,), 2.0, dtype=torch.float64)}
    before = a["x"].clone()
    tree.axpy(3.0, b, a)
    tree.add(a, a)
    assert torch.equal(a["x"], before)
    assert tree.axpy(3.0, b, a)["x"].dtype == torch.float32
    assert tree.like(b, a)["x"].dtype == torch.float32
