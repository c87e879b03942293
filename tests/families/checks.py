"""What is asked of every model. A check returns, or raises: a refusal of ours, or `Wrong` with what was found."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import funcprobe as fp
from funcprobe import engine, tree
from funcprobe.data.rollouts import take
from funcprobe.engine import batches
from funcprobe.errors import FuncprobeError
from funcprobe.types import Params
from tests.families.arithmetic import Wide, coarsest
from tests.families.building import VOCABULARY
from tests.families.snapshot import Snapshot

PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [5, 0, 7], [40]]  # 0 is the padding row of embeddings that have one
TEMPERATURE = 0.8


#: Of a finite difference, in units of Δθ: its fourth power, which truncation is of, is beyond float64.
STEP = 1e-4


class Wrong(AssertionError):
    """A number, or a module, is not as it should be."""


def rollouts(seed: int, rows: int = 12) -> fp.Rollouts:
    """Return rows of 3 to 10 tokens, three to a prompt, with rewards."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 6, (rows,), generator=draw).tolist()
    return fp.rollouts_from_lists(
        [PROMPTS[row % len(PROMPTS)] for row in range(rows)],
        [torch.randint(0, VOCABULARY, (length,), generator=draw).tolist() for length in lengths],
        temperature=TEMPERATURE,
        rewards=torch.randn(rows, generator=draw, dtype=torch.float64).tolist(),
        vocab_size=VOCABULARY,
    )


