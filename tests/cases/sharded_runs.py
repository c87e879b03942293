"""Checkpoints that two processes write of one FSDP2 model, as frameworks write them, and the state in one piece."""

from __future__ import annotations

import json
import os
import types
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.cases.processes import together
from tests.cases.third_party import third_party
from tests.cases.tokenizers import tokenizer
from tests.cases.trainer_runs import VOCABULARY, qwen2

#: Framework, as it is said -> its folder, whether its configuration is given beside, and the same state in one piece.
FOLDERS = {
    "accelerate's FSDP": ("accelerate", True, "two_groups.pt"),
    "prime-rl": ("step_2", True, "two_groups.pt"),
    "torch.distributed.checkpoint": ("step-2", True, "two_groups.pt"),
    "verl": ("global_step_2/actor", False, "one_group.pt"),
    "SkyRL": ("global_step_2/policy", False, "one_group.pt"),
}


def write(folder: Path) -> None:
    """Have two processes train a tiny model for two steps and write every layout below a folder."""
    ended = together(trained, 2, SHARDED_RUN=str(folder))
    assert ended.codes == [0, 0], ended.words


def trained() -> None:
    """Train in one of the processes, and write."""
    folder = Path(os.environ["SHARDED_RUN"])
    with third_party():
        model, optimizer = _model_and_optimizer(decayed=True)
        _step(model, optimizer)
        _as_accelerate(folder, model, optimizer)
        _in_one_piece(folder / "two_groups.pt", model, optimizer)
        _as_prime_rl(folder / "step_2" / "trainer", model, optimizer)
        _as_torchtitan(folder / "step-2", model, optimizer)
        _over_meshes(folder / "meshes")
        # verl and SkyRL build their optimizer of one group, and decay everything
        model, optimizer = _model_and_optimizer(decayed=False)
        _step(model, optimizer)
        for role in ("actor", "policy"):
            _as_verl(folder / "global_step_2" / role, model, optimizer)
        _in_one_piece(folder / "one_group.pt", model, optimizer)


def _model_and_optimizer(*, decayed: bool) -> tuple[Any, torch.optim.Optimizer]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model: Any = qwen2(tie_word_embeddings=True, vocab_size=VOCABULARY - 1)  # 23 rows: parts of different sizes
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    leaves = list(model.parameters())
    if not decayed:
        return model, torch.optim.AdamW(leaves, lr=1e-3, weight_decay=0.1)
    groups = [[p for p in leaves if p.dim() > 1], [p for p in leaves if p.dim() == 1]]
    return model, torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}], lr=1e-3
    )


def _step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    for seed in range(2):
        generator = torch.Generator().manual_seed(10 * seed + torch.distributed.get_rank())
        ids = torch.randint(0, VOCABULARY - 1, (2, 6), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _as_accelerate(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write by accelerate's own functions, once in shards and once in full."""
    from accelerate import PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import save_fsdp_model, save_fsdp_optimizer

    PartialState(cpu=True)  # which its loggers ask for; it knows of processes by torchrun's environment alone
    rank = torch.distributed.get_rank()
    accelerator = types.SimpleNamespace(num_processes=2, process_index=rank, is_fsdp2=True)
    for kind, name in (("SHARDED_STATE_DICT", "accelerate"), ("FULL_STATE_DICT", "full")):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)
        save_fsdp_model(plugin, accelerator, model, str(folder / name))
        save_fsdp_optimizer(plugin, accelerator, optimizer, model, str(folder / name))
    if rank == 0:
        _config(folder / "base", model)


def _as_prime_rl(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, state = get_state_dict(model, [optimizer])
    app = {"model": weights, "optimizers": state, "scheduler": {"last_epoch": 2}, "progress": {"step": 2}}
    dcp.save({"app": app}, checkpoint_id=folder)


def _as_torchtitan(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    dcp.save({**get_model_state_dict(model), "optimizer": state, "train_state": {"step": 2}}, checkpoint_id=folder)


def _as_verl(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    rank = torch.distributed.get_rank()
    folder.mkdir(parents=True, exist_ok=True)
    for kind, content in (("model", model.state_dict()), ("optim", optimizer.state_dict())):
        torch.save(content, folder / f"{kind}_world_size_2_rank_{rank}.pt")
    if rank == 0:
        _config(folder / "huggingface", model)
        (folder / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 2}))


def _in_one_piece(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write {"model": weights, "optimizer": state by name}, gathered by torch itself."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    if torch.distributed.get_rank() == 0:
        torch.save({"model": weights, "optimizer": state}, path)


def cut() -> torch.Tensor:
    """Return the tensor that is cut over meshes in every way."""
    return torch.arange(35.0).view(5, 7)


def _over_meshes(folder: Path) -> None:
    """Write one tensor, cut along rows, columns and both, and kept whole in copies, in rank files and in shards."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    ways = {
        "rows": ((2,), [Shard(0)]),
        "columns": ((2,), [Shard(1)]),
        "copies": ((2,), [Replicate()]),
        "copies of rows": ((2, 1), [Replicate(), Shard(0)]),
        "rows of one copy": ((1, 2), [Replicate(), Shard(0)]),
        "both": ((1, 2), [Shard(0), Shard(1)]),
    }
    found = {n: distribute_tensor(cut(), init_device_mesh("cpu", size), how) for n, (size, how) in ways.items()}
    dcp.save({"model": found}, checkpoint_id=folder)
    torch.save(found, folder / f"model_world_size_2_rank_{torch.distributed.get_rank()}.pt")


def _config(folder: Path, model: Any) -> None:
    model.config.save_pretrained(folder)
    tokenizer("words", wrapped=True).save_pretrained(folder)
