"""Single entries that carry rows: found by leaf on a made-up step, and nothing said where none does."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch

import funcprobe as fp
from funcprobe.attribution.conditioning import Concentration, cautions
from funcprobe.errors import FuncprobeWarning
from funcprobe.types import OptState
from tests.cases.probes import Case, E, U

LEAF = "head.weight"


@functools.cache
def case() -> Case:
    return Case(optimizer=fp.adamw(1e-3, eps=1e-12))


def state(without: tuple[str, tuple[int, ...]] | None) -> OptState:
    """Return a state whose second moments are 1 everywhere, but for one entry, where there was none."""
    own = {
        name: {**s, "exp_avg": torch.zeros_like(s["exp_avg"]), "exp_avg_sq": torch.ones_like(s["exp_avg_sq"])}
        for name, s in case().state.items()
    }
    if without is not None:
        leaf, place = without
        own[leaf]["exp_avg_sq"][place] = 0.0
    return own


def attributed(own: OptState, form: str = "additive") -> fp.Attribution:
    return fp.attribute(case().update(state=own), E, form=form, bars=None)


def smallest_entry() -> tuple[int, ...]:
    """Return the entry of a leaf in which the gradients of U cancel most, of those that have one."""
    g = case().update().gradient().gradient[LEAF]
    assert g is not None
    flat = torch.where(g == 0, torch.inf, g.abs())
    return tuple(int(i) for i in torch.unravel_index(flat.argmin(), g.shape))


def test_an_entry_that_outweighs_all_others_is_named_by_its_leaf() -> None:
    with pytest.warns(FuncprobeWarning, match=rf"One entry of {LEAF} carries \d+ % of the parts of sequence \d+ of U"):
        result = attributed(state((LEAF, smallest_entry())))
    worst = max(result.concentrations, key=lambda row: row.share)
    assert worst.leaf == LEAF
    assert worst.share > 0.9
    # the three sequences that contribute most, in order
    total = result.batch.total.sum(1).abs()
    assert [row.sequence for row in result.concentrations] == total.argsort(descending=True)[:3].tolist()
    assert any(note.kind == "conditioning" and "form='jacobian'" in note for note in result.probe.outcome.warnings)
    assert "largest entry of a sequence" in result.summary()
    # completeness does not see it, Σ|tokens| does
    plain = attributed(state(None))
    assert result.completeness_error < 1e-9
    assert result.cancellation > 10 * plain.cancellation


def test_the_jacobian_form_is_better_conditioned_there() -> None:
    own = state((LEAF, smallest_entry()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FuncprobeWarning)
        additive, jacobian = (attributed(own, form) for form in ("additive", "jacobian"))
    assert max(row.share for row in jacobian.concentrations) < 0.5 < max(row.share for row in additive.concentrations)


def test_nothing_is_said_where_no_entry_outweighs_the_others() -> None:
    result = attributed(state(None))
    assert max(row.share for row in result.concentrations) < 0.5
    assert not any(note.kind == "conditioning" for note in result.probe.outcome.warnings)


def test_the_share_is_that_of_all_entries_of_all_leaves() -> None:
    """By hand, with SGD, whose scale is one number: ∇F ⊙ the gradient of one row, entry by entry."""
    c = Case(optimizer=fp.sgd(1e-2))
    c.step = fp.make_step(c.policy, fp.grpo(), c.optimizer)
    result = fp.attribute(c.update(), E, bars=None)
    leaves = {name: p.detach().requires_grad_() for name, p in c.params.items()}
    F = fp.anchored(fp.entropy(), c.policy, E, c.params)
    of_f = torch.autograd.grad(F(leaves), list(leaves.values()))
    prepared = fp.grpo().prepare(U)
    anchor = fp.engine.detached(fp.score(c.policy, c.params, prepared))
    weights = fp.engine.cotangents(lambda s: fp.grpo()(s, prepared)[0], anchor).logp
    row = result.concentrations[0]
    loss = (weights * fp.score(c.policy, leaves, prepared).logp)[row.sequence].sum()
    products = [(a * b).abs() for a, b in zip(of_f, torch.autograd.grad(loss, list(leaves.values())), strict=True)]
    largest = [float(x.max()) for x in products]
    assert row.share == pytest.approx(max(largest) / sum(float(x.sum()) for x in products), rel=1e-9)
    assert row.leaf == list(leaves)[largest.index(max(largest))]


def test_words_for_either_form() -> None:
    found = (Concentration(4, "w", 0.94), Concentration(1, "w", 0.2))
    (note,) = cautions(found, "additive")
    assert "94 % of the parts of sequence 4" in note
    assert "for 1 of the 2 sequences" in note
    (note,) = cautions(found, "jacobian")
    assert "no other form" in note
    assert list(cautions((), "additive")) == []
