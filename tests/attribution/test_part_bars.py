"""Error bars of parts: each is a derivative along a piece of Δθ, and its bar the jackknife of the contribution."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import funcprobe as fp
from funcprobe.attribution.part_bars import BARRED
from funcprobe.errors import InputError
from tests.cases.probes import Case, E, attributed

#: Float64 models agree to rounding of Σ|terms|; Qwen2 normalises in float32 whatever its dtype (tests/test_stack.py).
EXACT, NARROW = 1e-13, 1e-5


@pytest.mark.parametrize("name", ["two lines", "gpt2", "qwen2, tied", "qwen2, lora"])
@pytest.mark.parametrize("optimizer", [None, fp.sgd(1e-2, momentum=0.9, nesterov=True, weight_decay=0.1)])
def test_what_a_piece_of_the_step_does_is_what_its_row_contributes(name: str, optimizer: Any) -> None:
    """Forward over E along what a part of U moved, against forward over U along what ∇F asks: one is the other."""
    case = Case(name, optimizer)
    tables = [table for table in BARRED if table != "pairs" or "lora" in name]
    found = attributed(case, bars_of=tables)
    assert list(found.bars) == tables
    for table in tables:
        columns = found.columns(table)
        size = math.fsum(map(abs, columns["contribution"])) or 1.0
        assert len(found.bars[table]) == len(columns["contribution"])
        for row, contribution in zip(found.bars[table].values(), columns["contribution"], strict=True):
            assert abs(row.value - contribution) <= (NARROW if "qwen" in name else EXACT) * size, table
            assert row.low <= row.value <= row.high
        assert columns["error"] == [row.error for row in found.bars[table].values()]


@pytest.mark.parametrize("table", ["ledger", "kinds", "prompts"])
def test_a_bar_is_the_jackknife_of_the_contribution(table: str) -> None:
    """By hand: everything attributed again without each prompt of E in turn."""
    case = Case("gpt2")
    found = attributed(case, bars_of=[table], bars="jackknife")
    groups = E.group_ids.unique().tolist()
    left_out = torch.stack(
        [
            torch.as_tensor(
                attributed(case, E._replace(weight=(E.group_ids != g).double())).columns(table)["contribution"],
                dtype=torch.float64,
            )
            for g in groups
        ]
    )
    expected = left_out.std(0, correction=0) * math.sqrt(len(groups) - 1)
    for row, error in zip(found.bars[table].values(), expected.tolist(), strict=True):
        assert row.error == pytest.approx(error, rel=1e-9, abs=1e-15)


def test_rows_that_share_a_pass_are_each_alone() -> None:
    case = Case("gpt2")
    one, three = (attributed(case, bars_of=["layers", "sequences"], chunk=n).bars for n in (1, 3))
    for table, rows in one.items():
        for label, row in rows.items():
            assert three[table][label].error == pytest.approx(row.error, rel=1e-9, abs=1e-15), (table, label)


def test_a_bar_reads_beside_its_contribution_and_is_saved(tmp_path: Path) -> None:
    found = attributed(Case("two lines"), bars_of=["ledger", "layers"], bars="bootstrap", seed=2, level=0.5)
    row = found.bars["ledger"]["momentum"]
    assert row.level == 0.5
    assert f"{found.ledger['momentum']:+.6e} ± {row.error:.1e}" in found.summary()
    again = fp.Attribution.load(found.save(tmp_path / "parts"))
    assert again.bars == found.bars
    modes = {file.stat().st_mode for file in (tmp_path / "parts").iterdir()}
    assert len(modes) == 1, "every file has the permissions of a new file"
    assert again.summary() == found.summary()
    frame = found.to_frame("ledger")
    assert frame.columns.tolist() == ["part", "contribution", "error", "low", "high"]
    assert "error" not in found.to_frame("kinds")
    assert "error" not in attributed(Case("two lines"), bars_of=["prompts"]).to_frame("prompts", of="evaluation")


def test_an_objective_with_an_entropy_term_and_a_padding_row_keep_their_bars() -> None:
    case = Case("gpt2")
    case.step = dataclasses.replace(case.step, objective=fp.entropy_bonus(entropy_coef=0.5))
    found = attributed(case, bars_of=["prompts"])
    for row, contribution in zip(found.bars["prompts"].values(), found.columns("prompts")["contribution"], strict=True):
        assert row.value == pytest.approx(contribution, rel=1e-10)


def test_one_prompt_has_no_bars_and_says_so() -> None:
    alone = fp.rollouts_from_lists([[1]] * 4, [[2, 3], [3], [4, 1], [2]], temperature=0.8, rewards=[0.0, 1.0, 0.5, 0.2])
    found = attributed(Case("two lines"), alone, bars_of=["ledger"])
    assert found.bars == {}
    assert any("no error bars of ledger" in note and "2 or more" in note for note in found.probe.notes)


def test_what_cannot_have_bars_is_refused_early() -> None:
    case = Case("two lines")
    with pytest.raises(InputError, match="bars_of names 'tokens'; expected a list of tables among ledger, parameters"):
        attributed(case, bars_of=["tokens"])
    with pytest.raises(InputError, match="bars_of names 'ledger'; expected a list"):
        attributed(case, bars_of="ledger")
    with pytest.raises(InputError, match="can do nothing with bars=None"):
        attributed(case, bars_of=["ledger"], bars=None)
    with pytest.raises(InputError, match="needs the additive form"):
        attributed(case, bars_of=["ledger"], form="jacobian")
    lifted = Case("two lines", fp.from_torch(torch.optim.RMSprop, lr=1e-4))
    with pytest.raises(InputError, match="needs the additive form"):
        attributed(lifted, bars_of=["ledger"])
