"""θ′ as stored and θ + Δθ, where storing sets them apart: both are measured, named, saved and shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import funcprobe as fp
from funcprobe import tree
from funcprobe.measurement.move import WORTH_TELLING, Move
from funcprobe.optimizers.stored import stored
from funcprobe.report.figures import plot_sweep
from funcprobe.report.terminal import text_of
from funcprobe.results.probe import ProbeResult
from funcprobe.results.sweep import SweepResult
from funcprobe.results.sweep_numbers import remarks_of, table_of
from funcprobe.types import Params
from tests.cases import models
from tests.cases.probes import E, U


class Low:
    """A GPT-2 whose weights are bfloat16 numbers, computed in another dtype and stored in bfloat16."""

    def __init__(self, dtype: torch.dtype = torch.float64, storage: torch.dtype | None = torch.bfloat16) -> None:
        self.policy, params = fp.from_module(models.gpt2(dtype))
        self.params = {n: p.bfloat16().to(dtype) for n, p in params.items()}
        kept = {} if storage is None else dict.fromkeys(params, storage)
        self.optimizer = stored(fp.adamw(1e-3, weight_decay=0.0), kept)
        self.state = self.optimizer.init(self.params)
        self.step = fp.make_step(self.policy, fp.grpo(), self.optimizer)

    def probe(self, lr: float | None = None, **options: Any) -> ProbeResult:
        return fp.probe(fp.Update.from_step(self.step, self.params, self.state, U, lr), E, **options)

    def sweep(self, lrs: list[float], **options: Any) -> SweepResult:
        return fp.sweep(fp.Update.from_step(self.step, self.params, self.state, U), E, lrs, **options)

    def truth(self, lr: float) -> tuple[float, float, float]:
        """Return ΔF of θ + Δθ and of θ′ in float64, and the first order of (θ′ − θ) − Δθ."""
        policy, _ = fp.from_module(models.gpt2(torch.float64))
        taken = self.step(self.params, self.state, U, lr=lr)
        theta = wide(self.params)
        H = fp.anchored(fp.entropy(), policy, E, theta)
        exact, after = tree.add(theta, wide(taken.delta)), wide(taken.params)
        off = tree.sub(tree.sub(after, theta), wide(taken.delta))
        row = float(torch.func.jvp(H, (theta,), (off,))[1])
        return float(H(exact) - H(theta)), float(H(after) - H(theta)), row


def wide(leaves: Params) -> Params:
    return {name: leaf.double() for name, leaf in leaves.items()}


@pytest.mark.parametrize("method", ["auto", "difference", "path"])
@pytest.mark.parametrize("lr", [1e-3, 1e-5])
def test_both_changes_are_measured_by_every_method(method: Any, lr: float) -> None:
    low = Low()
    exact, as_stored, row = low.truth(lr)
    reading = (result := low.probe(lr=lr, method=method)).main
    assert result.outcome.rounding_ratio > WORTH_TELLING
    size = max(abs(exact), abs(as_stored))
    # a path agrees to 1e-5 of Σ|terms|, which is some tens of ΔF here; the update is kept in float32 all the same
    assert reading.exact == pytest.approx(exact, rel=1e-3, abs=1e-4 * size)
    assert reading.stored == pytest.approx(as_stored, rel=1e-3, abs=1e-4 * size)
    assert reading.change == (reading.stored if method == "difference" else reading.exact)
    assert reading.of_delta == (method != "difference")
    assert result.outcome.rounding == pytest.approx(row, rel=1e-3, abs=1e-6 * size)
    assert set(reading.bars) == {"change", "first_order", "remainder", "ratio"} | {
        "exact" if method == "difference" else "stored"
    }


def test_float32_arithmetic_gives_both_down_to_the_smallest_steps() -> None:
    low = Low(torch.float32)
    for lr in (1e-4, 1e-6):
        exact, as_stored, _ = low.truth(lr)
        reading = low.probe(lr=lr).main
        # a path is off by the model's own 1e-7 of Σ|terms|; a difference that is kept by a hundredth of ΔF at most
        assert reading.exact == pytest.approx(exact, rel=1e-2)
        assert reading.stored == pytest.approx(as_stored, rel=1e-2)
        assert reading.exact == pytest.approx(reading.first_order, rel=0.1)


def test_reverse_mode_gives_both_by_subtraction() -> None:
    low = Low()
    exact, as_stored, row = low.truth(1e-3)
    result = low.probe(mode="reverse")
    assert result.main.exact == pytest.approx(exact, rel=1e-6)
    assert result.main.stored == result.main.subtraction == pytest.approx(as_stored, rel=1e-6)
    assert result.outcome.rounding == pytest.approx(row, rel=1e-6)
    assert (result.main.method, result.main.of_delta) == ("difference", True)


def test_what_does_not_move_is_the_runs() -> None:
    low = Low()
    taken = low.step(low.params, low.state, U, lr=1e-5)
    moved = [(taken.params[n] != p) for n, p in low.params.items()]
    wanted = [taken.delta[n] != 0 for n in low.params]
    stuck = sum(int((w & ~m).sum()) for w, m in zip(wanted, moved, strict=True)) / sum(int(w.sum()) for w in wanted)
    assert low.probe(lr=1e-5).outcome.unmoved == stuck > 0.5


def test_storage_in_the_arithmetics_dtype_tells_nothing_apart() -> None:
    result = Low(torch.float32, None).probe()
    assert (result.main.exact, result.main.stored, result.main.of_delta) == (None, None, False)
    assert "as stored" not in result.summary()
    assert result.environment["storage"] == result.environment["dtype"] == "float32"


@pytest.mark.parametrize("lr", [1e-3, 1e-5])
def test_every_text_names_both(lr: float) -> None:
    result = Low(torch.float32).probe(lr=lr)
    assert result.environment["storage"] == "bfloat16"
    for text in (result.summary(), result._repr_html_(), text_of(result)):
        assert "exact update" in text
        assert "as stored in bfloat16" in text
        assert f"{result.main.exact:+.6e}" in text
        assert f"{result.main.stored:+.6e}" in text
        assert "rounding of θ′ adds" in text
        assert "F(θ + Δθ)" in text
    verb = "raises" if result.main.stored > 0 else "lowers"  # type: ignore[operator]
    assert f"As stored in bfloat16 the step {verb} it by {abs(result.main.stored or 0):.3g}" in result.summary()
    assert "float32 stored in bfloat16" in " ".join(text_of(result).split())
    by_difference = Low(torch.float32).probe(lr=lr, method="difference")
    assert "The exact update, unrounded," in by_difference.summary()
    assert "of it rounding of θ′" in by_difference.summary()


def test_a_model_that_computes_in_bfloat16_says_that_it_holds_no_exact_update() -> None:
    policy, params = fp.from_module(models.gpt2(torch.bfloat16))
    optimizer = fp.adamw(1e-5)
    result = fp.probe(
        fp.Update.from_step(fp.make_step(policy, fp.grpo(), optimizer), params, optimizer.init(params), U), E
    )
    assert (result.main.exact, result.main.stored) == (None, None)
    rows = dict(line.strip().split("  ", 1) for line in result.summary().splitlines() if "update  " in line)
    assert "not measured: bfloat16 arithmetic does not hold θ + Δθ" in rows["exact update"]
    assert f"as stored in bfloat16    {result.change:+.6e}" in result.summary()


def test_results_are_saved_with_both(tmp_path: Path) -> None:
    result = Low(torch.float32).probe(lr=1e-5)
    result.save(tmp_path / "r")
    plain = json.loads((tmp_path / "r" / "result.json").read_text())["outcome"]["readings"]
    (reading,) = plain.values()
    assert (reading["exact"], reading["stored"], reading["of_delta"]) == (result.main.exact, result.main.stored, True)
    assert ProbeResult.load(tmp_path / "r").main == result.main


def test_a_sweep_tells_both_at_every_learning_rate(tmp_path: Path) -> None:
    low = Low(torch.float32)
    found = low.sweep([1e-6, 1e-4, 1e-2])
    for lr, reading in zip(found.lrs, found.readings(), strict=True):
        exact, as_stored, _ = low.truth(lr)
        assert reading.of_delta
        assert reading.exact == reading.change == pytest.approx(exact, rel=2e-3)
        # by subtraction alone: eight roundings of a score are 1e-6 nats, averaged over E's tokens
        assert reading.stored == reading.subtraction == pytest.approx(as_stored, rel=5e-2, abs=2e-7)
    headings, rows = table_of(found)
    column = headings.index("as stored in bfloat16")
    assert [row[column] for row in rows] == [f"{r.stored:+.4e}" for r in found.readings()]
    assert any("ΔF is that of the exact update: at 3 of 3 learning rates" in text for text in remarks_of(found))
    assert not any("Subtracting two evaluations" in text for text in remarks_of(found))
    quantities = {row["quantity"] for row in found.rows()}
    assert {"exact", "stored"} <= quantities
    labels = plot_sweep(found).get_legend_handles_labels()[1]
    assert "as stored in bfloat16" in labels
    assert not any("subtraction" in label for label in labels)
    found.save(tmp_path / "s")
    assert SweepResult.load(tmp_path / "s").readings() == found.readings()


def test_learning_rates_that_are_scored_together_tell_the_same() -> None:
    low = Low()
    alone, together = (low.sweep([1e-4, 1e-3], chunk=chunk, order=1) for chunk in (1, 2))
    for one, other in zip(alone.readings(), together.readings(), strict=True):
        assert other.stored == pytest.approx(one.stored, rel=1e-6)
        assert other.exact == pytest.approx(one.exact, rel=1e-9)


def test_a_stored_result_that_its_optimizer_shifts_is_told_apart_too() -> None:
    policy, params = fp.from_module(models.gpt2())
    drift = models.direction(params, 1e-4, seed=8)

    class Drifting:
        lr = 1e-3

        def init(self, params: Params) -> Any:
            return fp.sgd(self.lr).init(params)

        def apply(self, *arguments: Any) -> Any:
            taken = fp.sgd(self.lr).apply(*arguments)
            return taken._replace(params=tree.add(taken.params, drift))

    step = fp.make_step(policy, fp.grpo(), Drifting())
    reading = fp.probe(fp.Update.from_step(step, params, Drifting().init(params), U), E).main
    taken = step(params, Drifting().init(params), U)
    H = fp.anchored(fp.entropy(), policy, E, params)
    assert reading.change == reading.stored == pytest.approx(float(H(taken.params) - H(params)), rel=1e-9)
    assert reading.exact == pytest.approx(float(H(tree.add(params, taken.delta)) - H(params)), rel=1e-9)
    assert not reading.of_delta


def test_a_move_knows_whether_it_was_stored_narrower() -> None:
    p = {"w": torch.ones(2)}
    assert not Move.of(p, p, p).narrow
    assert Move.of(p, p, p, narrow=True).narrow
