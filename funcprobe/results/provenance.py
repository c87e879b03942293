"""`Provenance`: how the numbers of a result were made, and from which inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from funcprobe.types import Json, Rollouts


class BatchCounts(NamedTuple):
    """The size of a batch."""

    sequences: int
    tokens: int  #: completion tokens that the policy chose
    prompts: int

    @classmethod
    def of(cls, rollouts: Rollouts) -> BatchCounts:
        """Count a batch."""
        mask = rollouts.completion_mask
        return cls(mask.shape[0], int(mask.sum()), int(rollouts.group_ids.unique().numel()))


@dataclass(frozen=True)
class Provenance:
    """How the numbers of a result were made, and from which inputs."""

    evaluation: BatchCounts  #: size of E
    batch: BatchCounts | None  #: size of U; None for an update that was not made from a batch
    mode: str  #: how the first order was taken: "forward" or "reverse"
    environment: Json = field(default_factory=dict)  #: versions, device, threads, precision
    timings: dict[str, float] = field(default_factory=dict)  #: seconds by phase
    checks: tuple[str, ...] = ()  #: what was found out about the copy of the module that was measured
