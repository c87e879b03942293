"""Tokens that change experts: counted in the passes that are made anyway, and never integrated over."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcprobe as fp
from funcprobe.engine.clock import Clock
from funcprobe.engine.passes import Passes
from funcprobe.errors import FuncprobeWarning, NumericsError
from funcprobe.measurement.routing import Choices, Routing, watched
from funcprobe.types import Params
from tests.cases import models
from tests.cases import routing as cases
from tests.cases.probes import Case, E, U

#: So short a step that a path is wanted for what lies beyond first order, and a distance from the tie that it covers.
SHORT, OFFSET = 1e-8, 1e-12


@functools.cache
def crossing(chooser: str, seed: int = 0, frozen: float | None = None) -> Case:
    """Return a case whose step at `SHORT` sends one token of the vocabulary to another expert.

    With `frozen` the experts do not move, and are of that size.

    An expert that is chosen moves otherwise than one that is not, so a token may shun the tie from both sides.
    """
    choose, count = cases.CHOOSERS.get(chooser, (cases.above_zero, None))
    for token, offset in itertools.product(range(cases.V), (OFFSET, -OFFSET)):
        module = cases.gated(choose, seed)
        if frozen is not None:
            module.experts.requires_grad_(False).mul_(frozen)  # type: ignore[union-attr, operator]
        case = Case(module)
        case.params = cases.near_tie(case.params, token, count, offset)
        # a finite difference across a tie, which tries the copy of a module, is no derivative
        case.policy = dataclasses.replace(case.policy, checks=None)
        after = case.step(case.params, case.state, models.rollouts(9, seed=2), SHORT).params
        if chosen(case.params, count)[token] != chosen(after, count)[token]:
            return case
    raise AssertionError("the step sends no token elsewhere")


def chosen(params: Params, count: int | None) -> list[set[int]]:
    if count is not None:
        return cases.experts_of(params, torch.arange(cases.V), count)
    state = torch.tanh(params["embed.weight"])
    return [{k for k in range(4) if s[k] > 0} for s in (state @ params["gate.weight"].T + params["gate.bias"]).tolist()]


def crossed(case: Case, lr: float = SHORT, **options: Any) -> fp.ProbeResult:
    return case.probe(lr, batch=models.rollouts(9, seed=2), **options)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("chooser", [*cases.CHOOSERS])
def test_tokens_that_change_experts_are_counted(chooser: str, seed: int) -> None:
    case, count = crossing(chooser, seed), cases.CHOOSERS[chooser][1]
    with pytest.warns(FuncprobeWarning, match="sent to other experts"):
        result = crossed(case, microbatch=3, rounding=False)
    after = case.step(case.params, case.state, models.rollouts(9, seed=2), SHORT).params
    ids = cases.seen(E)
    pairs = zip(cases.experts_of(case.params, ids, count), cases.experts_of(after, ids, count), strict=True)
    changed = sum(old != new for old, new in pairs)
    assert changed > 0
    assert result.outcome.routing == Routing(changed, len(ids), 1)
    assert f"{changed} of {len(ids)} ({100 * changed / len(ids):.2f} %)" in result.summary()


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_nothing_changes_where_the_step_is_shorter_than_the_way_to_the_tie(mode: str) -> None:
    result = crossed(crossing("topk"), SHORT * 1e-6, mode=mode)
    assert result.outcome.routing is not None
    assert result.outcome.routing.changed == 0
    assert not result.warnings


def test_a_model_without_experts_has_no_routing() -> None:
    result = Case("gpt2").probe(1e-3)
    assert result.outcome.routing is None
    assert "experts" not in result.summary()


@pytest.mark.parametrize(
    ("chooser", "seed"), [("argmax", 0), ("argmax", 1), ("sort", 0), ("threshold", 0), ("threshold", 1)]
)
@pytest.mark.parametrize("order", [1, 2])
def test_a_jump_is_measured_and_no_path_is_believed(chooser: str, seed: int, order: int) -> None:
    case = crossing(chooser, seed)
    count = cases.CHOOSERS[chooser][1] if chooser in cases.CHOOSERS else None
    after = case.step(case.params, case.state, models.rollouts(9, seed=2), SHORT).params
    # F at θ with the experts that θ′ chooses, minus F: the jump alone
    sets = chosen(after, count)
    table = torch.tensor([[float(k in mine) for k in range(4)] for mine in sets], dtype=torch.float64)
    forced, _ = fp.from_module(Forced(table))
    H = [fp.anchored(fp.entropy(), case.policy, E, case.params), fp.anchored(fp.entropy(), forced, E, case.params)]
    anchor = H[0](case.params)
    scores = fp.score(forced, case.params, E)
    jump = float(fp.entropy()(scores, fp.score(case.policy, case.params, E), E) - anchor)
    # only a second order contradicts a jump that no choice gives away
    silent = chooser == "threshold" and order == 1
    with nullcontext() if silent else pytest.warns(FuncprobeWarning):
        result = crossed(case, order=order)
    assert result.main.method == "difference"
    assert abs(jump) > 1e3 * abs(result.first_order)
    assert result.change == pytest.approx(jump, rel=1e-3)
    assert result.main.float_error is not None
    assert result.main.float_error < 1e-9 * abs(jump)
    # experts are counted; what only two evaluations show is told from their disagreement with a path
    found = (
        "by a difference is not that of a path" if chooser == "threshold" else "tokens of E are sent to other experts"
    )
    assert any(("jumps where tokens change experts" in n) for n in result.notes) == (
        order == 2 and chooser != "threshold"
    )
    with pytest.raises(NumericsError, match=rf"{found}.*F jumps.*use method='auto' or 'difference'\.$"):
        crossed(case, method="path")


class Forced(cases.Gated):
    """A gated policy that sends every token where a table says."""

    def __init__(self, table: Tensor) -> None:
        super().__init__(lambda gate: gate)
        self.double()
        self.table = table

    def forward(self, ids: Tensor) -> Tensor:
        state = torch.tanh(self.embed(ids)) + 0.0 * self.gate(torch.tanh(self.embed(ids))).sum()
        return self.head(state + self.table[ids] @ self.experts)


@pytest.mark.parametrize("chooser", ["argmax", "threshold"])
def test_a_path_that_meets_no_jump_is_taken(chooser: str) -> None:
    result = Case(cases.gated(cases.CHOOSERS.get(chooser, (cases.above_zero,))[0])).probe(SHORT, order=2)
    assert (result.main.method, result.warnings) == ("path", ())


@pytest.mark.parametrize("seed", [0, 1])
def test_a_second_order_that_the_remainder_contradicts_is_warned_of(seed: int) -> None:
    with pytest.warns(FuncprobeWarning, match="is far from δF₂, though the step is small enough"):
        crossed(crossing("threshold", seed), order=2)


class Chooses(nn.Module):
    """A policy that makes one call with the scores `[B, L, 4]` of every token, and does or does not use its indices."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate, self.head, self.call = nn.Embedding(models.VOCABULARY, 4), nn.Linear(4, models.VOCABULARY), call

    def forward(self, ids: Tensor) -> Tensor:
        scores = self.gate(ids)
        return self.head(scores + self.call(scores))


