"""8-bit and paged states that bitsandbytes wrote, and the step from them beside the one that it took itself."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcprobe.checkpoints import load_checkpoint, load_optimizer
from funcprobe.checkpoints.bitsandbytes_state import without_quantisation
from funcprobe.checkpoints.saved_state import state_in
from funcprobe.errors import CheckpointError, FuncprobeWarning, Note
from tests.cases.bitsandbytes_states import SHAPES, gradient, states
from tests.cases.trainer_runs import Run

EPS = torch.finfo(torch.float32).eps
WRAPPED = "__bnb_optimizer_quant_state__"


def by_hand(codes: torch.Tensor, qmap: torch.Tensor, absmax: torch.Tensor, block: int) -> torch.Tensor:
    """The slow reference: one number at a time."""
    flat = codes.flatten().tolist()
    values = [float(qmap[code] * absmax[i // block]) for i, code in enumerate(flat)]
    return torch.tensor(values).reshape(codes.shape)


@pytest.mark.parametrize("cls", SHAPES)
def test_the_step_is_the_one_that_bitsandbytes_took(cls: str, tmp_path: Path) -> None:
    found = states(cls)
    torch.save(found["saved"], tmp_path / "optimizer.pt")
    with pytest.warns(FuncprobeWarning, match="was written by bitsandbytes") as warned:
        optimizer, state = load_optimizer(tmp_path / "optimizer.pt", found["before"])
    assert [w.message.args[0].kind for w in warned if isinstance(w.message.args[0], Note)] == ["quantised"]
    assert optimizer.groups[0].hyperparameters["weight_decay"] == 0.1
    after = optimizer.apply(found["before"], state, gradient(cls, 3)).params
    for name, p in found["before"].items():
        moved = (found["after"][name] - p).abs()
        assert moved.max() > 5e-4, "a step of about lr"
        # both round the decayed weight and the sum once each, and the step itself some ten times on its way
        assert bool(((after[name] - found["after"][name]).abs() <= EPS * (2 * p.abs() + 16 * moved)).all()), name


def test_moments_are_codes_through_the_map_times_the_block(tmp_path: Path) -> None:
    found = states("AdamW8bit")
    torch.save(found["saved"], tmp_path / "optimizer.pt")
    with pytest.warns(FuncprobeWarning, match=r"1 of 2 leaves have moments of 8 bits, read as qmap\[code\]"):
        _, state = load_optimizer(tmp_path / "optimizer.pt", found["before"])
    quant = found["saved"]["state"][0][WRAPPED]
    for key, n in (("exp_avg", 1), ("exp_avg_sq", 2)):
        assert quant[f"absmax{n}"].shape == (17,)
        expected = by_hand(*(quant[f"{name}{n}"] for name in ("state", "qmap", "absmax")), 256)
        assert torch.equal(state["matrix"][key], expected)
        assert torch.equal(state["vector"][key], found["saved"]["state"][1][WRAPPED][f"state{n}"])
    assert {int(entries["step"]) for entries in state.values()} == {3}


def test_the_layout_of_older_versions_is_the_same_state(tmp_path: Path) -> None:
    """Without the wrapping that FSDP is spared by, which came later."""
    found = states("AdamW8bit")
    old = copy.deepcopy(found["saved"])
    for entries in old["state"].values():
        entries |= entries.pop(WRAPPED)
    read = []
    for name, saved in (("new", found["saved"]), ("old", old)):
        torch.save(saved, tmp_path / name)
        with pytest.warns(FuncprobeWarning, match="bitsandbytes"):
            read.append(load_optimizer(tmp_path / name, found["before"])[1])
    assert all(torch.equal(read[0][n][k], read[1][n][k]) for n in read[0] for k in read[0][n])


@given(st.integers(1, 5000), st.sampled_from([256, 2048]), st.integers(0, 2**16))
def test_blocks_of_both_sizes_are_told_from_their_number(count: int, block: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (count,), generator=g, dtype=torch.uint8)
    entries: dict[str, Any] = {"step": 1}
    for n in "12":
        blocks = -(-count // block)
        entries |= {f"state{n}": codes, f"qmap{n}": torch.rand(256, generator=g).sort().values}
        entries |= {f"absmax{n}": torch.rand(blocks, generator=g)}
    group = {"lr": 0.1, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.0, "params": [0]}
    with pytest.warns(FuncprobeWarning):
        saved = without_quantisation(state_in({"state": {0: entries}, "param_groups": [group]}, "x"))
    for key, n in (("exp_avg", "1"), ("exp_avg_sq", "2")):
        picked = torch.arange(0, count, 97)
        expected = entries[f"qmap{n}"][codes[picked].int()] * entries[f"absmax{n}"][picked // block]
        assert torch.equal(saved.read(0)[key][picked], expected)


def other(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    saved = copy.deepcopy(states("AdamW8bit")["saved"])
    change(saved)
    return saved


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["state"][0][WRAPPED].pop("state2"), "written by an 8-bit bitsandbytes optimizer"),  # Lion
        (lambda s: s["state"][0][WRAPPED].update(unorm_vec=torch.zeros(1)), "an 8-bit bitsandbytes optimizer"),  # LAMB
        (lambda s: s["param_groups"][0].update(alpha=5.0), "an 8-bit bitsandbytes optimizer"),  # AdEMAMix
    ],
)
def test_another_optimizer_of_bitsandbytes_is_refused_by_name(change: Any, message: str, tmp_path: Path) -> None:
    torch.save(other(change), tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError, match=message):
        load_optimizer(tmp_path / "optimizer.pt", states("AdamW8bit")["before"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(absmax1=torch.ones(5)), r"state1 of parameter 0 in optimizer\.pt does not fit its qmap1"),
        (lambda q: q.update(qmap2=torch.ones(16)), "state2 of parameter 0 .* does not fit its qmap2"),
        (lambda q: q.pop("absmax2"), "state2 of parameter 0 .* does not fit"),
        (lambda q: q.update(state1=q["state1"].int()), "expected codes of 8 bits"),
        (lambda q: q.update(absmax1=torch.full((17,), torch.nan)), "exp_avg of parameter 0 .* NaN or infinite"),
        (lambda q: q.update(absmax2=-torch.ones(17)), "exp_avg_sq of parameter 0 .* squares or sizes"),
    ],
)
def test_a_damaged_state_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    torch.save(other(lambda s: change(s["state"][0][WRAPPED])), tmp_path / "optimizer.pt")
    with pytest.warns(FuncprobeWarning), pytest.raises(CheckpointError, match=message):
        load_optimizer(tmp_path / "optimizer.pt", states("AdamW8bit")["before"])


def test_a_folder_with_such_a_state_is_read(full_gpt2: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(full_gpt2.folder, tmp_path / "c")
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    plain = copy.deepcopy(saved)
    for entries in saved["state"].values():
        entries["state1"], entries["state2"] = entries.pop("exp_avg"), entries.pop("exp_avg_sq")
        entries["step"] = int(entries["step"])
    options = ("lr", "betas", "eps", "weight_decay", "params")
    saved["param_groups"] = [{key: group[key] for key in options} for group in saved["param_groups"]]
    torch.save(saved, folder / "optimizer.pt")
    with pytest.warns(FuncprobeWarning, match="0 of 28 leaves have moments of 8 bits"):
        found = load_checkpoint(folder, lr=1e-3)
    expected = load_checkpoint(full_gpt2.folder, lr=1e-3)
    assert plain["state"].keys() == saved["state"].keys()
    for name, entries in expected.opt_state.items():
        assert torch.equal(found.opt_state[name]["exp_avg"], entries["exp_avg"])
        assert torch.equal(found.opt_state[name]["exp_avg_sq"], entries["exp_avg_sq"])
