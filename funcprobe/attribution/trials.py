"""A trial of rankings: drops from either end of them, random drops, prompts left out, random halves of the prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from funcprobe.attribution.counterfactual import Resteps, correlation, rank_correlation
from funcprobe.types import Progress

End = Literal["lowest", "highest"]
ENDS: tuple[End, ...] = ("lowest", "highest")


class Drop(NamedTuple):
    """One re-step without the tokens, or prompts, at one end of a ranking."""

    method: str
    end: End  #: which end of the ranking was dropped
    share: float  #: of the tokens, or prompts, of U
    number: int  #: how many they are
    effect: float  #: ΔF of the re-step minus ΔF of the whole step


class Chance(NamedTuple):
    """The re-steps without as many tokens, or prompts, drawn at random."""

    share: float
    number: int  #: how many they are
    mean: float  #: of the effects
    sd: float  #: standard deviation of one draw; nan of a single one


class Agreement(NamedTuple):
    """How the sum of a method's scores agrees with re-steps; nan where either is constant, or none was made."""

    left_out: float  #: Pearson's correlation of a prompt's score with ΔF − ΔF without it
    datamodel: float  #: Spearman's correlation of score and ΔF over random halves of the prompts


class Trial(NamedTuple):
    """Re-steps of one step, each made once, by the tokens that they drop."""

    resteps: Resteps
    units: Tensor  #: [B, T] int64: the number of the token, or prompt, that is dropped whole; −1 where none counts
    prompts: Tensor  #: [B, T] int64: the number of the prompt of every counted token, −1 elsewhere
    base: float  #: ΔF of the whole step
    known: dict[bytes, float]  #: ΔF by the tokens dropped: rankings that agree share a re-step
    progress: Progress | None

    @classmethod
    def of(cls, resteps: Resteps, dropped: str, progress: Progress | None = None) -> Trial:
        """Return a trial that drops "tokens" or "prompts"."""
        prepared = resteps.parts.prepared
        counted = prepared.completion_mask & (prepared.weight > 0)[:, None]
        number = prepared.group_ids[prepared.weight > 0].unique()
        rows = torch.searchsorted(number, prepared.group_ids).clamp(max=len(number) - 1)
        prompts = torch.where(counted, rows[:, None], -1)
        tokens = torch.where(counted, counted.flatten().cumsum(0).view_as(prompts) - 1, -1)
        units = prompts if dropped == "prompts" else tokens
        return cls(resteps, units, prompts, resteps.change(), {}, progress)

    def drops(self, scores: Mapping[str, Tensor], shares: Sequence[float]) -> tuple[Drop, ...]:
        """Return the effect of dropping every share from both ends of every ranking."""
        found = []
        for name, score in scores.items():
            order = _sums(score, self.units).argsort(stable=True)
            for end in ENDS:
                ranked = order if end == "lowest" else order.flip(0)
                for share in shares:
                    count = _count(share, len(order))
                    found.append(Drop(name, end, share, count, self._effect(ranked[:count])))
            self._report(f"drops by {len(scores)} methods", len({d.method for d in found}), len(scores))
        return tuple(found)

    def chance(self, share: float, draws: int, generator: torch.Generator) -> Chance:
        """Return the effect of random drops of a share."""
        number = int(self.units.max()) + 1
        count = _count(share, number)
        effects = [self._effect(torch.randperm(number, generator=generator)[:count]) for _ in range(draws)]
        found = torch.tensor(effects, dtype=torch.float64)
        return Chance(share, count, float(found.mean()), float(found.std()) if draws > 1 else float("nan"))

    def agreements(
        self, scores: Mapping[str, Tensor], subsets: int, generator: torch.Generator
    ) -> dict[str, Agreement]:
        """Return how sums of scores agree with re-steps without one prompt, and with random halves of the prompts."""
        number = int(self.prompts.max()) + 1
        if subsets == 0 or number < 2:
            return dict.fromkeys(scores, Agreement(float("nan"), float("nan")))
        alone = torch.tensor([self.base - self._change(self.prompts == p) for p in range(number)], dtype=torch.float64)
        self._report("prompts left out", number, number)
        kept = torch.stack([_half(number, generator) for _ in range(subsets)])
        halves = [self._change((self.prompts >= 0) & ~half.to(self.prompts.device)[self.prompts]) for half in kept]
        self._report("halves of the prompts", subsets, subsets)
        actual, found = torch.tensor(halves, dtype=torch.float64), {}
        for name, score in scores.items():
            of_prompts = _sums(score, self.prompts)
            predicted = kept.double() @ of_prompts
            found[name] = Agreement(correlation(of_prompts, alone), rank_correlation(predicted, actual))
        return found

    def _effect(self, dropped: Tensor) -> float:
        return self._change(torch.isin(self.units, dropped.to(self.units.device))) - self.base

    def _change(self, drop: Tensor) -> float:
        key = drop.cpu().numpy().tobytes()
        if key not in self.known:
            self.known[key] = self.resteps.change(drop)
        return self.known[key]

    def _report(self, what: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(what, done, total)


def _sums(score: Tensor, units: Tensor) -> Tensor:
    """Return the sum of scores over every unit, on the CPU in float64."""
    score, units = score.detach().cpu().double(), units.cpu()
    found = torch.zeros(int(units.max()) + 1, dtype=torch.float64)
    return found.index_add(0, units[units >= 0], score[units >= 0])


def _half(number: int, generator: torch.Generator) -> Tensor:
    """Return a random half of so many units, True where it keeps one."""
    kept = torch.zeros(number, dtype=torch.bool)
    kept[torch.randperm(number, generator=generator)[: number // 2]] = True
    return kept


def _count(share: float, number: int) -> int:
    return max(1, round(share * number))
