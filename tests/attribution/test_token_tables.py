"""Tables of contributions: each sums to the whole that it cuts; movers are the extremes; correlations are scipy's."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import funcprobe as fp
from funcprobe.attribution.token_parts import TokenParts
from funcprobe.attribution.token_tables import (
    TOKEN_TABLES,
    completion_ids,
    correlations,
    movers,
    position_columns,
    prompt_columns,
    sequence_columns,
    token_columns,
)
from funcprobe.errors import InputError
from funcprobe.results.parts import TABLES
from funcprobe.types import TokenScores
from tests.cases.attributions import Stepped, holed
from tests.cases.probes import E, U


def parts_of(prompts: list[list[int]], completions: list[list[int]], masks: Any = None, **fields: Any) -> TokenParts:
    """Return parts whose numbers say where they stand: token t of row b contributes b + 1 + t/10 through logp."""
    r = fp.rollouts_from_lists(prompts, completions, temperature=1.0, completion_masks=masks, **fields)
    rows, width = r.completion_mask.shape
    place = torch.arange(1, rows + 1, dtype=torch.float64)[:, None] + torch.arange(width).double() / 10
    place = torch.where(r.completion_mask, place, 0.0)
    return TokenParts(r, TokenScores(-place, 2 * place), {"logp": place, "entropy": -3 * place}, {"cov_pg": 7 * place})


BY_HAND = parts_of(
    [[5, 6], [5], [5, 6]],
    [[11, 12, 13], [21], [31, 32]],
    [[True, False, True], [True], [True, True]],
    rewards=[1.0, 2.0, 4.0],
    group_ids=[7, 3, 7],
)


def test_advantages_of_tokens_stand_by_their_tokens_and_as_means_of_rows() -> None:
    by_token = torch.tensor([[1.0, 9.0, 4.0], [2.0, 9.0, 9.0], [5.0, 6.0, 9.0]], dtype=torch.float64)
    parts = BY_HAND._replace(rollouts=BY_HAND.rollouts._replace(advantages=by_token))
    assert token_columns(parts)["advantage"].tolist() == [1.0, 4.0, 2.0, 5.0, 6.0]  # 9 stands in holes and padding
    assert sequence_columns(parts)["advantage"].tolist() == [2.5, 2.0, 5.5]


def test_tokens_by_hand() -> None:
    found = token_columns(BY_HAND)
    assert found["sequence"].tolist() == [0, 0, 1, 2, 2]
    assert found["prompt"].tolist() == [7, 7, 3, 7, 7]
    assert found["position"].tolist() == [0, 2, 0, 0, 1]
    assert found["token"].tolist() == [11, 13, 21, 31, 32]
    assert found["text"] == ["[11]", "[13]", "[21]", "[31]", "[32]"]
    through = [1.0, 1.2, 2.0, 3.0, 3.1]
    assert found["through_logp"].tolist() == pytest.approx(through)
    assert found["contribution"].tolist() == pytest.approx([-2 * x for x in through])
    assert found["logp"].tolist() == pytest.approx([-x for x in through])
    assert found["entropy"].tolist() == pytest.approx([2 * x for x in through])
    assert found["cov_pg"].tolist() == pytest.approx([7 * x for x in through])
    assert found["reward"].tolist() == [1.0, 1.0, 2.0, 4.0, 4.0]
    assert "advantage" not in found


def test_sequences_prompts_and_positions_by_hand() -> None:
    sequences = sequence_columns(BY_HAND, {11: "a", 13: "b", 21: "c", 31: "d", 32: " e"})
    assert sequences["length"].tolist() == [2, 1, 2]
    assert sequences["through_logp"].tolist() == pytest.approx([2.2, 2.0, 6.1])
    assert sequences["mean_logp"].tolist() == pytest.approx([-1.1, -2.0, -3.05])
    assert sequences["cov_pg"].tolist() == pytest.approx([15.4, 14.0, 42.7])
    assert sequences["text"] == ["ab", "c", "d e"]
    assert sequence_columns(BY_HAND)["text"] == ["[11] [13]", "[21]", "[31] [32]"]
    prompts = prompt_columns(BY_HAND, {5: "What", 6: " now"})
    assert prompts["prompt"].tolist() == [3, 7]
    assert (prompts["sequences"].tolist(), prompts["tokens"].tolist()) == ([1, 2], [1, 4])
    assert prompts["contribution"].tolist() == pytest.approx([-4.0, -16.6])
    assert prompts["mean_entropy"].tolist() == pytest.approx([4.0, 2 * 8.3 / 4])
    assert prompts["mean_reward"].tolist() == [2.0, 2.5]
    assert prompts["text"] == ["What", "What now"]
    positions = position_columns(BY_HAND)
    assert (positions["position"].tolist(), positions["tokens"].tolist()) == ([0, 1, 2], [3, 1, 1])
    assert positions["through_logp"].tolist() == pytest.approx([6.0, 3.1, 1.2])
    assert positions["mean_entropy"].tolist() == pytest.approx([4.0, 6.2, 2.4])


def test_a_position_that_only_holes_have_has_no_row() -> None:
    parts = parts_of([[1], [1]], [[2, 3, 4], [5]], [[True, False, True], [True]])
    assert position_columns(parts)["position"].tolist() == [0, 2]
    assert sequence_columns(parts)["text"] == ["[2] [4]", "[5]"]


def test_ids_past_the_end_of_a_row_are_not_read() -> None:
    r = BY_HAND.rollouts  # what stands in padded columns means nothing
    ids = completion_ids(BY_HAND._replace(rollouts=r._replace(ids=torch.where(r.attention_mask, r.ids, 99))))
    assert ids.tolist() == [[11, 12, 13], [21, 0, 0], [31, 32, 0]]


@functools.cache
def found() -> fp.Attribution:
    return Stepped("gpt2", "grpo, kl", "adamw", batch=holed(U)).attribute(evaluation=holed(E), influence="prompts")


@pytest.mark.parametrize("of", ["batch", "evaluation"])
@pytest.mark.parametrize("table", TOKEN_TABLES)
def test_every_table_sums_to_the_whole(table: str, of: Any) -> None:
    parts = getattr(found(), of)
    frame = found().to_frame(table, of)
    # sums of some forty tokens in another order, relative to Σ|parts|
    assert abs(frame["contribution"].sum() - parts.sum()) <= 1e-14 * parts.magnitude()
    for name, x in parts.through.items():
        assert abs(frame[f"through_{name}"].sum() - float(x.sum())) <= 1e-14 * parts.magnitude()
    ways = frame[[f"through_{name}" for name in parts.through]].sum(axis=1)
    assert np.allclose(frame["contribution"], ways, rtol=1e-13, atol=1e-15 * parts.magnitude())
    counted = {"tokens": len(frame)} if table == "tokens" else frame
    assert np.sum(counted.get("tokens", counted.get("length"))) == int(parts.mask.sum())
    whole = found().first_order if of == "evaluation" else found().ledger["gradient on U"]
    assert abs(frame["contribution"].sum() - whole) <= 1e-12 * parts.magnitude()


@pytest.mark.parametrize("of", ["batch", "evaluation"])
def test_tokens_roll_up_to_every_other_table(of: Any) -> None:
    tokens = found().to_frame("tokens", of)
    for table, key in (("sequences", "sequence"), ("prompts", "prompt"), ("positions", "position")):
        rolled = found().to_frame(table, of).set_index(key)
        expected = tokens.groupby(key)
        assert list(rolled.index) == sorted(tokens[key].unique())
        assert np.allclose(rolled["contribution"], expected["contribution"].sum(), rtol=1e-12, atol=1e-15)
        assert np.allclose(rolled["mean_entropy"], expected["entropy"].mean(), rtol=1e-12)
    sequences = found().to_frame("sequences", of)
    assert np.allclose(
        found().to_frame("prompts", of)["contribution"], sequences.groupby("prompt")["contribution"].sum(), rtol=1e-12
    )
    assert np.allclose(sequences["mean_logp"], tokens.groupby("sequence")["logp"].mean(), rtol=1e-12)
    if of == "batch":  # advantages are those that the objective made of the rewards
        case = Stepped("gpt2", batch=holed(U))
        prepared = fp.grpo(beta=0.3).prepare(case.batch)
        assert sequences["advantage"].tolist() == prepared.advantages.tolist()
        predicted = fp.predict(fp.Update.from_step(case.step, case.params, case.state, prepared, 1e-2))
        for name, x in predicted.tokens.items():
            assert np.allclose(tokens[name], x[prepared.completion_mask], rtol=1e-9, atol=1e-12)
    else:
        assert "advantage" not in tokens
        assert "cov_pg" not in tokens


def test_the_ledger_table_and_tables_that_are_not() -> None:
    ledger = found().to_frame("ledger")
    assert ledger["part"].tolist() == ["gradient on U", "momentum", "weight decay"]
    assert ledger["contribution"].sum() == pytest.approx(found().first_order, rel=1e-9)
    for table in TABLES:
        assert len(found().to_frame(table)) or table == "pairs"
    with pytest.raises(InputError, match=r"no table 'words'; the tables are tokens, sequences, .*, influence"):
        found().to_frame("words")
    with pytest.raises(InputError, match=r"Unknown batch 'both'; expected 'batch' \(U\) or 'evaluation' \(E\)"):
        found().columns("tokens", "both")  # type: ignore[arg-type]


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.integers(0, 14))
def test_movers_are_the_extremes_in_order(values: list[int], count: int) -> None:
    columns = {"contribution": np.array(values, dtype=float), "row": list(range(len(values)))}
    up, down = movers(columns, count)
    for rows, sign in ((up, 1), (down, -1)):
        mine = sorted(((-sign * v, k) for k, v in enumerate(values) if sign * v > 0))[:count]
        assert rows["row"] == [k for _, k in mine]  # of equal ones the earlier
        assert rows["contribution"].tolist() == [values[k] for _, k in mine]
        assert isinstance(rows["contribution"], np.ndarray)


def test_movers_of_an_attribution() -> None:
    up, down = found().movers(3, "sequences")
    ordered = found().to_frame("sequences")["contribution"].sort_values().tolist()
    assert down["contribution"].tolist() == ordered[:3]
    assert up["contribution"].tolist() == ordered[:-4:-1]
    assert list(up.columns) == list(found().to_frame("sequences").columns)
    ups, downs = found().movers(1000, "layers", "evaluation")
    assert len(ups) + len(downs) == len(found().to_frame("layers"))
    for count in (-1, 1.5, True):
        with pytest.raises(InputError, match=rf"count is {count}; expected a whole number of at least 0"):
            found().movers(count)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="A row of the table 'influence' has no one contribution"):
        found().movers(table="influence")


@pytest.mark.parametrize("of", ["batch", "evaluation"])
@pytest.mark.parametrize("table", ["tokens", "sequences"])
def test_correlations_are_those_of_scipy_on_the_frame(table: str, of: Any) -> None:
    frame, correlated = found().to_frame(table, of), found().correlations(table, of).set_index("with")
    wanted = {"tokens": {"logp", "entropy", "position"}, "sequences": {"mean_logp", "mean_entropy", "length", "reward"}}
    assert wanted[table] <= set(correlated.index)
    assert (of == "batch") == ({"advantage", "cov_pg", "cov_npg", "discriminant"} <= set(correlated.index))
    for name, row in correlated.iterrows():
        for kind, theirs in (("pearson", scipy.stats.pearsonr), ("spearman", scipy.stats.spearmanr)):
            assert row[kind] == pytest.approx(theirs(frame["contribution"], frame[name]).statistic, rel=1e-9), name
        assert row["rows"] == len(frame)
    with pytest.raises(InputError, match="Correlations are taken of 'tokens' or 'sequences', and 'layers' was asked"):
        found().correlations("layers")


@given(
    st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=3, max_size=20),
    st.sampled_from([1.0, 1e-170, 1e9]),
)
def test_correlations_know_no_scale(pairs: list[tuple[float, float]], scale: float) -> None:
    x, y = (np.array(v) for v in zip(*pairs, strict=True))
    assume(all(np.ptp(v) > 1e-3 for v in (x, y)))
    got = correlations({"contribution": scale * x, "other": y}, ["other", "absent"])
    assert got["with"] == ["other"]
    # a mean of equal numbers is off by a rounding, and they count against a spread of 1e-3 or more
    assert got["pearson"][0] == pytest.approx(scipy.stats.pearsonr(x, y).statistic, abs=1e-9)


@given(st.floats(-1e3, 1e3), st.integers(1, 60))
def test_nothing_correlates_with_a_constant(value: float, n: int) -> None:
    varied = np.linspace(-1.0, 2.0, n) ** 3
    for columns in (
        {"contribution": varied, "other": np.full(n, value)},
        {"contribution": np.full(n, value), "other": varied},
    ):
        got = correlations(columns, ["other"])
        assert math.isnan(got["pearson"][0])
        assert math.isnan(got["spearman"][0])
