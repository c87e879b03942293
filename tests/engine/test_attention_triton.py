"""The kernels of a GPU, run by Triton's interpreter in float32: `make triton`."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from funcprobe import engine
from funcprobe.engine import attention, attention_choice
from funcprobe.engine.attention_blocks import Moves, Point

pytestmark = pytest.mark.triton

#: Sums of at most 80 products of size 1 and 45 of those, in float32: as many roundings of 6e-8, all alike.
CLOSE = 1e-5
MASKS = ("none", "causal", "boolean", "window", "padded", "additive", "one row", "infinite")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the kernels, cut so small that a small problem has many blocks."""
    from funcprobe.engine import attention_triton

    for table in ("VALUES", "TANGENTS"):
        shapes = {n: (attention_triton.Shape(16, 16, 4, 1),) for n in getattr(attention_triton, table)}
        monkeypatch.setattr(attention_triton, table, shapes)
    return attention_triton


def problem(name: str, widths: tuple[int, int], queries: int = 37, keys: int = 45, seed: int = 0) -> Point:
    """Return two rows of six heads over two, laid out as projections leave them; of some masks a query sees nothing."""
    g = torch.Generator().manual_seed(seed)
    keys = queries if name == "causal" else keys
    shapes = ((2, queries, 6, widths[0]), (2, keys, 2, widths[0]), (2, keys, 2, widths[1]))
    query, key, value = (torch.randn(shape, generator=g).transpose(1, 2) for shape in shapes)
    i, j = torch.arange(queries)[:, None], torch.arange(keys)
    blind = torch.rand(2, 1, queries, keys, generator=g) > 0.5
    blind[-1, :, 0] = False
    padded = ((i >= j) & (j < keys - 7)).expand(2, 1, -1, -1).clone()
    padded[0, ..., :5] = False
    masks = {
        "boolean": blind,
        "window": ((i >= j) & (i - j < 20))[None, None],
        "padded": padded,
        "additive": torch.randn(2, 6, queries, keys, generator=g),
        "one row": torch.randn(1, 1, 1, keys, generator=g),
        "infinite": torch.zeros(2, 1, queries, keys).masked_fill(~blind, -torch.inf),
    }
    return Point(query, key, value, masks.get(name), name == "causal", 1.3 * widths[0] ** -0.5)


def moved(at: Point, moving: str, many: int = 2) -> Moves:
    """Return tangents of those of q, k and v that move."""
    return attention_choice.drawn(at, ("q" in moving, "k" in moving, "v" in moving), many)


def assert_right(kernels: Any, at: Point, moves: Moves) -> None:
    """Hold value, log-sum-exp and tangents against the blocks in float64."""
    assert attention_choice.distance(kernels, at, moves, torch.float64) < CLOSE


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("widths", [(24, 24), (80, 64)])
def test_value_and_tangents_are_those_of_the_blocks(kernels: Any, mask: str, widths: tuple[int, int]) -> None:
    at = problem(mask, widths)
    assert_right(kernels, at, moved(at, "qkv"))


@pytest.mark.parametrize("moving", ["q", "k", "v", "qv", "kv", "qk"])
def test_what_does_not_move_is_left_out(kernels: Any, moving: str) -> None:
    at = problem("causal", (16, 16))
    assert_right(kernels, at, moved(at, moving, many=3))


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (16, 16), (17, 3), (3, 50)])
@pytest.mark.parametrize("mask", ["none", "boolean", "causal"])
def test_at_any_length(kernels: Any, mask: str, queries: int, keys: int) -> None:
    at = problem(mask, (8, 8), queries, keys)
    if at.mask is not None:
        at.mask[..., 0] = True
    assert_right(kernels, at, moved(at, "qkv"))


@pytest.mark.parametrize("mask", ["causal", "padded", "infinite"])
def test_attention_takes_them_through_jvp_and_vmap(kernels: Any, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "_fused", lambda at: None)
    monkeypatch.setattr(attention_choice, "_kernels", lambda at, moving: kernels)
    at = problem(mask, (16, 16))
    moves = moved(at, "qkv")
    options = {"attn_mask": at.mask, "is_causal": at.causal, "scale": at.scale, "enable_gqa": True}

    def pushed(attend: Any, *tangents: Tensor) -> Any:
        return torch.func.jvp(functools.partial(attend, **options), at[:3], tangents)

    tangents = tuple(x for x in moves if x is not None)
    found = torch.vmap(lambda *v: pushed(attention.attend, *v)[1])(*tangents)
    with engine.math_attention():
        for k in range(2):
            out, expected = pushed(nn.functional.scaled_dot_product_attention, *(v[k] for v in tangents))
            assert float((found[k] - expected).norm() / expected.norm()) < CLOSE
    own = pushed(attention.attend, *(v[0] for v in tangents))[0]
    assert float((own - out).norm() / out.norm()) < CLOSE


def test_what_is_no_number_in_a_mask_shows(kernels: Any) -> None:
    """A block is not left out because its largest entry is NaN."""
    at = problem("additive", (16, 16))
    assert at.mask is not None
    at.mask[0, 1, 20, 3] = torch.nan
    out, _ = kernels.value(at)
    assert out[0, 1, 20].isnan().all()
    assert out.isfinite().all(-1).sum() == out[..., 0].numel() - 1


def test_a_card_with_less_memory_takes_the_next_shape(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = kernels.Shape(32, 32, 4, 1), kernels.Shape(16, 16, 4, 1)
    monkeypatch.setattr(kernels, "TANGENTS", dict.fromkeys(kernels.TANGENTS, (large, small)))
    monkeypatch.setattr(kernels, "_TOO_LARGE", {})
    run, seen = kernels._run, []

    def limited(kernel: Any, at: Point, shape: Any, *args: Any, **constants: Any) -> None:
        seen.append(shape)
        if shape == large:
            raise kernels.OutOfResources(262144, 232448, "shared memory")
        run(kernel, at, shape, *args, **constants)

    monkeypatch.setattr(kernels, "_run", limited)
    at = problem("causal", (16, 16))
    assert_right(kernels, at, moved(at, "qkv"))
    assert_right(kernels, at, moved(at, "qkv"))
    assert seen == [small, large, small, small, small]  # a value, a tangent in two tries, and each again