@dataclass(frozen=True)
class Case:
    """A model in float64, what it was before anything ran, and the two batches of a step."""

    build: Callable[[torch.dtype], nn.Module]
    module: nn.Module
    evaluation: fp.Rollouts
    batch: fp.Rollouts

    @classmethod
    def of(cls, build: Callable[[torch.dtype], nn.Module]) -> Case:
        """Return the case of a builder."""
        return cls(build, build(torch.float64), rollouts(1), rollouts(2, rows=8))

    @functools.cached_property
    def reference(self) -> nn.Module:
        """A copy, in eval mode, that funcprobe never sees."""
        return copy.deepcopy(self.module).eval()

    @functools.cached_property
    def before(self) -> Snapshot:
        """All that the module is, before anything ran."""
        return Snapshot.of(self.module)

    @functools.cached_property
    def policy_and_params(self) -> tuple[fp.Policy, Params]:
        """The policy, in float64."""
        return fp.from_module(self.module)

    @property
    def policy(self) -> fp.Policy:
        """The policy, in float64."""
        return self.policy_and_params[0]

    @property
    def params(self) -> Params:
        """θ."""
        return self.policy_and_params[1]

    @functools.cached_property
    def eps(self) -> float:
        """Of the coarsest arithmetic inside the float64 model: most norms, gates and rotations are float32."""
        return coarsest(self.reference, self.evaluation.ids[:1])

    @functools.cached_property
    def step(self) -> fp.StepResult:
        """One step, of length 1 in parameter space, where the model is far from linear."""
        made = self.make_step(self.policy)
        raw = made(self.params, made.optimizer.init(self.params), self.batch, lr=1.0)
        return made(
            self.params, made.optimizer.init(self.params), self.batch, lr=self.length / float(tree.norm(raw.delta))
        )

    #: ‖Δθ‖
    length = 0.1

    def make_step(self, policy: fp.Policy) -> Any:
        """Return a step on any policy."""
        return fp.make_step(policy, fp.grpo(), fp.sgd(1.0))

    @property
    def lr(self) -> float:
        """The learning rate of the step."""
        return self.step.info["lr"]

    def probed(self, **options: Any) -> fp.ProbeResult:
        """Return a probe of the step."""
        made = self.make_step(self.policy)
        state = made.optimizer.init(self.params)
        return fp.probe(
            fp.Update.from_step(made, self.params, state, self.batch, lr=self.lr), self.evaluation, bars=None, **options
        )

    @functools.cached_property
    def terms(self) -> float:
        """Σ|∂F/∂θ_i Δθ_i|: what rounding of δF₁ is relative to, since the sum may cancel."""

        def f(s: fp.TokenScores, r: fp.Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
            return fp.entropy()(s, batches.detached(s), r), {}

        found = engine.gradient(f, self.policy, self.params, self.evaluation, as_training=False)
        return float(tree.dot(tree.map_(torch.abs, found.gradient), tree.map_(torch.abs, self.step.delta)))

    @functools.cached_property
    def curvature(self) -> float:
        """Σ|∂F/∂s s̈|/2, over tokens: what rounding of δF₂ is relative to."""
        along = engine.directional(self.policy, self.params, self.step.delta, self.evaluation, order=2)
        assert along.curvatures is not None
        c = engine.cotangents(lambda s: fp.entropy()(s, along.scores, self.evaluation), along.scores)
        return float(engine.fields(engine.each(torch.mul, c, along.curvatures)).abs().sum()) / 2

    @functools.cached_property
    def differences(self) -> tuple[float, float]:
        """F′ along Δθ by finite differences of F, and ½F″ by those of F′, from four points, in float64 throughout.

        The points are so near that no rectifier's kink and no router's jump lies between them; a difference of F that
        is divided twice would be rounding there.
        """
        with Wide():
            F = fp.anchored(fp.entropy(), self.policy, self.evaluation, self.params)
            at = {k: tree.axpy(k * STEP, self.step.delta, self.params) for k in (-2, -1, 1, 2)}
            with torch.no_grad():
                first = _slope({k: float(F(params)) for k, params in at.items()})
            try:
                slopes = {k: float(torch.func.jvp(F, (p,), (self.step.delta,))[1]) for k, p in at.items()}
            except (RuntimeError, FuncprobeError):  # no forward derivative, and no second order that needs this one
                return first, math.nan
        return first, _slope(slopes) / 2

    def rounding(self, of: float) -> float:
        """Return what rounding leaves of a finite difference: twelve times some eps of a value, divided by the step."""
        return 16 * torch.finfo(torch.float64).eps * abs(of) / STEP


def _slope(at: Mapping[int, float]) -> float:
    return (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * STEP)


def by_rows(module: nn.Module, rollouts: fp.Rollouts) -> list[Tensor]:
    """Return the log-probabilities of every row's completion: the module itself, on that row alone."""
    found = []
    with torch.no_grad():
        for row in range(len(rollouts.ids)):
            length, start = int(rollouts.attention_mask[row].sum()), int(rollouts.prompt_lengths[row])
            ids = rollouts.ids[row : row + 1, :length]
            out = module(ids)
            logits = getattr(out, "logits", out)[0, -length:].double()  # prompt tuning puts tokens before them
            logps = (logits / rollouts.temperature[row]).log_softmax(-1)
            found.append(logps[torch.arange(start - 1, length - 1), ids[0, start:]])
    return found


def within(found: float | Tensor, expected: float | Tensor, tolerance: float, what: str) -> None:
    """Hold two numbers, or the largest difference of two tensors, to a tolerance."""
    off = float((torch.as_tensor(found) - torch.as_tensor(expected)).abs().max())
    if not off <= tolerance:  # NaN is not within anything
        raise Wrong(f"{what}: {_said(found)} against {_said(expected)}, off by {off:.2e}, tolerance {tolerance:.2e}")


def _said(x: float | Tensor) -> str:
    return f"{float(x):.6e}" if torch.as_tensor(x).numel() == 1 else f"{torch.as_tensor(x).numel()} values"


#: Rounding of one number by one way of computing it is at most 8 eps of its size (measured at up to 5 on models of a
#: few layers, as in `analysis.expansion`), and two ways are compared.
ROUNDINGS = 16.0


def scores_are_the_modules_own(case: Case) -> None:
    """Alone and beside longer rows, a row has the log-probabilities that the module gives it."""
    together = fp.score(case.policy, case.params, case.evaluation).logp
    expected = by_rows(case.reference, case.evaluation)
    for row, own in enumerate(expected):
        tolerance = ROUNDINGS * case.eps * (1 + float(own.abs().max()))
        within(together[row, : len(own)], own, tolerance, f"row {row} beside others")
        alone = take(case.evaluation, torch.tensor([row]))
        found = fp.score(case.policy, case.params, alone).logp[0, : len(own)]
        within(found, own, tolerance, f"row {row} alone")


def forward_is_reverse(case: Case) -> None:
    """δF₁ by pushing Δθ forward is δF₁ by pulling F back."""
    forward, reverse = case.probed(mode="forward"), case.probed(mode="reverse")
    within(forward.first_order, reverse.first_order, ROUNDINGS * case.eps * case.terms, "forward against reverse")


def first_order_is_a_difference(case: Case) -> None:
    """δF₁ is what a finite difference of F along Δθ gives."""
    result = case.probed()
    within(
        result.first_order,
        case.differences[0],
        ROUNDINGS * case.eps * case.terms + case.rounding(result.before),
        "δF₁ against a difference",
    )


def second_order_is_a_difference(case: Case) -> None:
    """δF₂ is what a finite difference of the second order gives."""
    result = case.probed(order=2)
    assert result.second_order is not None
    tolerance = ROUNDINGS * case.eps * (case.terms + case.curvature) + case.rounding(case.terms)
    within(result.second_order, case.differences[1], tolerance, "δF₂ against a difference")


def attribution_is_complete(case: Case) -> None:
    """The parts of δF₁, three ways, sum to it."""
    made = case.make_step(case.policy)
    state = made.optimizer.init(case.params)
    found = fp.attribute(
        fp.Update.from_step(made, case.params, state, case.batch, lr=case.lr), case.evaluation, bars=None
    )
    # forward over E, reverse over E and forward over U, each rounded by itself
    within(found.completeness_error, 0.0, 4 * ROUNDINGS * case.eps, "completeness error")


def samples_are_scored_as_drawn(case: Case) -> None:
    """Tokens are drawn with the log-probabilities that scoring gives them, from prompts of different lengths."""
    drawn = fp.sample(
        case.policy,
        case.params,
        PROMPTS,
        generator=torch.Generator().manual_seed(3),
        max_new_tokens=5,
        eos_id=None,
        temperature=TEMPERATURE,
        group_size=2,
    )
    assert drawn.sampling_logps is not None
    scored = fp.score(case.policy, case.params, drawn).logp
    tolerance = ROUNDINGS * case.eps * (1 + float(scored.abs().max()))
    within(drawn.sampling_logps, scored, tolerance, "drawn against scored")


def bfloat16_is_the_modules_own(case: Case) -> None:
    """The bfloat16 model is scored as far from float64 as the module itself is, and no further from the module."""
    module = case.build(torch.bfloat16)
    policy, params = fp.from_module(module)
    found = fp.score(policy, params, case.evaluation).logp[case.evaluation.completion_mask]
    own = torch.cat(by_rows(copy.deepcopy(module).eval(), case.evaluation))
    exact = torch.cat(by_rows(case.reference, case.evaluation))
    rounding = _most_of(own - exact)
    within(_most_of(found - exact), 0.0, 2 * rounding, "bfloat16 against float64, root mean square")
    within(_most_of(found - own), 0.0, 2 * rounding, "bfloat16 against the module's own")


def _most_of(errors: Tensor) -> float:
    """Return the root mean square of all errors but the largest tenth.

    A router's near tie goes either way in bfloat16, as kernels and the rows beside it have it, and such a token jumps.
    """
    return float(errors.abs().sort().values[: max(1, 9 * len(errors) // 10)].square().mean().sqrt())


def float32_is_float64(case: Case) -> None:
    """The float32 model, with the kernels that transformers chose for it, has the float64 model's δF₁."""
    policy, params = fp.from_module(case.build(torch.float32))
    made = case.make_step(policy)
    state = made.optimizer.init(params)
    found = fp.probe(fp.Update.from_step(made, params, state, case.batch, lr=case.lr), case.evaluation, bars=None)
    # the weights, the gradient on U, the step and the derivative along it are rounded, each to float32
    tolerance = 4 * ROUNDINGS * torch.finfo(torch.float32).eps * case.terms
    within(found.first_order, case.differences[0], tolerance, f"float32, {found.mode}")


def module_is_untouched(case: Case) -> None:
    """Nothing of the module has changed."""
    if changed := case.before.differences(case.module):
        raise Wrong("changed: " + "; ".join(changed[:5]))


CHECKS: dict[str, Callable[[Case], None]] = {
    "score": scores_are_the_modules_own,
    "forward = reverse": forward_is_reverse,
    "first order": first_order_is_a_difference,
    "second order": second_order_is_a_difference,
    "attribution": attribution_is_complete,
    "sample": samples_are_scored_as_drawn,
    "bfloat16": bfloat16_is_the_modules_own,
    "float32": float32_is_float64,
    "untouched": module_is_untouched,
}
