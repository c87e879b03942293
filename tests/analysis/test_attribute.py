"""Attribution from outside: nothing touched, every pass counted, a probe's scores enough for E, and faults named."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

import funcprobe as fp
from funcprobe import engine
from funcprobe.attribution.token_parts import token_parts
from funcprobe.errors import ForwardModeError, InputError, NumericsError
from funcprobe.objectives.variants import top_entropy_quantile
from funcprobe.types import OptimizerResult, OptState, Params, Rollouts, TokenScores
from tests.cases import models
from tests.cases.attributions import Stepped
from tests.cases.probes import Case, E, U
from tests.cases.snapshots import snapshot
from tests.cases.tables import LR, OBSERVABLES, Collision, squared
from tests.cases.trees import assert_same, clone


@pytest.mark.parametrize(
    ("model", "optimizer", "form"),
    [
        ("gpt2", "adamw, groups", "additive"),
        ("gpt2", "adam, amsgrad", "jacobian"),
        ("qwen2, lora, float32", "sgd, nesterov", "additive"),
        ("qwen2, lora, float32", fp.from_torch(torch.optim.RMSprop, lr=LR, momentum=0.9), "auto"),
    ],
)
def test_nothing_is_touched(model: str, optimizer: Any, form: str) -> None:
    case = Stepped(model, "grpo, kl", optimizer, 0.05)
    case.module.train()
    for leaf in case.module.parameters():
        leaf.grad = torch.full_like(leaf, 0.5) if leaf.requires_grad else None
    given = {"params": case.params, "state": case.state}
    kept = clone(given)
    batches = {"E": E._asdict(), "U": case.batch._asdict()}
    copies = clone({b: {n: x for n, x in fields.items() if x is not None} for b, fields in batches.items()})
    before = snapshot(case.module)
    case.attribute(form=form, influence="prompts", bars="bootstrap")
    assert_same(snapshot(case.module), before)  # weights, buffers, modes, .grad and the global generator
    assert_same(given, kept)
    for b, fields in batches.items():
        assert_same({n: x for n, x in fields.items() if x is not None}, copies[b], b)
    case.module.eval()
    case.module.zero_grad()


def test_one_attribution_is_another() -> None:
    case = Stepped("gpt2")
    one, two = case.attribute(), case.attribute()
    for of in ("batch", "evaluation"):
        assert torch.equal(getattr(one, of).total, getattr(two, of).total)
    assert one.leaves == two.leaves
    taken = case.step(case.params, case.state, case.batch)
    assert one.probe.outcome.delta_norm == pytest.approx(float(fp.tree.norm(taken.delta)), rel=1e-12)


def counted(step: Any = None, **options: Any) -> tuple[list[str], list[str]]:
    """Return the passes over whole batches, and what the progress was told of."""
    calls: list[str] = []
    told: list[str] = []
    case = Case("two lines").watched(calls)
    own = case.step if step is None else dataclasses.replace(case.step, **step)
    options = {"bars": None, "progress": lambda what, done, total: told.append(what), **options}
    fp.attribute(fp.Update.from_step(own, case.params, case.state, U), E, **options)
    return calls, told


def test_every_pass_is_counted() -> None:
    calls, told = counted()
    assert calls == ["U", "E", "E", "E", "U"]
    assert told == ["gradient", "E, forward mode", "E at θ′", "E, gradient of F", "U, forward mode"]
    # a loss that ranks tokens is asked at the scores of the pass that it is pulled back through, where there is one;
    # cut in two it needs all scores before the first half is pulled back
    ranked, _ = counted({"objective": top_entropy_quantile("grpo")})
    assert sorted(ranked) == ["E"] * 3 + ["U"] * 2
    _, told_of = counted({"objective": top_entropy_quantile("grpo"), "microbatch": 6})
    assert told_of.count("gradient: scores") == told_of.count("gradient") == 2
    # the matrix is made of rows one at a time, and no pass over a whole batch
    calls, told = counted(influence="prompts", chunk=2)
    assert calls == ["U", "E", "E", "E", "U"]
    assert told[5:] == ["influence"] * 3
    # several observables share the passes of one
    calls, _ = counted(observables={"entropy": fp.entropy(), "reward": fp.expected_reward()})
    assert calls == ["U", "E", "E", "E", "U"]
    # cut in two, every pass is two
    assert counted({"microbatch": 6}, microbatch=5)[1] == [what for what in told[:5] for _ in range(2)]


class Recording:
    """An objective that notes the scores it is asked at, by their sum."""

    name, separable, stats = "recording", True, MappingProxyType({})

    def __init__(self) -> None:
        self.own, self.sums = fp.grpo(), []  # type: ignore[var-annotated]

    def prepare(self, rollouts: fp.Rollouts) -> fp.Rollouts:
        return self.own.prepare(rollouts)

    def __call__(self, scores: fp.TokenScores, rollouts: fp.Rollouts) -> Any:
        self.sums.append(float(scores.logp.detach().sum()))
        return self.own(scores, rollouts)


def test_the_loss_is_asked_at_the_scores_of_its_gradient() -> None:
    """In float32 those of another arithmetic differ by rounding; a loss that clips or ranks would pick other tokens."""
    case, objective = Case(models.gpt2(torch.float32)), Recording()
    step = dataclasses.replace(case.step, objective=objective)
    loss = step.loss_gradient(case.params, U)
    objective.sums.clear()
    fp.attribute(fp.Update.from_step(step, case.params, case.state, U, lr=LR), E)
    assert objective.sums[-1] == float(loss.scores.logp.sum())
    v = models.direction(case.params)
    by_math = engine.directional(case.policy, case.params, v, U, order=2).scores  # another attention, another norm
    assert float(by_math.logp.sum()) != objective.sums[-1]


@pytest.mark.parametrize("observable", ["rao_blackwell/per_decision/token", "reward", "collision"])
def test_scores_that_a_probe_kept_give_the_evaluation_parts_without_a_model(observable: str) -> None:
    calls: list[str] = []
    case, wanted = Case("gpt2").watched(calls), OBSERVABLES[observable]
    result = case.probe(LR, observables=wanted, keep_scores=True)
    calls.clear()
    parts = fp.attribute_evaluation(result, wanted)
    assert calls == []
    expected = fp.attribute(fp.Update.from_step(case.step, case.params, case.state, U, lr=LR), E, wanted)
    assert_same(dict(parts.through), dict(expected.evaluation.through))
    assert_same(parts.scores._asdict(), expected.evaluation.scores._asdict())
    assert parts.sum() == pytest.approx(result.first_order, rel=1e-9)
    if observable.startswith("rao"):
        assert_same(dict(fp.attribute_evaluation(result).through), dict(parts.through))
        # and any other observable that the scores will do for
        other = fp.attribute_evaluation(result, fp.mean_length())
        of_length = fp.attribute(fp.Update.from_step(case.step, case.params, case.state, U, lr=LR), E, fp.mean_length())
        assert torch.equal(other.total, of_length.evaluation.total)


def test_a_probe_that_kept_nothing_says_how_to() -> None:
    case = Case("two lines")
    with pytest.raises(InputError, match=r"kept no scores.*probe\(\.\.\., keep_scores=True\), or attribute"):
        fp.attribute_evaluation(case.probe(LR))
    with pytest.raises(InputError, match="made in reverse mode, which keeps no tangents of tokens; use mode='forward'"):
        fp.attribute_evaluation(case.probe(LR, keep_scores=True, mode="reverse"))


def test_the_result_beside_the_parts_is_a_probe() -> None:
    case = Case("two lines")
    observables = {"mine": fp.entropy(), "reward": fp.expected_reward()}
    found = fp.attribute(
        fp.Update.from_step(case.step, case.params, case.state, U), E, observables=observables, order=2
    )
    probed = case.probe(1e-3, observables=observables, order=2)
    for name in observables:
        assert found.probe.readings[name] == probed.readings[name]
    assert (found.observable, found.unit) == ("mine", "nats per token")
    assert found.first_order == probed.first_order
    assert found.probe.delta is None
    with_update = fp.attribute(fp.Update.from_step(case.step, case.params, case.state, U), E, keep_delta=True, top_k=1)
    assert with_update.probe.delta is not None
    assert len(with_update.probe.top) == 1


class Agreeing:
    """A loss of one's own that reads a statistic and no advantages: it lowers how often two draws agree."""

    name, separable = "agreeing", True
    stats: Mapping[str, Any] = {"collision": squared}

    def prepare(self, rollouts: Rollouts) -> Rollouts:
        return rollouts

    def __call__(self, scores: TokenScores, rollouts: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        return (scores.extra["collision"] * rollouts.completion_mask).sum() / 7 + 0.1 * scores.logp.sum(), {}


@pytest.mark.parametrize("form", ["additive", "jacobian"])
def test_an_objective_and_an_observable_of_ones_own(form: str) -> None:
    plain = U._replace(rewards=None)
    case = Stepped("gpt2", Agreeing(), batch=plain, stale=False)  # type: ignore[arg-type]
    found = case.attribute(Collision(), form=form, influence="sequences")
    assert found.completeness_error <= 1e-12
    assert set(found.batch.through) == {"logp", "collision"}
    assert found.batch.predictors == {}
    assert found.influence is not None
    off = (found.influence.of_batch() - found.batch.total.sum(1)).abs().max()
    assert float(off) <= 1e-12 * found.batch.magnitude()


def test_bad_options_are_refused_before_any_pass() -> None:
    told: list[str] = []
    case = Stepped("two lines")

    def asked(**options: Any) -> None:
        case.attribute(progress=lambda what, done, total: told.append(what), **options)

    with pytest.raises(InputError, match="mode is 'reverse', and attribution is made of forward-mode passes"):
        asked(mode="reverse")
    with pytest.raises(InputError, match="Unknown method 'guess'"):
        asked(method="guess")
    with pytest.raises(InputError, match="keep_scores can do nothing in an attribution"):
        asked(keep_scores=True)
    assert told == []
    asked(mode="auto")
    with pytest.raises(InputError, match="Unknown form 'exact'; expected 'auto', 'additive' or 'jacobian'"):
        asked(form="exact")


def test_groups_of_one_are_refused_calmly() -> None:
    alone = U._replace(group_ids=torch.arange(len(U.ids)))
    with pytest.raises(InputError, match=r"Group 0 has a single rollout .* bring at least two rollouts"):
        Stepped("two lines").attribute(batch=alone)
    given = alone._replace(advantages=U.rewards)  # which need no group
    assert Stepped("two lines").attribute(batch=given).completeness_error <= 1e-9


class Hole(torch.autograd.Function):
    """An operation without a forward derivative."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> Tensor:
        return 2 * c


class Holed(torch.nn.Linear):
    """A layer with such an operation."""

    def forward(self, x: Tensor) -> Tensor:
        return Hole.apply(super().forward(x))


def test_a_model_without_a_forward_derivative_is_named_and_sent_on() -> None:
    module = models.TwoLines()
    with models.seeded(3):
        module.head = Holed(5, models.VOCABULARY)
    policy, params = fp.from_module(module.double())
    step = fp.make_step(policy, fp.grpo(), fp.sgd(LR))
    with pytest.raises(
        ForwardModeError, match=r"module 'head' \(Holed\).*probe\(\.\.\., mode='reverse'\) gives δF₁"
    ) as e:
        fp.attribute(fp.Update.from_step(step, params, fp.sgd(LR).init(params), U), E)
    assert 'use mode="reverse"' not in str(e.value)


class Sour:
    """SGD whose derivative is not finite at one row of an embedding, though its step is."""

    lr = LR

    def init(self, params: Params) -> OptState:
        return fp.sgd(LR).init(params)

    def apply(self, params: Params, state: OptState, gradient: Params, lr: float | None = None) -> OptimizerResult:
        return fp.sgd(LR).apply(params, state, gradient, lr)

    def vjp(self, params: Params, state: OptState, g: Params, covector: Params, lr: float | None = None) -> Params:
        found = fp.tree.scale(-LR, covector)
        found["embed.weight"][4] = float("nan")
        return found


def test_a_contribution_that_is_not_finite_names_its_sequences() -> None:
    """Token 4 is what some tokens of U are predicted from, and theirs are the sequences named."""
    starts, width = U.prompt_lengths[:, None] - 1, U.completion_mask.shape[1]
    read = U.ids.gather(1, (starts + torch.arange(width)).clamp(max=U.ids.shape[1] - 1))
    reading = ((read == 4) & U.completion_mask).any(1).nonzero().flatten().tolist()
    assert 1 < len(reading) < len(U.ids)
    listed = ", ".join(map(str, reading[:5])) + (f" and {len(reading) - 5} more" if len(reading) > 5 else "")
    with pytest.raises(NumericsError, match=f"The contributions of update sequence {listed} are not finite; check the"):
        Stepped("two lines", "grpo", Sour(), cold=True).attribute()  # type: ignore[arg-type]


def test_the_batch_of_a_part_that_is_not_finite_is_named() -> None:
    scores = fp.score(Stepped("two lines").policy, Stepped("two lines").params, E)
    along = engine.Directional(scores, engine.each(torch.clone, scores))
    along.tangents.entropy[[0, *range(3, 9)], 1] = float("inf")
    with pytest.raises(NumericsError, match=r"contributions of evaluation sequence 0, 3, 4, 5, 6 and 2 more are not"):
        token_parts(scores, along, E, "evaluation")
    # a field that no observable reads has no part, finite or not
    flat = scores._replace(entropy=torch.zeros_like(scores.entropy))
    assert set(token_parts(flat, along, E, "evaluation").through) == {"logp"}


def test_a_state_that_is_not_finite_is_named_by_the_step() -> None:
    case = Stepped("two lines")
    case.state = clone(case.state)
    case.state["embed.weight"]["exp_avg_sq"][4] = float("nan")
    with pytest.raises(NumericsError, match=r"step Δθ is not finite at 'embed\.weight'.*the optimizer state"):
        case.attribute()
