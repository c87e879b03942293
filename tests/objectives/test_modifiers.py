"""What modifiers do to hand-made scores: every variant against its loop, and the laws that they all keep."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from funcprobe.data.rollouts import take
from funcprobe.errors import FuncprobeWarning, InputError
from funcprobe.objectives.by_name import objective
from funcprobe.objectives.losses import dapo, grpo
from funcprobe.objectives.policy_gradient import PolicyGradient
from funcprobe.objectives.token_selection import ClipCov, KlCov, covariance
from funcprobe.objectives.variants import VARIANTS
from funcprobe.types import TokenScores
from tests.cases.scored import Batch, batch, law, law_of_a_table, masks, seeds
from tests.oracles.variants import OWN, Found, loop_loss, terms_of, value_and_gradient

# Sums of at most 30 terms below 100 in float64: 30 · 100 · 2^-53 < 1e-12.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}

#: (base, its options)
OVER: list[tuple[str, dict[str, Any]]] = [
    ("grpo", {}),
    ("dapo", {"beta": 0.2, "epsilon": 0.1}),
    ("reinforce", {"aggregation": "fixed_length"}),
    ("cispo", {"epsilon_high": 1.1, "beta": 0.1}),
    ("gspo", {"epsilon": 0.1, "epsilon_high": 0.1}),
    ("rloo", {"beta": 0.1}),
]
TABLE = [(name, own, base, options) for name, own in OWN for base, options in OVER]
table = pytest.mark.parametrize(
    ("name", "own", "base", "options"), TABLE, ids=[f"{n}-{'-'.join(map(str, o.values()))}-{b}" for n, o, b, _ in TABLE]
)
alone = pytest.mark.parametrize(("name", "own"), OWN, ids=[f"{n}-{'-'.join(map(str, o.values()))}" for n, o in OWN])

# Several laws cover on purpose what two of the variants caution against.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The rollouts have no old_logps"),
    pytest.mark.filterwarnings("ignore:No advantage is above 0"),
]


def expected(loss: PolicyGradient, case: Batch, base: str) -> Found:
    logp, entropy = case.scores.logp.clone().requires_grad_(), case.scores.entropy.clone().requires_grad_()
    value = loop_loss(loss, base, case.rollouts, logp, entropy)
    value = value + 0 * logp.sum() + 0 * entropy.sum()  # a loss may be constant, and its gradient zero
    return value.detach(), TokenScores(*torch.autograd.grad(value, (logp, entropy)))


def assert_close(found: Found, wanted: Found) -> None:
    torch.testing.assert_close(found[0], wanted[0], **CLOSE)
    for field in ("logp", "entropy"):
        pair = (getattr(found[1], field), getattr(wanted[1], field))
        torch.testing.assert_close(*pair, **CLOSE, msg=lambda m, field=field: f"{field}: {m}")


def assume_untied(loss: PolicyGradient, case: Batch) -> None:
    """Leave out what rounding decides: covariances that tie at the edge of a choice, as those of two tokens do."""
    for m in loss.modifiers:
        terms = terms_of(replace(loss, modifiers=()), case)
        cov = covariance(terms)[terms.counted].sort(descending=True).values
        if isinstance(m, KlCov) and (number := max(1, int(m.kl_cov_ratio * len(cov)))) < len(cov):
            assume(float(cov[number - 1] - cov[number]) > 1e-9)
        if isinstance(m, ClipCov):
            assume(all(float((cov - bound).abs().min()) > 1e-9 for bound in (m.clip_cov_lb, m.clip_cov_ub)))


@table
@given(mask=masks(), seed=seeds, old=st.booleans())
@law_of_a_table
def test_loss_and_gradient_are_those_of_the_loop(
    name: str, own: Any, base: str, options: Any, mask: list[list[bool]], seed: int, old: bool
) -> None:
    loss, case = objective(name, base=base, **own, **options), batch(mask, seed, old=old)
    assume_untied(loss, case)
    assert_close(value_and_gradient(loss, *reversed(case)), expected(loss, case, base))


@given(mask=masks(), seed=seeds, picked=st.permutations([VARIANTS[n] for n in VARIANTS]), number=st.integers(2, 5))
@law
def test_composed_variants_are_those_of_the_loop_in_any_order(
    mask: list[list[bool]], seed: int, picked: list[Any], number: int
) -> None:
    own = {"clip_cov": OWN[1][1], "kl_cov": OWN[4][1], "entropy_bonus": OWN[5][1]}
    case, made, turned = batch(mask, seed), dapo(beta=0.1), dapo(beta=0.1)
    for factory in picked[:number]:
        made = factory(made, **own.get(factory.__name__, {}))
    for factory in reversed(picked[:number]):
        turned = factory(turned, **own.get(factory.__name__, {}))
    assert made.name.count("(") == number
    assume_untied(made, case)
    found = value_and_gradient(made, *reversed(case))
    assert_close(found, expected(made, case, "dapo"))
    assert_close(found, value_and_gradient(turned, *reversed(case)))


@alone
@given(mask=masks(), seed=seeds, order=st.data())
@law
def test_the_order_of_rows_changes_nothing_but_the_draw(
    name: str, own: Any, mask: list[list[bool]], seed: int, order: st.DataObject
) -> None:
    loss, case = objective(name, **own), batch(mask, seed)
    assume_untied(loss, case)
    rows = torch.tensor(order.draw(st.permutations(range(len(mask)))))
    turned = Batch(*(type(x)(*(y[rows] if isinstance(y, Tensor) else y for y in x)) for x in case))
    value, gradient = value_and_gradient(loss, *reversed(case))
    if name != "clip_cov":
        wanted = TokenScores(gradient.logp[rows], gradient.entropy[rows])
        assert_close(value_and_gradient(loss, *reversed(turned)), (value, wanted))
    assert_close(value_and_gradient(loss, *reversed(turned)), expected(loss, turned, "grpo"))


@alone
@given(mask=masks(), seed=seeds, extra=st.integers(1, 3))
@law
def test_padding_changes_nothing(name: str, own: Any, mask: list[list[bool]], seed: int, extra: int) -> None:
    loss, case = objective(name, **own), batch(mask, seed)
    pad = torch.nn.functional.pad
    wide = case.rollouts._replace(
        completion_mask=pad(case.rollouts.completion_mask, (0, extra)),
        old_logps=pad(case.rollouts.old_logps, (0, extra), value=torch.nan),
    )
    scores = TokenScores(*(pad(x, (0, extra)) for x in case.scores[:2]))
    value, gradient = value_and_gradient(loss, *reversed(case))
    wanted = TokenScores(pad(gradient.logp, (0, extra)), pad(gradient.entropy, (0, extra)))
    assert_close(value_and_gradient(loss, scores, wide), (value, wanted))


@alone
@given(mask=masks(), seed=seeds, old=st.booleans(), data=st.data())
@law
def test_a_row_of_weight_zero_is_absent(
    name: str, own: Any, mask: list[list[bool]], seed: int, old: bool, data: st.DataObject
) -> None:
    loss, (rollouts, scores) = objective(name, base="dapo", **own), batch(mask, seed, old=old)
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(mask), max_size=len(mask))))
    assume(bool(rollouts.completion_mask[kept].any()))
    prepared = loss.prepare(rollouts._replace(weight=kept.double()))
    assume_untied(loss, Batch(prepared, scores))
    wild = TokenScores(*(torch.where(kept[:, None], x, 9 * x + 7) for x in scores[:2]))
    value, gradient = value_and_gradient(loss, wild, prepared)
    rest = take(rollouts._replace(advantages=prepared.advantages), kept)
    width = rest.completion_mask.shape[1]
    left = TokenScores(scores.logp[kept, :width], scores.entropy[kept, :width])
    wanted, mine = value_and_gradient(loss, left, loss.prepare(rest))
    assert_close((value, TokenScores(gradient.logp[kept, :width], gradient.entropy[kept, :width])), (wanted, mine))
    assert not bool(gradient.logp[~kept].any())
    assert not bool(gradient.entropy[~kept].any())
    shares = [loss(s, r)[1].get(f"{name}_fraction") for s, r in ((wild, prepared), (left, loss.prepare(rest)))]
    assert shares[0] == shares[1]


@pytest.mark.parametrize("name", ["entropy_bonus", "drop_negatives"])
@given(mask=masks(), seed=seeds, cut=st.data())
@law
def test_a_separable_variant_is_the_sum_of_its_slices(
    name: str, mask: list[list[bool]], seed: int, cut: st.DataObject
) -> None:
    loss, case = objective(name), batch(mask, seed)
    prepared, at = loss.prepare(case.rollouts), cut.draw(st.integers(1, len(mask) - 1))
    parts = torch.zeros((), dtype=torch.float64)
    for rows in (torch.arange(at), torch.arange(at, len(mask))):
        piece = take(prepared, rows)
        width = piece.completion_mask.shape[1]
        parts = parts + loss(TokenScores(*(x[rows, :width] for x in case.scores[:2])), piece)[0]
    torch.testing.assert_close(parts, loss(case.scores, prepared)[0], **CLOSE)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_only_what_looks_at_one_token_is_separable(name: str) -> None:
    assert objective(name).separable == (name in ("entropy_bonus", "drop_negatives"))
    assert not VARIANTS["entropy_bonus"](VARIANTS["clip_cov"]()).separable


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@alone
def test_forward_mode_contracts_the_gradient(name: str, own: Any) -> None:
    loss, case = objective(name, **own), batch([[True, False, True, True], [False] * 4, [True] * 4, [True] * 4], 3)
    rollouts = loss.prepare(case.rollouts)
    along = TokenScores(*(torch.linspace(a, 2, 16).double().view(4, 4) for a in (-1, 1)))
    _, directional = torch.func.jvp(lambda s: loss(s, rollouts)[0], (case.scores,), (along,))
    gradient = value_and_gradient(loss, case.scores, rollouts)[1]
    wanted = (gradient.logp * along.logp).sum() + (gradient.entropy * along.entropy).sum()
    torch.testing.assert_close(directional, wanted, **CLOSE)


def test_a_modifier_sees_terms_of_every_token() -> None:
    case = batch([[True, True, False], [True, False, True]], 5, advantages=torch.tensor([1.0, -2.0]).double())
    for loss in (grpo(), objective("gspo"), objective("reinforce")):
        terms = terms_of(loss, case)
        assert {x.shape for x in terms} == {torch.Size([2, 3])}
        assert all(bool(torch.isfinite(x).all()) for x in terms)
        assert torch.equal(terms.counted, case.rollouts.completion_mask)


def test_drop_negatives_says_when_nothing_is_left() -> None:
    rollouts, scores = batch([[True], [True], [False]], group_ids=torch.zeros(3), rewards=None)
    loss = objective("drop_negatives")
    given = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)  # the last row has no token
    with pytest.warns(FuncprobeWarning, match=r"No advantage is above 0, so drop_negatives leaves no token"):
        prepared = loss.prepare(rollouts._replace(advantages=given))
    assert not bool(value_and_gradient(loss, scores, prepared)[1].logp.any())
    assert float(loss(scores, prepared)[1]["drop_negatives_fraction"]) == 0.5
    loss.prepare(rollouts._replace(advantages=-given[[0, 1, 2]]))


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("entropy_bonus", "the entropy bonus, momentum and weight decay"),
        ("kl_cov", "the KL term, the penalty of kl_cov, momentum and weight decay"),
        ("clip_cov", "step is momentum and weight decay"),
    ],
)
def test_all_advantages_zero_says_what_is_left(name: str, left: str) -> None:
    rollouts, _ = batch([[True]] * 4, rewards=torch.ones(4, dtype=torch.float64))
    with pytest.warns(FuncprobeWarning, match=f"All advantages are zero.*{left} alone"):
        objective(name, beta=0.1 if name == "kl_cov" else 0.0).prepare(rollouts)


def test_info_on_numbers_written_by_hand() -> None:
    advantages = torch.tensor([2.0, -1.0], dtype=torch.float64)
    rollouts, scores = batch([[True, True, False], [True, True, True]], advantages=advantages)
    loss = VARIANTS["drop_negatives"](VARIANTS["top_entropy_quantile"](VARIANTS["entropy_bonus"]()))
    info = loss(scores, rollouts)[1]
    assert float(info["drop_negatives_fraction"]) == pytest.approx(3 / 5)
    assert float(info["top_entropy_quantile_fraction"]) == pytest.approx(4 / 5)  # position 3.2 of 0 to 4: one is kept
    assert "entropy_bonus_fraction" not in info
    assert not any(value.requires_grad for value in info.values())


def test_every_modifier_tells_itself_apart() -> None:
    found = {objective(name, **own) for name, own in OWN}
    assert len(found) == len({repr(loss) for loss in found}) == len(OWN)
    assert repr(objective("entropy_bonus")).endswith("modifiers=(EntropyBonus(entropy_coef=0.001),))")


def test_modifiers_that_are_none_are_refused() -> None:
    with pytest.raises(InputError, match=r"modifiers is \[\]; it must be a tuple of modifiers"):
        replace(grpo(), modifiers=[])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="must be a tuple of modifiers"):
        replace(grpo(), modifiers=(3,))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="kl_cov stands twice; give it once"):
        VARIANTS["kl_cov"](VARIANTS["kl_cov"]())
