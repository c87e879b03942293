"""Kernels are used where they are right on a small problem, seen once; where they are not, one sentence says so."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from funcprobe.engine import attention_choice
from funcprobe.engine.attention_blocks import Moves, Point
from funcprobe.engine.attention_by_blocks import tangents_by_blocks, value_by_rows
from funcprobe.errors import FuncprobeWarning

ALL = (True, True, True)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def untried() -> Any:
    """Forget what was tried."""
    attention_choice._tried.cache_clear()
    yield
    attention_choice._tried.cache_clear()


def kernels(off: float = 0.0, asked: list[Point] | None = None) -> Any:
    """Return kernels made of blocks in half precision, their tangents off by a factor."""

    def tangents(at: Point, lse: Tensor, moves: Moves) -> Tensor:
        if asked is not None:
            asked.append(at)
        return (1 + off) * tangents_by_blocks(at, value_by_rows(at)[0], lse, moves)

    return SimpleNamespace(value=value_by_rows, tangents=tangents)


@pytest.mark.parametrize(
    ("causal", "mask"), [(True, None), (False, None), (False, torch.bool), (False, torch.bfloat16)]
)
def test_rounding_is_no_reason_to_refuse(causal: bool, mask: torch.dtype | None) -> None:
    at = attention_choice.small(CPU, (64, 48), causal, mask)
    moves = attention_choice.drawn(at, ALL)
    assert attention_choice.distance(kernels(), at, moves) <= attention_choice.ROUNDED
    assert attention_choice.distance(kernels(0.02), at, moves) > attention_choice.ROUNDED


def test_right_kernels_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Point] = []
    own = kernels(asked=asked)
    monkeypatch.setattr(importlib, "import_module", lambda name: own)
    for _ in range(3):
        assert attention_choice._tried(CPU, (16, 16), True, None, ALL) is own
    assert len(asked) == 1


@pytest.mark.parametrize("off", [0.05, float("nan")])
def test_wrong_kernels_are_refused_in_a_sentence(off: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda name: kernels(off))
    with pytest.warns(
        FuncprobeWarning, match=r"Attention runs by blocks of products, .* not used here \(it is .* from"
    ):
        assert attention_choice._tried(CPU, (16, 16), True, None, ALL) is None
    assert attention_choice._tried(CPU, (16, 16), True, None, ALL) is None  # and says it once


def test_kernels_that_cannot_be_had_are_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.warns(FuncprobeWarning, match=r"ModuleNotFoundError: No module named 'triton'"):
        assert attention_choice._tried(CPU, (16, 16), True, None, ALL) is None


def test_a_card_that_is_full_says_nothing_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    own, seen = kernels(), []

    def full(at: Point) -> Any:
        seen.append(at)
        if len(seen) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return value_by_rows(at)

    own.value = full
    monkeypatch.setattr(importlib, "import_module", lambda name: own)
    with pytest.raises(torch.OutOfMemoryError):
        attention_choice._tried(CPU, (16, 16), True, None, ALL)
    assert attention_choice._tried(CPU, (16, 16), True, None, ALL) is own


def test_a_processor_has_none() -> None:
    assert attention_choice._kernels(attention_choice.small(CPU, (16, 16), True, None), ALL) is None
