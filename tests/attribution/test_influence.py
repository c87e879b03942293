"""The matrix of what every update sequence does to every evaluation sequence, entry by entry and sum by sum."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import funcprobe as fp
from funcprobe import tree
from funcprobe.attribution.influence import Influence
from funcprobe.data.rollouts import take
from funcprobe.errors import InputError, NumericsError
from funcprobe.objectives.variants import top_entropy_quantile
from funcprobe.types import OptimizerResult, OptState, Params
from tests.cases.attributions import Stepped, holed, weighted
from tests.cases.probes import E, U
from tests.cases.tables import FLOAT64, LR
from tests.oracles import attribution as oracle
from tests.oracles import losses

#: Sums of the same products in another order: some hundred roundings, relative to Σ|entries|.
EXACT, NARROW = 1e-11, 1e-4


@functools.cache
def case(model: str = "gpt2", optimizer: str = "adamw", clip: float | None = 0.05) -> Stepped:
    return Stepped(model, "grpo", optimizer, clip)


def matrix_of(stepped: Stepped, by: str = "sequences", **options: Any) -> Tensor:
    found = stepped.attribute(influence=by, **options).influence
    assert isinstance(found, Influence)
    assert found.by == by
    return found.matrix


def off(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, relative to Σ|b|."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().sum())


@pytest.mark.parametrize("model", ["two lines", "gpt2", "padding row, tied"])
def test_entries_are_products_of_gradients_taken_one_at_a_time(model: str) -> None:
    """⟨∇F_i, k · scale ⊙ g_j⟩ with both gradients by plain autograd and AdamW's scale by hand."""
    stepped = case(model)
    module, u = copy.deepcopy(stepped.module).eval(), stepped.batch
    advantage = losses.advantages(u.rewards.tolist(), u.group_ids.tolist(), "group")

    def loss(logp: Tensor, entropy: Tensor) -> Tensor:
        return losses.loss("grpo", logp, u.completion_mask.tolist(), advantage, u.old_logps)

    whole = oracle.gradient(module, u, loss)
    k = oracle.clip(whole, 0.05)
    parts = {n: oracle.adam(p, k * whole[n], stepped.state[n], lr=LR, decay=0.1) for n, p in stepped.params.items()}
    c = oracle.cotangents(fp.entropy(), fp.score(stepped.policy, stepped.params, E), E)
    if model == "padding row, tied":  # torch's backward leaves that row out, and an observable's derivative does not
        module.get_input_embeddings().padding_idx = None

    def of_row(row: int) -> Params:
        alive = oracle.one_row(E, row)
        return oracle.gradient(module, E, lambda logp, h: (c.logp * logp + c.entropy * h).sum(), alive)

    rows = [of_row(row) for row in range(len(E.ids))]
    if model == "padding row, tied":
        module.get_input_embeddings().padding_idx = 2
    columns = [oracle.gradient(module, u, loss, oracle.one_row(u, j)) for j in range(len(u.ids))]
    expected = torch.tensor([[oracle.share(f, parts, k, g) for g in columns] for f in rows], dtype=torch.float64)
    found = stepped.attribute(influence="sequences").influence
    assert found is not None
    assert off(found.matrix, expected) <= EXACT
    some = list(parts)[::2]
    through = [{n: f[n] for n in some} for f in rows]
    chosen = torch.tensor([[oracle.share(f, parts, k, g) for g in columns] for f in through], dtype=torch.float64)
    assert off(matrix_of(stepped, leaves=some), chosen) <= EXACT
    assert found.rows.tolist() == list(range(len(E.ids)))
    assert found.leaves is None
    assert float(expected.abs().max()) < 0.5 * float(expected.abs().sum())  # no one entry hides the others


@pytest.mark.parametrize("form", ["additive", "jacobian"])
@pytest.mark.parametrize("model", ["two lines", "gpt2", "padding row", "qwen2, tied, float32", "qwen2, lora, float32"])
def test_columns_sum_to_what_the_update_sequences_contribute(model: str, form: str) -> None:
    options: dict[str, Any] = {"form": form, "evaluation": weighted(holed(E)), "batch": holed(case(model).batch)}
    found = case(model).attribute(influence="sequences", **options)
    assert found.influence is not None
    expected = found.batch.total.sum(1)
    size = float(found.influence.matrix.abs().sum())
    limit = EXACT if model in FLOAT64 else NARROW
    assert float((found.influence.of_batch() - expected).abs().max()) <= limit * size
    assert torch.equal(found.influence.of_batch(), found.influence.matrix.sum(0))
    assert not found.influence.matrix[1].any()  # its base weight is 0
    assert found.influence.matrix[0].any()


def test_rows_of_prompts_are_sums_of_their_sequences() -> None:
    sequences = matrix_of(case())
    found = case().attribute(influence="prompts").influence
    assert found is not None
    assert found.rows.tolist() == sorted(E.group_ids.unique().tolist())
    expected = torch.stack([sequences[E.group_ids == p].sum(0) for p in found.rows])
    assert off(found.matrix, expected) <= EXACT
    # group ids are labels, whatever their order and values
    relabelled = E._replace(group_ids=30 - 5 * E.group_ids)
    other = case().attribute(influence="prompts", evaluation=relabelled).influence
    assert other is not None
    assert other.rows.tolist() == [10, 15, 20, 25, 30]
    assert off(other.matrix, expected.flip(0)) <= EXACT