def _at(scores: Tensor, indices: Tensor) -> Tensor:
    return scores.gather(-1, indices).sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("call", "layers"),
    [
        (lambda s: _at(s, s.topk(2).indices), 1),
        (lambda s: _at(s, torch.topk(s, k=2, dim=2)[1]), 1),
        (lambda s: _at(s, torch.topk(input=s, k=1, dim=-1).indices), 1),
        (lambda s: _at(s, s.max(-1, keepdim=True)[1]), 1),
        (lambda s: _at(s, torch.argmax(s, -1).unsqueeze(-1)), 1),
        (lambda s: _at(s, s.flatten(0, 1).argmin(-1).view(*s.shape[:2], 1)), 1),
        (lambda s: _at(s, torch.argsort(s, descending=True)[..., :2]), 1),
        (lambda s: _at(s, s.topk(2)[1]) + _at(s, s.argmax(-1, keepdim=True)), 2),
        (lambda s: _at(s, s.unsqueeze(1).expand(-1, 3, -1, -1).topk(2)[1].select(1, 0)), 1),
        (lambda s: s.topk(2).values.sum(-1, keepdim=True), 0),  # the scores of a group: continuous
        (lambda s: s.max(-1, keepdim=True)[0], 0),
        (lambda s: s - s.amax(-1, keepdim=True) + torch.max(s, 0 * s), 0),
        (lambda s: s.long().sort(-1).indices.gather(-1, s.long().argsort(-1)).to(s.dtype), 0),  # dispatch
    ],
)
@pytest.mark.parametrize("mode", ["scores", "forward", "second order", "several"])
def test_choices_are_what_is_made_of_scores_and_used(call: Callable[[Tensor], Tensor], layers: int, mode: str) -> None:
    with models.seeded(3):
        policy, params = fp.from_module(Chooses(call).double())
    passes = Passes.over(policy, E, {"entropy": fp.entropy()}, 4, None, Clock())
    found = []
    for at in (params, {**params, "gate.weight": params["gate.weight"].flip(-1)}):
        choices, v = Choices(passes), models.direction(params)
        mine = watched(passes, choices)
        if mode == "scores":
            mine.scores(at, "")
        elif mode == "several":
            mine.directional_of_many(at, [v, v], "")
        else:
            mine.directional(at, v, "", order=2 if mode == "second order" else 1)
        found.append(choices)
    before, after = found
    tokens = len(cases.seen(E))
    same, other = before.against(before), before.against(after)
    if not layers:
        assert same is None
        assert other is None
        return
    assert same == Routing(0, tokens, layers)
    assert other is not None
    assert (other.tokens, other.layers) == (tokens, layers)
    assert other.changed > 0


