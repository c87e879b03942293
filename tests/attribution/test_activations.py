"""Activation differences are the distances between hidden states, one token at a time."""

from __future__ import annotations

import pytest
import torch

from funcprobe import tree
from funcprobe.attribution.activations import activation_differences
from funcprobe.attribution.rankings import rankings
from funcprobe.attribution.step_parts import StepParts
from tests.cases.probes import Case, U


def slow(case: Case, after: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the distances from prefixes that are run one by one, without padding: no state is indexed."""
    found = torch.zeros(U.completion_mask.shape, dtype=torch.float64)
    for row, position in U.completion_mask.nonzero().tolist():
        prefix = U.ids[row : row + 1, : int(U.prompt_lengths[row]) + position]
        whole = torch.ones_like(prefix, dtype=torch.bool)
        h, moved = (case.policy.features(at, prefix, whole)[0, -1].double() for at in (case.params, after))
        found[row, position] = (moved - h).square().sum().sqrt()
    return found


@pytest.mark.parametrize("model", ["two lines", "gpt2"])
@pytest.mark.parametrize("microbatch", [None, 5])
def test_it_is_the_distance_of_the_states_that_tokens_are_drawn_from(model: str, microbatch: int | None) -> None:
    case = Case(model)
    after = dict(case.update(lr=0.1).take().params)
    found = activation_differences(case.policy, case.params, after, U, microbatch)
    # the same states up to the order of float64 sums in the model, beside differences of 1e-2 and more
    torch.testing.assert_close(found, slow(case, after), rtol=1e-9, atol=1e-12)
    assert bool((found[U.completion_mask] > 0).all())
    assert not bool(found[~U.completion_mask].any())
    assert not bool(activation_differences(case.policy, case.params, case.params, U).any())


def test_the_ranking_is_that_of_the_step_as_stored() -> None:
    case = Case()
    update = case.update()
    parts = StepParts.of(update, update.move()[0], None, "additive")
    after = dict(update.take().params)
    expected = activation_differences(case.policy, case.params, after, parts.prepared)
    torch.testing.assert_close(rankings(parts, {}, ["activation"])["activation"], expected, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(tree.add(case.params, parts.delta), after, rtol=1e-12, atol=0.0)
