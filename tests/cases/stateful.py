"""Batches as the stateful system packs them, with the token lists they were packed from, and live pairs to probe."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import funcprobe as fp
from benchmarks.stateful import StatefulProbe, StatefulResult
from funcprobe.compat import DeltaEntropyIS, ProbeComponents
from funcprobe.compat.batches import to_rollouts
from tests.cases import models
from tests.cases.live_pairs import adamw, trained

#: Both the padding token and the end of a sequence.
END = 0

Pair = tuple[nn.Module, torch.optim.Optimizer]


class Packed(NamedTuple):
    """A dictionary of the stateful system, and what went into it."""

    batch: dict[str, Any]
    prompts: list[list[int]]  #: one a row
    completions: list[list[int]]  #: the end token included


class Table(nn.Module):
    """Next-token logits straight from a table: what a bfloat16 one holds is exact, and no product rounds it."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Embedding(models.VOCABULARY, models.VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits(ids)


def table(dtype: torch.dtype = torch.float64) -> nn.Module:
    with models.seeded(21):
        return Table().to(dtype)


def packed(prompts: int, group_size: int, seed: int, **changes: Any) -> Packed:
    """Return ragged prompts (left-padded) and completions (right-padded), most of which end with END."""
    g = torch.Generator().manual_seed(seed)

    def drawn(low: int, high: int) -> list[int]:
        n = int(torch.randint(low, high, (), generator=g))
        return torch.randint(1, models.VOCABULARY, (n,), generator=g).tolist()

    starts = [drawn(1, 5) for _ in range(prompts)]
    rows = [(start, [*drawn(1, 6), END]) for start in starts for _ in range(group_size)]
    width, length = max(len(p) for p in starts), max(len(c) for _, c in rows)
    ids = torch.full((len(rows), width + length), END)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(rows):
        ids[row, width - len(prompt) : width + len(completion)] = torch.tensor([*prompt, *completion])
        mask[row, width - len(prompt) : width + len(completion)] = 1
    rewards = torch.randn(prompts, group_size, generator=g, dtype=torch.float64)
    shape = (prompts, group_size, -1)
    batch = {
        "sequences": ids.reshape(shape),
        "attention_masks": mask.reshape(shape),
        "prompt_lens": [width] * prompts,
        "advantages": rewards - rewards.mean(1, keepdim=True),
        "max_lengths": [length] * prompts,
        "num_prompts": prompts,
        "num_responses_per_prompt": group_size,
    }
    return Packed({**batch, **changes}, [p for p, _ in rows], [c for _, c in rows])


def evaluation(**changes: Any) -> dict[str, Any]:
    return packed(9, 1, 1, **changes).batch


def update(**changes: Any) -> dict[str, Any]:
    return packed(4, 3, 2, **changes).batch


def pair(make: Callable[[], nn.Module] = table, optimizer: Callable[[nn.Module], Any] = adamw) -> Pair:
    """Return a live pair after three real steps: moments are moments."""
    module = make()
    found = module, optimizer(module)
    trained(*found)
    return found


def probe(live: Pair, cfg: dict[str, Any] | None = None, config: dict[str, Any] | None = None, **batches: Any) -> Any:
    """Return what DeltaEntropyIS finds on the shared E and U."""
    instance = DeltaEntropyIS(model=live[0], config=config or {}, logger=None)
    E, U = batches.get("E", evaluation()), batches.get("U", update())
    return instance.entropy_change_two_batch(live[0], E, U, live[1], cfg or {})


def predicted(live: Pair, config: dict[str, Any] | None = None, **options: Any) -> Any:
    """Return what ProbeComponents predicts on the shared E and U."""
    arguments = {"E_batch": evaluation(), "U_batch": update(), "mb_size_prompts": 2, "weighting_mode": "dr_grpo"}
    return ProbeComponents(live[0], config or {}, None).compute_delta_h1_from_batches(**{**arguments, **options})


def stateful(live: Pair, per: str = "sequence", lr: float | None = None, **batches: Any) -> StatefulResult:
    """Return what the literal stateful system finds, on a copy of the pair."""
    module, optimizer = copy.deepcopy(live)
    E, U = (to_rollouts(batches.get(k, f()), eos=[END]) for k, f in (("E", evaluation), ("U", update)))
    baseline = StatefulProbe(module, optimizer, weighting="sequence", per=per, objective="dr_grpo", microbatch=4)
    return baseline.run(E, U, lr=lr)


def rollouts_of(packed: Packed) -> fp.Rollouts:
    """Return the same rows built from the lists themselves."""
    return fp.rollouts_from_lists(packed.prompts, packed.completions, temperature=1.0)
