"""Every architecture and every kind of adapter, asked the same: right, or refused as the table has it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcprobe as fp
from funcprobe.types import Params
from tests.cases.models import TwoLines, seeded
from tests.families.building import VOCABULARY
from tests.families.checks import CHECKS, PROMPTS, Case, Wrong
from tests.families.outcomes import Outcome, is_one_sentence, outcomes_of
from tests.families.page import PAGE, page
from tests.families.subjects import SUBJECTS, Subject


def every(subjects: dict[str, Subject]) -> list[Any]:
    """Return the names; those that take longer than a run of all tests has for them are marked."""
    return [
        pytest.param(name, marks=() if subject.quick else pytest.mark.families) for name, subject in subjects.items()
    ]


@pytest.mark.parametrize("name", every(SUBJECTS))
def test_every_check_is_right_or_refused_as_the_table_has_it(name: str) -> None:
    subject = SUBJECTS[name]
    found = outcomes_of(subject.build)
    assert {check: outcome for check, outcome in found.items() if not as_expected(subject, check, outcome)} == {}


def as_expected(subject: Subject, check: str, outcome: Outcome) -> bool:
    """Return whether an outcome is the one in the table."""
    words = subject.refused.get(check)
    return outcome.kind == "right" if words is None else outcome.kind == "refused" and words in outcome.said


def test_the_page_is_what_the_table_says() -> None:
    assert PAGE.read_text() == page(), "docs/families.md is out of date: python -m tests.families.page writes it"


def test_every_name_stands_once_and_the_quick_ones_are_of_every_kind() -> None:
    quick = [subject for subject in SUBJECTS.values() if subject.quick]
    assert 10 <= len(quick) <= 16
    assert any(subject.refused for subject in quick)
    assert all(subject.why for subject in SUBJECTS.values())
    assert all(check in CHECKS for subject in SUBJECTS.values() for check in subject.refused)


class Crooked(torch.autograd.Function):
    """The identity, with a forward derivative that is a little too long."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 1.001 * tangent

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent


class Faulty(TwoLines):
    """A policy in two lines over the table's vocabulary, with a crooked derivative where that is wanted."""

    def __init__(self, dtype: torch.dtype, crooked: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 5), nn.Linear(5, VOCABULARY)
        self.crooked = crooked
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.embed(ids))
        return self.head(Crooked.apply(hidden) if self.crooked else hidden)


def faulty(crooked: bool = False, of_dtype: float = 0.0) -> Callable[[torch.dtype], nn.Module]:
    """Return a builder of it; `of_dtype` is how far another dtype's weights are from the float64 ones."""

    def build(dtype: torch.dtype) -> nn.Module:
        with seeded(4):
            module = Faulty(dtype, crooked)
        with torch.no_grad():
            module.head.weight *= 1.0 if dtype == torch.float64 else 1 + of_dtype
        return module

    return build


def test_a_model_without_fault_is_right_in_everything() -> None:
    assert {outcome.kind for outcome in outcomes_of(faulty()).values()} == {"right"}


@pytest.mark.parametrize("check", ["forward = reverse", "first order", "second order", "attribution"])
def test_a_crooked_derivative_is_seen(check: str) -> None:
    with pytest.raises(Wrong):
        CHECKS[check](Case.of(faulty(crooked=True)))


def test_other_weights_in_another_dtype_are_seen() -> None:
    with pytest.raises(Wrong):
        CHECKS["float32"](Case.of(faulty(of_dtype=0.05)))


@pytest.mark.parametrize(("check", "factor"), [("score", 1 + 1e-9), ("sample", 1 + 1e-9), ("bfloat16", 1.05)])
def test_a_policy_that_is_not_the_module_is_seen(check: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    true = fp.from_module

    def other(module: nn.Module) -> tuple[fp.Policy, Params]:
        policy, params = true(module)

        def decode(params: Params, ids: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
            return factor * policy.features(params, ids, mask)[:, -1], cache

        if check == "sample":
            return dataclasses.replace(policy, decode=decode), params
        return dataclasses.replace(policy, readout=lambda params, h: factor * policy.readout(params, h)), params

    monkeypatch.setattr(fp, "from_module", other)
    with pytest.raises(Wrong):
        CHECKS[check](Case.of(faulty()))


def touch_a_flag(module: nn.Module) -> None:
    module.eval()


def touch_an_entry(module: nn.Module) -> None:
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] += 1e-12


def touch_the_generator(module: nn.Module) -> None:
    torch.rand(1)


def touch_an_attribute(module: nn.Module) -> None:
    module.left_behind = 1  # type: ignore[assignment]


def touch_a_hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


def touch_a_gradient(module: nn.Module) -> None:
    next(module.parameters()).requires_grad_(False)


@pytest.mark.parametrize(
    "touch", [touch_a_flag, touch_an_entry, touch_the_generator, touch_an_attribute, touch_a_hook, touch_a_gradient]
)
def test_whatever_is_left_behind_is_seen(touch: Callable[[nn.Module], None]) -> None:
    case = Case.of(faulty())
    _ = case.before
    touch(case.module)
    with pytest.raises(Wrong, match="changed"):
        CHECKS["untouched"](case)


@pytest.mark.parametrize(
    ("said", "calm"),
    [
        ("The model is an encoder; use a decoder.", True),
        ("RuntimeError: shape mismatch", False),
        ("It fails!\nSee above.", False),
    ],
)
def test_a_refusal_is_one_sentence(said: str, calm: bool) -> None:
    assert is_one_sentence(said) is calm


def test_prompts_differ_in_length_and_hold_the_padding_token() -> None:
    assert len({len(prompt) for prompt in PROMPTS}) == len(PROMPTS)
    assert any(0 in prompt for prompt in PROMPTS)
