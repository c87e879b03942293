"""Every estimator against enumeration: exact on exact weights, and within its standard error on samples."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from torch import Tensor

import funcprobe as fp
from funcprobe import engine
from funcprobe.types import Params, Rollouts, TokenScores
from tests import models
from tests.oracles import enumeration

FAMILY = fp.entropy_family()
by_name = pytest.mark.parametrize("observable", FAMILY, ids=lambda o: o.name)
SEED, STEP = 0, 0.3  # large enough that the weights matter: the ESS falls to about .8


class Problem:
    """An enumerable policy, a direction, and what is exactly true about them."""

    def __init__(self, build: str) -> None:
        make = {"two lines": models.two_lines, "gpt2": models.gpt2}[build]
        module = make() if build == "two lines" else models.gpt2(vocabulary=enumeration.SYMBOLS)
        if build == "two lines":
            module.embed, module.head = _shrunk()
        module.eval()  # the oracle runs the module itself, dropout and all
        self.policy, self.params = fp.from_module(module)
        self.delta = models.direction(self.params, STEP if build == "two lines" else STEP / 10, seed=SEED)
        after = copy.deepcopy(module)
        with torch.no_grad():
            for name, leaf in after.named_parameters():
                leaf.add_(self.delta[name])
        self.probability = enumeration.probabilities(module)
        self.before = {per: v.item() for per, v in enumeration.exact(module).items()}
        self.after = {per: v.item() for per, v in enumeration.exact(after).items()}
        self.slope = {
            per: enumeration.directional(lambda per=per: enumeration.exact(module)[per], module, self.delta)
            for per in ("token", "sequence")
        }
        self.rollouts = enumeration.rollouts(self.probability)
        self.along = engine.directional(self.policy, self.params, self.delta, self.rollouts)
        self.scores_after = engine.scores(self.policy, fp.tree.add(self.params, self.delta), self.rollouts)

    def estimate(self, observable: fp.entropy, rollouts: Rollouts, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (measured change, first order) on the given rows of the enumeration; no model is run."""
        rows = torch.arange(len(self.probability)) if rows is None else rows
        anchor, after, tangent = (_take(s, rows) for s in (self.along.scores, self.scores_after, self.along.tangents))
        change = observable(after, anchor, rollouts) - observable(anchor, anchor, rollouts)
        along = engine.Directional(anchor, tangent)
        return change, engine.derivative(lambda s: observable(s, anchor, rollouts), along)[1]


def _shrunk() -> tuple[torch.nn.Module, torch.nn.Module]:
    with models.seeded(8):
        n = enumeration.SYMBOLS
        return torch.nn.Embedding(n, 5).double(), torch.nn.Linear(5, n).double()


def _take(scores: TokenScores, rows: Tensor) -> TokenScores:
    return TokenScores(scores.logp[rows], scores.entropy[rows], {})


@functools.cache
def problem(build: str) -> Problem:
    return Problem(build)


def test_the_enumeration_is_a_distribution() -> None:
    assert math.isclose(sum(problem("two lines").probability), 1.0, rel_tol=1e-14)


@pytest.mark.parametrize("build", ["two lines", "gpt2"])
@by_name
def test_exact_weights_give_exact_values_and_derivatives(build: str, observable: fp.entropy) -> None:
    p = problem(build)
    anchor, rollouts = p.along.scores, p.rollouts
    # rounding of some hundred float64 terms, each below max(|F|, |slope|)
    bound = 1e-12 * max(1.0, abs(p.before["sequence"]), abs(p.slope["sequence"]))
    assert abs(float(observable(anchor, anchor, rollouts)) - p.before[observable.per]) <= bound
    assert abs(float(observable(p.scores_after, anchor, rollouts)) - p.after[observable.per]) <= bound
    change, slope = p.estimate(observable, rollouts)
    assert abs(float(change) - (p.after[observable.per] - p.before[observable.per])) <= bound
    assert abs(float(slope) - p.slope[observable.per]) <= bound
    assert abs(p.slope[observable.per]) > 1e-3  # so that a vanishing derivative cannot pass


