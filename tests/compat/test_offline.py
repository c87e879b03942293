"""The plan's flow from a YAML file: phases in order, one step, log lines, caches."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import funcprobe as fp
from funcprobe.checkpoints.live import from_training
from funcprobe.compat import OfflineEntropyProbe
from funcprobe.compat.sampling import Source
from funcprobe.errors import ConfigError, InputError
from funcprobe.policy.module import from_module
from tests.cases import stateful as cases
from tests.cases.snapshots import fingerprint
from tests.cases.trees import assert_same

Configured = Callable[..., Path]

KEYS = {
    "H_orig", "H_upd", "deltaH_true", "H_orig_tok", "H_upd_tok", "deltaH_true_tok", "diagnostics", "param_update_l2",
    "learning_rate_used", "deltaH1", "deltaH1_tok", "bars_dot", "B_E", "B_U", "learning_rate", "mb_size_prompts",
    "weighting_mode", "importance_enabled", "timing",
}  # fmt: skip


def test_the_plan_runs_in_its_order(configured: Configured, caplog: pytest.LogCaptureFixture) -> None:
    path = configured(("log_level: INFO", "log_level: INFO, results_path: out/results.json"))
    probe = OfflineEntropyProbe.from_config_file(path)
    with caplog.at_level(logging.INFO):
        found = probe.run_mixed_probe()
    assert found.keys() == KEYS
    assert (found["B_E"], found["B_U"], found["learning_rate"], found["learning_rate_used"]) == (6, 3, 1.0, 2e-4)
    assert found["deltaH1"] == found["bars_dot"] != 0
    assert found["deltaH_true"] == pytest.approx(found["deltaH1"], rel=0.5)
    said = [m for m in caplog.messages if m.startswith(("Phase", "[GT] deltaH", "[δH1]"))]
    assert [m.split()[0] + m.split()[1] for m in said] == [
        "Phase0:",
        "Phase1:",
        "[GT]deltaH_true",
        "Phase2:",
        said[4].split()[0] + said[4].split()[1],
    ]
    assert said[2] == (
        f"[GT] deltaH_true = {found['deltaH_true']:.10f} (||Δθ||₂={found['param_update_l2']:.4e}, lr_used=0.0002)"
    )
    assert said[4] == (f"[δH1] bars_dot={found['bars_dot']:.10f}, deltaH1={found['deltaH1']:.10f} (uses same Δθ)")
    written = json.loads((path.parent / "out" / "results.json").read_text())
    assert written["deltaH_true"] == found["deltaH_true"]
    assert set(found["timing"]) == {
        "total_time", "phase0_sampling", "phase5_importance", "phase1_time", "phase2_time", "phase3_time",
    }  # fmt: skip


def test_equals_the_pure_core_on_the_same_batches(configured: Configured, folder: Path) -> None:
    probe = OfflineEntropyProbe.from_config_file(configured(more="kl_beta: 0"))
    found = probe.run_offline_analysis(folder / "checkpoint")
    before = fingerprint(probe.model, probe.optimizer)
    source = Source(probe.settings, *from_module(probe.model), probe.tokenizer)
    E, U = source.batch("E"), source.batch("U")
    at = fp.load_checkpoint(folder / "checkpoint", lr=2e-4)
    longest = U.completion_mask.sum(1).reshape(3, 4).amax(1).repeat_interleave(4)
    weighed = U._replace(weight=1 / (12.0 * longest.double()))
    update = at.update(fp.dr_grpo(normaliser=1.0), weighed, max_grad_norm=1.0)
    result = fp.probe(update, E, fp.entropy("rao_blackwell", "sequence", "sequence"), bars=None)
    # one model, cut into other microbatches: float32 rounding of scores, relative to H
    assert found["H_orig"] == pytest.approx(result.before, rel=1e-5)
    assert found["param_update_l2"] == pytest.approx(result.outcome.delta_norm, rel=1e-4)
    assert found["deltaH1"] == pytest.approx(result.first_order, rel=1e-3)
    again = probe.run_mixed_probe()
    assert_same({**again, "timing": 0}, {**found, "timing": 0})
    assert_same(fingerprint(probe.model, probe.optimizer), before)


def test_a_tenth_of_the_rate_is_a_tenth_of_the_step(configured: Configured) -> None:
    """The plan's own quick test: ‖Δθ‖ and δH₁ scale with `lr_override` (AdamW's step is linear in its rate)."""
    found = [
        OfflineEntropyProbe.from_config_file(configured(("lr_override: none", f"lr_override: {lr}"))).run_mixed_probe()
        for lr in ("1e-4", "1e-5")
    ]
    for key in ("param_update_l2", "deltaH1"):
        assert found[0][key] / found[1][key] == pytest.approx(10, rel=1e-3)
    assert [f["learning_rate_used"] for f in found] == [1e-4, 1e-5]


def test_without_a_buffer_there_is_no_prediction(configured: Configured) -> None:
    probe = OfflineEntropyProbe.from_config_file(configured(("snapshot_device: cpu", "return_param_update_buf: false")))
    with pytest.raises(RuntimeError, match="did not return param_update_buf_named; set return_param_update_buf=True"):
        probe.run_mixed_probe()


def test_the_legacy_path_stands_in_where_nothing_is_measured(configured: Configured) -> None:
    probe = OfflineEntropyProbe.from_config_file(configured(("enabled: true", "enabled: false")))
    found = probe.run_mixed_probe()
    assert found["importance_enabled"] is False
    assert "deltaH_true" not in found
    assert found["learning_rate"] == 2e-4
    assert found["deltaH1"] == pytest.approx(2e-4 * found["bars_dot"], rel=1e-12)


@pytest.mark.parametrize("suffix", ["parquet", "pt"])
def test_batches_are_cached_and_read_again(suffix: str, configured: Configured, tmp_path: Path) -> None:
    cache = "reuse_E: true, reuse_U: true, " + ", ".join(
        f"{name.lower()}_batch_cache_path: {tmp_path}/{name}.{suffix}" for name in "EU"
    )
    path = configured(("reuse_E: false, reuse_U: false", cache + ", log_param_update_buf: true"))
    first = OfflineEntropyProbe.from_config_file(path).run_mixed_probe()
    assert {p.name for p in tmp_path.iterdir()} == {f"E.{suffix}", f"U.{suffix}"}
    other = configured(("reuse_E: false, reuse_U: false", cache), ("master_seed: 7", "master_seed: 8"))
    second = OfflineEntropyProbe.from_config_file(other).run_mixed_probe()
    assert second["deltaH_true"] == first["deltaH_true"]
    assert list(first["param_update_buf_named"])
    assert "param_update_buf_named" not in second


def test_a_batch_that_the_stateful_system_left_is_read(configured: Configured, tmp_path: Path) -> None:
    for name, packed in {"E": cases.packed(5, 1, 1), "U": cases.packed(4, 3, 2)}.items():
        torch.save({"meta": {"split": "train"}, "data": packed.batch}, tmp_path / f"{name}.pt")
    cache = f"reuse_E: true, reuse_U: true, e_batch_cache_path: {tmp_path}/E.pt, u_batch_cache_path: {tmp_path}/U.pt"
    found = OfflineEntropyProbe.from_config_file(
        configured(("reuse_E: false, reuse_U: false", cache))
    ).run_mixed_probe()
    assert (found["B_E"], found["B_U"], found["diagnostics"]["N_total"]) == (5, 4, 5)
    (tmp_path / "E.pt").write_bytes(b"something else")
    with pytest.raises(InputError, match="cannot be read as tensors"):
        OfflineEntropyProbe.from_config_file(configured(("reuse_E: false, reuse_U: false", cache))).run_mixed_probe()


def test_e_gets_no_prompt_of_u(configured: Configured, folder: Path) -> None:
    probe = OfflineEntropyProbe.from_config_file(configured(("B_U: 3", "B_U: 12"), ("B_E: 6", "B_E: 40")))
    probe.load_checkpoint(folder / "checkpoint")
    source = Source(probe.settings, *from_module(probe.model), probe.tokenizer)
    E, U = source.batch("E"), source.batch("U")
    assert fp.data.rollouts.overlap(E, U).prompts == 0
    assert len(E.group_ids) == 40
    assert len(E.group_ids.unique()) <= 12
    assert E.rewards is None
    assert U.rewards is not None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("B_U: 3", "B_U: 30"), "12 distinct prompts for U, and B_U is 30"),
        (("B_U: 3", "B_U: none"), "batch_config.B_U is None"),
        (("dataset_name: prompts", "dataset_name: nowhere"), "nowhere is no file"),
        (('reward: "funcprobe.cli.demo_task:reward"', "split: test"), "batch_config.reward is missing"),
        (("reuse_E: false", "reuse_E: true"), "e_batch_cache_path is not"),
        (("use_qlora: false", "use_qlora: true"), "quantised weights are not read"),
        (("estimator: {weighting_mode: dr_grpo", "estimator: {weighting_mode: other"), "weighting_mode"),
        (("log_level: INFO", "log_level: loud"), "output.log_level is 'loud'"),
        (("checkpoint_path: checkpoint, ", ""), "checkpoint.checkpoint_path is missing"),
        (("checkpoint_path: checkpoint", "checkpoint_path: checkpoint, model_config_path: base"), "base of an adapter"),
    ],
)
def test_what_is_configured_wrongly_is_named(change: tuple[str, str], said: str, configured: Configured) -> None:
    with pytest.raises(ConfigError, match=said):
        OfflineEntropyProbe.from_config_file(configured(change)).run_mixed_probe()


def test_the_live_optimizer_steps_as_the_file_says(folder: Path, configured: Configured) -> None:
    probe = OfflineEntropyProbe.from_config_file(configured())
    probe.load_checkpoint(folder / "checkpoint")
    live, saved = from_training(probe.model, probe.optimizer), fp.load_checkpoint(folder / "checkpoint", lr=2e-4)
    gradient: Any = {name: torch.ones_like(p) for name, p in saved.params.items()}
    one = live.optimizer.apply(live.params, live.opt_state, gradient)
    two = saved.optimizer.apply(saved.params, saved.opt_state, gradient)
    assert_same(one.params, two.params)


def test_what_is_written_is_strict_json(configured: Configured, tmp_path: Path) -> None:
    probe = OfflineEntropyProbe.from_config_file(configured())
    probe.settings.config["output"] = {"results_path": str(tmp_path / "r.json")}
    probe._save({"a": math.nan, "b": {"c": math.inf, "d": 1.5}, "e": "text"})
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": None, "b": {"c": None, "d": 1.5}, "e": "text"}
