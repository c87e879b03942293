"""The faults of the stateful system's files and checkpoints, each a test that its behaviour would fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import funcprobe as fp
from funcprobe.checkpoints.live import from_training
from funcprobe.compat import OfflineEntropyProbe
from funcprobe.compat.sampling import Source
from funcprobe.errors import CheckpointError, ConfigError, InputError
from funcprobe.policy.module import from_module
from tests.cases import models
from tests.cases import stateful as cases
from tests.cases.trees import assert_same

Configured = Callable[..., Path]


def test_fault_04_numbers_and_none_in_yaml_read_as_text(configured: Configured) -> None:
    probe = OfflineEntropyProbe.from_config_file(
        configured(("learning_rate: 2e-4", "learning_rate: 2e-8"), ("clip_eps: 0.2", "clip_eps: none"))
    )
    assert probe.settings.get("learning_rate") == 2e-8
    assert isinstance(probe.config["learning_rate"], float)
    assert probe.config["true_delta_h"]["lr_override"] is None
    assert probe.config["clip_eps"] is None
    with pytest.raises(ConfigError, match="'2e-8', a str"):
        OfflineEntropyProbe.from_config_file(configured(("learning_rate: 2e-4", 'learning_rate: "2e-8"')))


@pytest.mark.parametrize(
    ("section", "key", "said"),
    [
        ("memory_config", "amp: true", "memory_config.amp: True can do nothing"),
        ("generation", "top_p: 0.9", "generation.top_p: 0.9 can do nothing"),
        ("distributed", "backend: nccl", "distributed.backend is unknown"),
        ("output", "save: true", "output.save is unknown"),
        ("true_delta_h", "is_mode: none_such", "is_mode is 'none_such'"),
    ],
)
def test_fault_09_keys_of_a_file_that_did_nothing(section: str, key: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(f"{section}:\n  {key}\n")
    with pytest.raises(ConfigError, match=said):
        OfflineEntropyProbe.from_config_file(path)


def test_fault_11_each_rank_sampled_its_own_batch(configured: Configured, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one process can show: batches come from `master_seed` alone, whatever the rank or the global generator.

    Every rank then holds the same U whole, so there is no gradient to reduce.
    """
    drawn = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        with models.seeded(int(rank)):
            probe = OfflineEntropyProbe.from_config_file(configured())
            probe.load_checkpoint(probe.config["checkpoint"]["checkpoint_path"])
            source = Source(probe.settings, *from_module(probe.model), probe.tokenizer)
            drawn.append([source.batch(which)._asdict() for which in ("E", "U")])
    assert_same(*drawn)
    other = OfflineEntropyProbe.from_config_file(configured(("master_seed: 7", "master_seed: 8")))
    again = Source(other.settings, *from_module(probe.model), probe.tokenizer).batch("U")
    assert again.ids.tolist() != drawn[0][1]["ids"].tolist()


def test_fault_13_optimizer_loading_fell_back_to_a_fresh_one(
    folder: Path, configured: Configured, tmp_path: Path
) -> None:
    probe = OfflineEntropyProbe.from_config_file(configured())
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / "checkpoint" / name).read_bytes())
    with pytest.raises(CheckpointError, match="There is no optimizer state"):
        probe.load_checkpoint(tmp_path)
    (tmp_path / "optimizer.pt").write_bytes(b"no state")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt"):
        probe.load_checkpoint(tmp_path)
    other = torch.optim.AdamW([nn.Parameter(torch.ones(3))], lr=1e-3)
    other.param_groups[0]["params"][0].grad = torch.ones(3)
    other.step()
    torch.save(other.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"does not fit|parameters"):
        probe.load_checkpoint(tmp_path)

    probe.load_checkpoint(folder / "checkpoint")
    saved = fp.load_checkpoint(folder / "checkpoint", lr=1e-3)
    state = from_training(probe.model, probe.optimizer).opt_state
    assert_same(state, saved.opt_state)
    assert all(bool(entry["exp_avg"].any()) for entry in saved.opt_state.values())


def test_fault_15_saved_rate_of_zero_gave_no_step(folder: Path, configured: Configured) -> None:
    live = cases.pair()
    for group in live[1].param_groups:
        group["lr"] = 0.0
    with pytest.raises(InputError, match="learning rate is 0 in every group"):
        cases.probe(live)
    assert cases.probe(live, {"lr_override": 1e-3})["param_update_l2"] > 0
    probe = OfflineEntropyProbe.from_config_file(configured(("learning_rate: 2e-4", "learning_rate: none")))
    with pytest.raises(CheckpointError, match="is 0"):
        probe.load_checkpoint(folder / "checkpoint")