N, REPLICATIONS = 512, 400


@functools.cache
def replications(
    build: str, n: int, count: int, seed: int, family: tuple[fp.entropy, ...] = FAMILY
) -> dict[str, Tensor]:
    """Return [count, 2] (change, first order) of estimators on fresh samples of n completions."""
    p = problem(build)
    g = torch.Generator().manual_seed(seed)
    probability = torch.tensor(p.probability, dtype=torch.float64)
    drawn = torch.multinomial(probability, n * count, replacement=True, generator=g).view(count, n)

    def one(observable: fp.entropy, rows: Tensor) -> Tensor:
        mask = p.rollouts.completion_mask[rows]
        sample = p.rollouts._replace(completion_mask=mask, weight=torch.ones(n, dtype=torch.float64))
        return torch.stack(p.estimate(observable, sample, rows))

    return {o.name: torch.vmap(functools.partial(one, o))(drawn) for o in family}


@by_name
def test_a_sample_is_within_four_standard_errors(observable: fp.entropy) -> None:
    p = problem("two lines")
    values = replications("two lines", N, REPLICATIONS, seed=11)[observable.name]
    error = values.std(0)
    truth = torch.tensor([p.after[observable.per] - p.before[observable.per], p.slope[observable.per]])
    one = values[0]  # the first sample: N and the seed were fixed beforehand
    assert bool(((one - truth).abs() <= 4 * error).all()), (one, truth, error)
    # O(1/N) bias of self-normalisation is far below the error of one sample; the mean over replications shows both
    assert bool(((values.mean(0) - truth).abs() <= 4 * error / math.sqrt(REPLICATIONS) + 4 * truth.abs() / N).all())


def test_rao_blackwell_per_decision_has_the_smallest_error() -> None:
    spread = {name: float(v[:, 1].std()) for name, v in replications("two lines", N, REPLICATIONS, seed=11).items()}
    assert min(spread, key=spread.get) in ("rao_blackwell/per_decision/token", "rao_blackwell/per_decision/sequence")


def test_sequence_snis_shrinks_its_score_part_by_one_over_n() -> None:
    p, n, count = problem("two lines"), 3, 40_000
    observable = fp.entropy("rao_blackwell", "sequence", "sequence")
    values = replications("two lines", n, count, seed=12, family=(observable,))[observable.name][:, 1]
    anchor, tangent = p.along.scores, p.along.tangents
    probability = torch.tensor(p.probability, dtype=torch.float64)
    score_part = float((probability * anchor.entropy.sum(1) * tangent.logp.sum(1)).sum())
    own_part = float((probability * tangent.entropy.sum(1)).sum())
    assert math.isclose(score_part + own_part, p.slope["sequence"], rel_tol=1e-12)
    error = float(values.std()) / math.sqrt(count)
    shrunk = (1 - 1 / n) * score_part + own_part
    assert abs(float(values.mean()) - shrunk) <= 4 * error
    assert abs(score_part / n) > 5 * error  # so that forgetting the factor would be seen


def test_weights_of_zero_are_absent_rows() -> None:
    p = problem("two lines")
    kept = torch.rand(len(p.probability), generator=torch.Generator().manual_seed(4)) > 0.4
    weight = p.rollouts.weight * kept
    rows = kept.nonzero().squeeze(1)
    fewer: Params = {"mask": p.rollouts.completion_mask[rows], "weight": weight[rows]}
    smaller = p.rollouts._replace(completion_mask=fewer["mask"], weight=fewer["weight"])
    for observable in FAMILY:
        whole = p.estimate(observable, p.rollouts._replace(weight=weight))
        part = p.estimate(observable, smaller, rows)
        torch.testing.assert_close(torch.stack(whole), torch.stack(part), rtol=1e-12, atol=1e-14)
