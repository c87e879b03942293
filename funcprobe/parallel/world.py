"""The processes that share a measurement: the rows that each of them runs, and how they put results together.

Parameters lie whole in every process, and so do E and U, which are small. A pass runs a process's own rows; then the
scores of all rows are gathered, in float64, and every process makes the same numbers of them. A gradient is summed
once, after the backward passes. No collective runs inside a transform, but those of leaves that lie in parts (see
`shards`). torch.distributed does the work; a process alone is a world of one, on the same path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from funcprobe.errors import ParallelError
from funcprobe.types import Params, Rollouts

#: Entries of a gradient that are summed in one collective.
BUCKET = 2**24


@dataclass(frozen=True)
class World:
    """The processes that share a measurement, and which of them this one is."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def shares(self, rollouts: Rollouts) -> list[Tensor]:
        """Return the rows of a batch that each process runs: every one has some of the long and of the short.

        Example:
            >>> from funcprobe.data.rollouts import rollouts_from_lists
            >>> batch = rollouts_from_lists([[1]] * 3, [[2], [2, 3, 4], [2, 3]], temperature=1.0)
            >>> World(0, 2).shares(batch)
            [tensor([0, 1]), tensor([2])]
        """
        order = rollouts.attention_mask.sum(1).argsort(descending=True, stable=True)
        return [order[rank :: self.size].sort().values for rank in range(self.size)]

    def gathered(self, own: Tensor, shares: Sequence[Tensor]) -> Tensor:
        """Return `[F, B, T]` of a whole batch from `[F, n, T]` of the rows of every process, bit for bit."""
        most = max(len(rows) for rows in shares)
        padded = own.new_zeros(own.shape[0], most, own.shape[2])
        padded[:, : own.shape[1]] = own
        found = [torch.empty_like(padded) for _ in shares]
        with _answered(self):
            dist.all_gather(found, padded)
        whole = own.new_empty(own.shape[0], sum(len(rows) for rows in shares), own.shape[2])
        for rows, part in zip(shares, found, strict=True):
            whole[:, rows.to(whole.device)] = part[:, : len(rows)]
        return whole

    def summed(self, own: Params, params: Params, device: torch.device | str | None = None) -> Params:
        """Return the sum over processes of leaves, of which each may lack some; those that all lack stay away.

        The sum has the same bits in every process. `device` is where the leaves lie, by default that of the parameters.
        """
        if self.size == 1:
            return own
        there = torch.tensor([int(name in own) for name in params], device=self.device)
        with _answered(self):
            dist.all_reduce(there, op=dist.ReduceOp.MAX)
        reached = [name for name, some in zip(params, there.tolist(), strict=True) if some]
        total = {n: own[n] if n in own else torch.zeros_like(params[n], device=device) for n in reached}
        for names in _buckets(total):
            flat = torch.cat([total[name].reshape(-1) for name in names])
            with _answered(self):
                dist.all_reduce(flat)
            pieces = flat.split([total[name].numel() for name in names])
            total |= {name: piece.view(total[name].shape) for name, piece in zip(names, pieces, strict=True)}
        return total

    def sum_of(self, x: Tensor) -> Tensor:
        """Return the sum over processes of a small tensor."""
        if self.size == 1:
            return x
        total = x.detach().clone()
        with _answered(self):
            dist.all_reduce(total)
        return total

    def stacked(self, x: Tensor) -> Tensor:
        """Return the small tensors `[...]` of all processes, `[N, ...]`, by rank."""
        if self.size == 1:
            return x.unsqueeze(0)
        own = x.detach().to(self.device).contiguous()
        found = own.new_empty(self.size, *own.shape)
        with _answered(self):
            dist.all_gather(list(found.unbind(0)), own)
        return found.to(x.device)

    def any_of(self, flag: bool) -> bool:
        """Return whether something holds in some process."""
        return flag if self.size == 1 else bool(self.sum_of(torch.tensor(int(flag), device=self.device)))

    def all_of(self, thing: Any) -> list[Any]:
        """Return the things that every process brings, by rank."""
        if self.size == 1:
            return [thing]
        found: list[Any] = [None] * self.size
        with _answered(self):
            dist.all_gather_object(found, thing)
        return found

    @property
    def device(self) -> torch.device:
        """Where tensors have to lie that this world passes on, if nothing else decides it."""
        alone = dist.get_backend() == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if alone else torch.device("cpu")


#: A process alone.
ALONE = World()


def world() -> World:
    """Return the processes of the default group of torch.distributed, or this one alone where there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    return World(dist.get_rank(), dist.get_world_size())


@contextmanager
def _answered(own: World) -> Iterator[None]:
    """Let a collective that another process left open end in one sentence.

    Raises:
        ParallelError: In place of what torch says.
    """
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        lost = ParallelError(
            f"Another of the {own.size} processes has ended or did not answer in time, so process {own.rank} ends too; "
            "see what that one says."
        )
        lost.is_shared = True  # nobody is left to agree with
        raise lost from error


def _buckets(leaves: Params) -> Iterator[list[str]]:
    """Yield the names of leaves that are summed together: of one dtype and device, and not too many entries."""
    names: list[str] = []
    for name, leaf in leaves.items():
        last = leaves[names[-1]] if names else leaf
        full = sum(leaves[n].numel() for n in names) + leaf.numel() > BUCKET
        if names and (full or (leaf.dtype, leaf.device) != (last.dtype, last.device)):
            yield names
            names = []
        names.append(name)
    if names:
        yield names