def test_a_choice_that_is_not_one_a_token_changes_all_of_them() -> None:
    def call(scores: Tensor) -> Tensor:
        return scores.flatten().topk(3).values.sum() + scores.flatten()[scores.flatten().topk(3).indices].sum()

    with models.seeded(3):
        policy, params = fp.from_module(Chooses(lambda scores: torch.zeros(())).double())

    def features(at: fp.types.Params, ids: Tensor, mask: Tensor) -> Tensor:  # not causal: from_module would refuse it
        return policy.features(at, ids, mask) + call(at["gate.weight"][ids])

    passes = Passes.over(
        dataclasses.replace(policy, features=features), E, {"entropy": fp.entropy()}, None, None, Clock()
    )
    found = []
    for at in (params, {**params, "gate.weight": params["gate.weight"].flip(-1)}):
        found.append(Choices(passes))
        watched(passes, found[-1]).scores(at, "")
    tokens = len(cases.seen(E))
    assert found[0].against(found[1]) == Routing(tokens, tokens, 1)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_a_mixture_of_transformers_is_watched(name: str, mode: Any) -> None:
    module = cases.mixture(name, experts="eager" if mode == "forward" else None)
    case = Case(module)
    with pytest.warns(FuncprobeWarning):
        result = case.probe(2e-2, mode=mode, ess_threshold=0.0)
    after = case.step(case.params, case.state, U, 2e-2).params
    old, new = (_sets(module, params) for params in (case.params, after))
    changed = sum(a != b for a, b in zip(old, new, strict=True))
    assert changed > 0
    assert result.outcome.routing == Routing(changed, len(old), 2)


def _sets(module: nn.Module, params: Params) -> list[tuple[frozenset[int], ...]]:
    """Return the experts of every token of E, layer by layer, as the model itself reports its routers' scores."""
    found = []
    for row, real in zip(E.ids, E.attention_mask.sum(1).tolist(), strict=True):
        arguments = {"input_ids": row[None, :real], "output_router_logits": True}
        with torch.no_grad():
            out = torch.func.functional_call(module, params, (), arguments)
        layers = [logits.topk(2).indices.tolist() for logits in out.router_logits]
        found += [tuple(frozenset(layer[t]) for layer in layers) for t in range(real - 1)]
    return found


def test_results_and_sweeps_keep_their_routing(tmp_path: Any) -> None:
    case = crossing("topk")
    with pytest.warns(FuncprobeWarning):
        result = crossed(case)
    result.save(tmp_path / "result")
    assert fp.ProbeResult.load(tmp_path / "result").outcome.routing == result.outcome.routing
    with pytest.warns(FuncprobeWarning):
        sweep = case.sweep([SHORT * 1e-6, SHORT], batch=models.rollouts(9, seed=2))
    assert [p.routing.changed for p in sweep.points if p.routing] == [0, result.outcome.routing.changed]  # type: ignore[union-attr]
    sweep.save(tmp_path / "sweep")
    assert [p.routing for p in fp.SweepResult.load(tmp_path / "sweep").points] == [p.routing for p in sweep.points]


def test_a_sweep_of_experts_goes_one_learning_rate_at_a_time() -> None:
    case = crossing("topk")
    lrs, update = [SHORT * 1e-7, SHORT * 1e-6], models.rollouts(9, seed=2)
    alone, together = case.sweep(lrs, batch=update), case.sweep(lrs, batch=update, chunk=2)
    assert [r.change for r in together.readings()] == [r.change for r in alone.readings()]
    assert any("scored one at a time" in note for note in together.notes)
    assert not any("scored one at a time" in note for note in alone.notes)


@pytest.mark.parametrize(
    ("chooser", "note"),
    [("argmax", "because tokens go to experts"), ("threshold", "rates were scored one by one")],
)
def test_no_curve_leads_past_a_jump(chooser: str, note: str) -> None:
    """Tangents on either side of a threshold fit no curve; where they do, two evaluations at its end tell."""
    case, batch = crossing(chooser), models.rollouts(9, seed=2)
    with pytest.warns(FuncprobeWarning) if chooser == "argmax" else nullcontext():
        result = case.curve(SHORT, batch=batch, lrs=[SHORT / 1e6, SHORT], order=1)
    assert (result.nodes, result.reach) == (0, 0.0)
    assert any(note in found for found in result.notes)
    assert [reading.method for reading in result.readings()] == ["difference"] * 2
    # the curve would have had a thousandth of it
    assert abs(result.readings()[1].change) > 1e3 * abs(result.readings()[1].first_order)


def test_a_jump_that_tangents_hardly_show_is_told_at_the_end_of_the_curve() -> None:
    """Experts so small that derivatives are the same on either side, to a millionth; F jumps by about what it moves."""
    case, batch = crossing("threshold", frozen=1e-6), models.rollouts(9, seed=2)
    result = case.curve(SHORT, batch=batch, lrs=[SHORT / 1e6, SHORT], order=1)
    assert result.nodes == 0
    assert any("F jumps on the way" in note for note in result.notes)
    assert abs(result.readings()[1].remainder) > 0.1 * abs(result.readings()[1].first_order)
