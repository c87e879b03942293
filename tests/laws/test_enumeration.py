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
from funcprobe.estimators.divergence import kl
from funcprobe.estimators.observables import Entropy
from funcprobe.types import Observable, Params, Rollouts, TokenScores
from tests.cases import models
from tests.cases.tables import CONTROLLED, OBSERVABLES
from tests.oracles import enumeration

FAMILY = fp.entropy_family()
OTHERS = tuple(OBSERVABLES[name] for name in ("reward", "length", "kl", "kl before"))
by_name = functools.partial(pytest.mark.parametrize, "observable", ids=lambda o: o.name)
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
        with engine.math_attention():  # the kernel that has second derivatives
            here = enumeration.exact(module) | enumeration.divergences(module, copy.deepcopy(module))
            with torch.no_grad():
                there = enumeration.exact(after) | enumeration.divergences(after, module)
            both = {name: enumeration.derivatives(v, module, self.delta) for name, v in here.items()}
        self.before = {name: v.item() for name, v in here.items()}
        self.after = {name: v.item() for name, v in there.items()}
        self.slope = {name: slope for name, (slope, _) in both.items()}
        self.curvature = {name: curvature for name, (_, curvature) in both.items()}
        self.rollouts = enumeration.rollouts(self.probability)
        self.along = engine.directional(self.policy, self.params, self.delta, self.rollouts, order=2)
        self.scores_after = engine.scores(self.policy, fp.tree.add(self.params, self.delta), self.rollouts)

    def truth(self, observable: Observable) -> Tensor:
        """Return [3]: change, first and second derivative."""
        name = quantity(observable)
        values = self.after[name] - self.before[name], self.slope[name], self.curvature[name]
        return torch.tensor(values, dtype=torch.float64)

    def estimate(self, observable: Observable, rollouts: Rollouts, rows: Tensor | None = None) -> Tensor:
        """Return [3]: change, first and second derivative on the given rows of the enumeration; no model is run."""
        rows = torch.arange(len(self.probability)) if rows is None else rows
        along = engine.Directional(*(_take(s, rows) for s in self.along))
        anchor, after = along.scores, _take(self.scores_after, rows)

        def f(scores: TokenScores) -> Tensor:
            return observable(scores, anchor, rollouts)

        slope, curvature = engine.derivative(f, along)[1], engine.second_derivative(f, along)
        return torch.stack([f(after) - f(anchor), slope, curvature])


def quantity(observable: Observable) -> str:
    """Return the name that the oracle has for the estimand."""
    if isinstance(observable, Entropy):
        return observable.per
    return {"expected reward": "reward", "mean length": "length"}.get(observable.name.split("/")[0], observable.name)


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
@by_name(argvalues=FAMILY + OTHERS)
def test_exact_weights_give_exact_values_and_derivatives(build: str, observable: Observable) -> None:
    p = problem(build)
    anchor, rollouts, name = p.along.scores, p.rollouts, quantity(observable)
    truth = p.truth(observable)
    # rounding of some hundred float64 terms, each below the largest of value, slope and curvature
    bound = 1e-12 * max(1.0, abs(p.before["sequence"]), abs(p.slope["sequence"]), float(truth.abs().max()))
    assert abs(float(observable(anchor, anchor, rollouts)) - p.before[name]) <= bound
    assert abs(float(observable(p.scores_after, anchor, rollouts)) - p.after[name]) <= bound
    torch.testing.assert_close(p.estimate(observable, rollouts), truth, rtol=0, atol=bound)
    seen = truth[[0, 2]] if name.startswith("kl") else truth  # so that a vanishing derivative cannot pass
    assert bool((seen.abs() > 1e-3).all()), truth


@by_name(argvalues=[kl("after"), kl("before")])
def test_the_first_order_of_a_divergence_is_zero_and_its_second_the_fisher_form(observable: Observable) -> None:
    p = problem("two lines")
    _, slope, curvature = p.estimate(observable, p.rollouts)
    assert float(slope) == 0.0
    probability = torch.tensor(p.probability, dtype=torch.float64)
    # D²KL = E[(D log p)²], of either divergence; the weights sum to 1 up to some 30 roundings
    fisher = (probability * p.along.tangents.logp.sum(1) ** 2).sum()
    assert math.isclose(float(curvature), float(fisher), rel_tol=1e-13)


def pairs(p: Problem) -> tuple[Rollouts, Tensor]:
    """Return every pair of completions as the two rollouts of one prompt, weighted exactly, and its rows [2 n²]."""
    n = len(p.probability)
    rows = torch.cartesian_prod(torch.arange(n), torch.arange(n)).reshape(-1)
    probability = torch.tensor(p.probability, dtype=torch.float64)
    weight = torch.outer(probability, probability).reshape(-1).repeat_interleave(2)
    groups = torch.arange(n * n).repeat_interleave(2)
    return _sample(p.rollouts, rows)._replace(weight=weight, group_ids=groups), rows


