"""Batches, scores and parameter trees for the training laws."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from funcprobe.types import OptState, Params, Rollouts, TokenScores

#: Laws are about values, not about how busy the machine is: no deadline.
law = settings(deadline=None, max_examples=30)
law_of_a_table = settings(deadline=None, max_examples=12)  # each of dozens of rows that share their terms

#: Every class of torch.optim that steps on dense gradients without a closure, in every implementation for a CPU.
CLASSES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "SGD foreach": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "foreach": True}),
    "SGD fused": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1, "fused": True}),
    "Adam": (torch.optim.Adam, {"weight_decay": 0.1}),
    "Adam fused": (torch.optim.Adam, {"amsgrad": True, "fused": True}),
    "AdamW": (torch.optim.AdamW, {}),
    "AdamW foreach": (torch.optim.AdamW, {"amsgrad": True, "foreach": True}),
    "AdamW fused": (torch.optim.AdamW, {"fused": True}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
    "RMSprop foreach": (torch.optim.RMSprop, {"foreach": True}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "Adagrad fused": (torch.optim.Adagrad, {"fused": True}),
    "NAdam": (torch.optim.NAdam, {}),
    "RAdam": (torch.optim.RAdam, {}),
    "Adamax": (torch.optim.Adamax, {}),
    "Adadelta": (torch.optim.Adadelta, {}),
    "ASGD": (torch.optim.ASGD, {}),
    "Rprop": (torch.optim.Rprop, {}),
    "Adafactor": (torch.optim.Adafactor, {}),
    "Adafactor foreach": (torch.optim.Adafactor, {"foreach": True}),
    "Muon": (torch.optim.Muon, {}),
}


class Batch(NamedTuple):
    """Rollouts with the scores that a policy gave them."""

    rollouts: Rollouts
    scores: TokenScores


def batch(
    mask: list[list[bool]] | Tensor,
    seed: int = 0,
    *,
    old: bool = True,
    ref: bool = True,
    spread: float = 0.4,
    **fields: Any,
) -> Batch:
    """A batch with this mask: groups of two, random rewards, NaN wherever nothing should ever be looked at."""
    mask = torch.as_tensor(mask)
    rows, width = mask.shape
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    logp = -2 * torch.rand(rows, width, generator=g, dtype=torch.float64) - 0.01
    stored = {
        "old_logps": torch.where(mask, logp + spread * normal(rows, width), torch.nan),
        "ref_logps": torch.where(mask, logp + normal(rows, width), torch.nan),
    }
    entropy = torch.rand(rows, width, generator=g, dtype=torch.float64)
    rollouts = Rollouts(
        ids=torch.zeros(rows, width + 1, dtype=torch.int64),
        attention_mask=torch.ones(rows, width + 1, dtype=torch.bool),
        prompt_lengths=torch.ones(rows, dtype=torch.int64),
        completion_mask=mask,
        temperature=torch.ones(rows, dtype=torch.float64),
        group_ids=torch.arange(rows) // 2,
        weight=torch.ones(rows, dtype=torch.float64),
        rewards=normal(rows),
        old_logps=stored["old_logps"] if old else None,
        ref_logps=stored["ref_logps"] if ref else None,
    )
    scores = TokenScores(torch.where(mask, logp, 0.0), torch.where(mask, entropy, 0.0))
    return Batch(rollouts._replace(**fields), scores)


@st.composite
def masks(draw: st.DrawFn, max_pairs: int = 3, max_tokens: int = 5) -> list[list[bool]]:
    """A [B, T] mask with B even: holes anywhere, rows without a token, at least one token in all."""
    rows, width = 2 * draw(st.integers(1, max_pairs)), draw(st.integers(1, max_tokens))
    row = st.lists(st.booleans(), min_size=width, max_size=width)
    mask = draw(st.lists(row, min_size=rows, max_size=rows))
    mask[draw(st.integers(0, rows - 1))][draw(st.integers(0, width - 1))] = True
    return mask


seeds = st.integers(0, 2**31)


def leaves(dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Params:
    """A tree with a matrix, a vector, a transposed (non-contiguous) matrix and a scalar leaf."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"layer.10.weight": (5, 7), "layer.2.bias": (3,), "head": (4, 6), "gain": ()}
    made = {name: (scale * torch.randn(s, generator=g, dtype=torch.float64)).to(dtype) for name, s in shapes.items()}
    return {**made, "head": made["head"].T}


def clone(tree: Any) -> Any:
    """A deep copy of a tree of tensors."""
    return {k: clone(v) for k, v in tree.items()} if isinstance(tree, dict) else tree.clone()


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Bitwise equality of two trees, structure first; a difference is reported with its name and values."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), f"{where}: keys {list(found)} against {list(expected)}"
        for key in expected:
            assert_same(found[key], expected[key], f"{where}/{key}")
        return
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), where
    assert torch.equal(found, expected), f"{where}: {found} against {expected}, ratio {found / expected}"


def gradients(params: Params, seed: int) -> Params:
    """A random gradient like the parameters, with one entry exactly zero."""
    found = leaves(torch.float64, seed + 1000)
    found["layer.2.bias"][0] = 0.0  # as in an embedding row that no token reads
    return {name: found[name].to(p.dtype) for name, p in params.items()}


def live_state(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], names: list[str]) -> OptState:
    """The state of a live torch optimizer by name, without funcprobe's own reader."""
    return {
        name: {k: v for k, v in optimizer.state.get(p, {}).items() if v is not None}
        for name, p in zip(names, params, strict=True)
    }