@pytest.mark.parametrize("model", ["gpt2", "qwen2, lora, float32"])
def test_how_many_gradients_are_held_changes_nothing(model: str) -> None:
    limit = EXACT if model in FLOAT64 else NARROW
    alone = matrix_of(case(model), chunk=1)
    for chunk in (3, 100):
        assert off(matrix_of(case(model), chunk=chunk), alone) <= limit, chunk
    cut = matrix_of(case(model), microbatch=3)
    assert off(cut, alone) <= limit


@pytest.mark.parametrize("form", ["additive", "jacobian"])
def test_chosen_leaves_are_a_direction_that_is_zero_elsewhere(form: str) -> None:
    stepped = case()
    every, chosen = list(stepped.params), list(stepped.params)[::3]
    free = matrix_of(stepped, form=form)
    assert off(matrix_of(stepped, form=form, leaves=every), free) <= EXACT
    named = stepped.attribute(influence="sequences", form=form, leaves=chosen)
    assert named.influence is not None
    assert named.influence.leaves == tuple(chosen)
    by_rule = matrix_of(stepped, form=form, leaves=lambda n: n in chosen)
    assert torch.equal(by_rule, named.influence.matrix)
    rest = matrix_of(stepped, form=form, leaves=[n for n in every if n not in chosen])
    assert off(named.influence.matrix + rest, free) <= EXACT  # what leaves do adds up
    assert off(named.influence.matrix, free) > 1e-3
    # the attribution beside it is that of all leaves
    assert torch.equal(named.batch.total, stepped.attribute(form=form).batch.total)


def test_sequences_that_change_places_take_their_rows_and_columns_along() -> None:
    stepped = case()
    before = matrix_of(stepped)
    g = torch.Generator().manual_seed(3)
    of_e, of_u = torch.randperm(len(E.ids), generator=g), torch.randperm(len(U.ids), generator=g)
    assert off(matrix_of(stepped, evaluation=take(E, of_e)), before[of_e]) <= EXACT
    assert off(matrix_of(stepped, batch=take(stepped.batch, of_u)), before[:, of_u]) <= EXACT


def test_tokens_that_tie_are_picked_for_the_matrix_as_for_the_gradient() -> None:
    objective = top_entropy_quantile("grpo", top_entropy_quantile=0.35)
    for model in ("two lines, float32", "qwen2, tied, float32"):
        found = Stepped(model, objective, "sgd").attribute(influence="prompts")
        assert found.influence is not None
        size = float(found.influence.matrix.abs().sum())
        assert float((found.influence.of_batch() - found.batch.total.sum(1)).abs().max()) <= NARROW * size


def test_the_table_has_a_row_for_every_row_and_a_column_for_every_sequence() -> None:
    for by in ("sequences", "prompts"):
        found = case().attribute(influence=by)
        assert found.influence is not None
        frame = found.to_frame("influence")
        assert list(frame.columns) == [by[:-1], *(f"batch {j}" for j in range(len(U.ids)))]
        assert frame[by[:-1]].tolist() == found.influence.rows.tolist()
        assert (frame.iloc[:, 1:].to_numpy() == found.influence.matrix.numpy()).all()
    with pytest.raises(InputError, match=r"no influence matrix; call attribute\(..., influence='prompts'\)"):
        case().attribute().to_frame("influence")


def test_progress_counts_the_rows() -> None:
    seen: list[tuple[str, int, int]] = []
    case().attribute(influence="sequences", chunk=5, progress=lambda *said: seen.append(said))
    assert [said for said in seen if said[0] == "influence"] == [("influence", n, 10) for n in (5, 10)]


def test_what_a_matrix_cannot_be_made_of_is_refused_before_any_pass() -> None:
    calls: list[str] = []

    def asked(**options: Any) -> None:
        case().attribute(progress=lambda what, done, total: calls.append(what), **options)

    with pytest.raises(InputError, match="Unknown influence 'tokens'; expected 'sequences', 'prompts' or None"):
        asked(influence="tokens")
    for chunk in (0, -1, 1.5, True):
        with pytest.raises(InputError, match=rf"chunk is {chunk}; expected a whole number of at least 1"):
            asked(influence="prompts", chunk=chunk)
    with pytest.raises(InputError, match="leaves can do nothing without influence"):
        asked(leaves=["transformer.wte.weight"])
    for nothing in ([], lambda n: "nowhere" in n):
        with pytest.raises(InputError, match="leaves chooses no parameter leaf; expected at least one"):
            asked(influence="prompts", leaves=nothing)
    with pytest.raises(InputError, match="no leaf named 'nowhere'"):
        asked(influence="prompts", leaves=["nowhere"])
    assert calls == []


class Sour:
    """SGD whose derivative is not finite any more after so many calls."""

    lr = LR

    def __init__(self, calls: int) -> None:
        self.left = calls

    def init(self, params: Params) -> OptState:
        return fp.sgd(LR).init(params)

    def apply(self, params: Params, state: OptState, gradient: Params, lr: float | None = None) -> OptimizerResult:
        return fp.sgd(LR).apply(params, state, gradient, lr)

    def vjp(self, params: Params, state: OptState, g: Params, covector: Params, lr: float | None = None) -> Params:
        self.left -= 1
        return tree.scale(-LR if self.left >= 0 else float("nan"), covector)


def test_an_entry_that_is_not_finite_names_its_row() -> None:
    # one call for the attribution itself, three for rows 0, 1 and 2
    with pytest.raises(NumericsError, match="of update sequence 0 on evaluation sequence 3 is not finite"):
        Stepped("two lines", "grpo", Sour(4), cold=True).attribute(influence="sequences")
    with pytest.raises(NumericsError, match="on evaluation prompt 2 is not finite"):
        Stepped("two lines", "grpo", Sour(3), cold=True).attribute(influence="prompts")