def _sample(rollouts: Rollouts, rows: Tensor) -> Rollouts:
    """Return what observables look at, of the given rows, with weights 1."""
    assert rollouts.rewards is not None
    mask, ones = rollouts.completion_mask[rows], torch.ones(len(rows), dtype=torch.float64)
    return rollouts._replace(completion_mask=mask, rewards=rollouts.rewards[rows], weight=ones)


@by_name(argvalues=CONTROLLED)
def test_a_control_variate_is_exact_on_every_pair_of_completions(observable: Observable) -> None:
    p = problem("two lines")
    truth = p.truth(observable)
    # two thousand float64 terms whose weights sum to 1
    bound = 1e-12 * max(1.0, float(truth.abs().max()))
    torch.testing.assert_close(p.estimate(observable, *pairs(p)), truth, rtol=0, atol=bound)


N, REPLICATIONS, GROUP = 512, 200, 8


@functools.cache
def replications(
    build: str, n: int, count: int, seed: int, family: tuple[Observable, ...] = FAMILY, group: int = GROUP
) -> dict[str, Tensor]:
    """Return [count, 3] (change, first and second derivative) of estimators on fresh samples of n completions.

    Where the estimator compares the rollouts of a prompt, `group` of them count as one prompt's.
    """
    p = problem(build)
    g = torch.Generator().manual_seed(seed)
    probability = torch.tensor(p.probability, dtype=torch.float64)
    drawn = torch.multinomial(probability, n * count, replacement=True, generator=g).view(count, n)
    groups = torch.arange(n) // group

    def one(observable: Observable, rows: Tensor) -> Tensor:
        return p.estimate(observable, _sample(p.rollouts, rows)._replace(group_ids=groups), rows)

    return {o.name: torch.vmap(functools.partial(one, o))(drawn) for o in family}


EVERY = FAMILY + OTHERS + CONTROLLED


@by_name(argvalues=EVERY)
def test_a_sample_is_within_four_standard_errors(observable: Observable) -> None:
    truth = problem("two lines").truth(observable)
    values = replications("two lines", N, REPLICATIONS, seed=11, family=EVERY)[observable.name]
    error = values.std(0)
    one = values[0]  # the first sample: N and the seed were fixed beforehand
    rounding = 1e-14  # the slope of a divergence is 0 without any error; the oracle's is a sum of 30 terms below 1
    assert bool(((one - truth).abs() <= 4 * error + rounding).all()), (one, truth, error)
    # O(1/N) bias of self-normalisation is far below the error of one sample; the mean over replications shows both
    bound = 4 * error / math.sqrt(REPLICATIONS) + 4 * truth.abs() / N + rounding
    assert bool(((values.mean(0) - truth).abs() <= bound).all()), (values.mean(0), truth, bound)


def test_rao_blackwell_per_decision_has_the_smallest_error() -> None:
    values = replications("two lines", N, REPLICATIONS, seed=11, family=EVERY)
    spread = {o.name: float(values[o.name][:, 1].std()) for o in FAMILY}
    assert min(spread, key=spread.get) in ("rao_blackwell/per_decision/token", "rao_blackwell/per_decision/sequence")


@pytest.mark.parametrize("control_variate", [False, True])
def test_sequence_snis_shrinks_its_score_part_by_one_over_n_and_a_control_variate_does_not(
    control_variate: bool,
) -> None:
    p, n, count = problem("two lines"), 3, 40_000
    observable = fp.entropy("rao_blackwell", "sequence", "sequence", control_variate=control_variate)
    values = replications("two lines", n, count, seed=12, family=(observable,), group=n)[observable.name][:, 1]
    anchor, tangent = p.along.scores, p.along.tangents
    probability = torch.tensor(p.probability, dtype=torch.float64)
    score_part = float((probability * anchor.entropy.sum(1) * tangent.logp.sum(1)).sum())
    own_part = float((probability * tangent.entropy.sum(1)).sum())
    assert math.isclose(score_part + own_part, p.slope["sequence"], rel_tol=1e-12)
    error = float(values.std()) / math.sqrt(count)
    expected = (1 if control_variate else 1 - 1 / n) * score_part + own_part
    assert abs(float(values.mean()) - expected) <= 4 * error
    assert abs(score_part / n) > 5 * error  # so that the other factor would be seen


def test_weights_of_zero_are_absent_rows() -> None:
    p = problem("two lines")
    kept = torch.rand(len(p.probability), generator=torch.Generator().manual_seed(4)) > 0.4
    weight = p.rollouts.weight * kept
    rows = kept.nonzero().squeeze(1)
    fewer: Params = {"mask": p.rollouts.completion_mask[rows], "weight": weight[rows]}
    smaller = p.rollouts._replace(completion_mask=fewer["mask"], weight=fewer["weight"])
    smaller = smaller._replace(rewards=p.rollouts.rewards[rows], group_ids=p.rollouts.group_ids[rows])
    for observable in EVERY:
        whole = p.estimate(observable, p.rollouts._replace(weight=weight))
        part = p.estimate(observable, smaller, rows)
        torch.testing.assert_close(whole, part, rtol=1e-12, atol=1e-14)
