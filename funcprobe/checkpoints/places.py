"""Where a checkpoint has its weights, its optimizer state and its configuration, and which framework wrote it.

    transformers, TRL                 config.json, model.safetensors, optimizer.pt or optimizer.bin
    accelerate's FSDP                 pytorch_model_fsdp_0/, optimizer_0/
    prime-rl, AReaL, torchtitan       .metadata and *.distcp, of torch.distributed.checkpoint
    verl, SkyRL                       actor/ or policy/: model_world_size_W_rank_r.pt, optim_..., huggingface/

DeepSpeed and Megatron are known by their files and refused, with the command of their own tools that makes a folder
which can be read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from funcprobe.checkpoints.distributed_files import DistributedFiles
from funcprobe.checkpoints.distributed_metadata import TABLE
from funcprobe.checkpoints.distributed_state import state_of_distributed, weights_of_distributed
from funcprobe.checkpoints.optimizer_state import FRESH
from funcprobe.checkpoints.rank_files import rank_files, state_of_ranks, weights_of_ranks
from funcprobe.checkpoints.saved_state import SavedState, state_of_file
from funcprobe.checkpoints.weights import ShardedWeights
from funcprobe.errors import CheckpointError

#: Subfolders in which frameworks keep the policy and its optimizer: verl, SkyRL, prime-rl.
_INNER = ("actor", "policy", "trainer")

#: Folders of steps, of which one has to be given.
_STEPS = ("checkpoint-*", "global_step_*", "step_*", "step-*")

#: Framework -> names that only its checkpoints have, and how it makes a folder that can be read.
_FOREIGN: Mapping[str, tuple[tuple[str, ...], str]] = {
    "DeepSpeed ZeRO": (
        ("global_step[0-9]*", "*_optim_states.pt", "*_model_states.pt", "zero_to_fp32.py", "zero_pp_rank_*"),
        "python zero_to_fp32.py FOLDER OUTPUT --safe_serialization",
    ),
    "Megatron": (
        ("iter_[0-9]*", "latest_checkpointed_iteration.txt", "mp_rank_*", "dist_ckpt", "common.pt"),
        "python convert_checkpoints.py export --hf-model MODEL --megatron-path FOLDER --hf-path OUTPUT",
    ),
}

#: Names of FSDP's shards.
_FSDP = {"the weights": ("pytorch_model_fsdp*", "*.distcp"), "the optimizer state": ("optimizer_[0-9]*", "*.distcp")}


class Part(NamedTuple):
    """Weights or an optimizer state, and how they are laid out."""

    path: Path
    layout: Literal["whole", "distributed", "ranks"]


class Place(NamedTuple):
    """A checkpoint by its parts; None for one that it does not have."""

    folder: Path
    weights: Part | None
    optimizer: Part | None
    home: Path | None  #: the folder with config.json, or adapter_config.json, and the tokenizer
    framework: str | None  #: who wrote it; None where the files are transformers' own

    def sharded_weights(self) -> ShardedWeights | None:
        """Return the weights that several processes wrote; None where they are safetensors.

        Raises:
            CheckpointError: If they cannot be read.
        """
        if self.weights is None or self.weights.layout == "whole":
            return None
        if self.weights.layout == "ranks":
            return weights_of_ranks(self.weights.path)
        return weights_of_distributed(DistributedFiles(self.weights.path))

    def saved_state(self, *, mapped: bool) -> SavedState:
        """Return the optimizer's state; `mapped` leaves its tensors on disk.

        Raises:
            CheckpointError: If there is none, or it cannot be read.
        """
        if self.optimizer is None:
            raise CheckpointError(f"{self.folder} holds no optimizer state.")
        if self.optimizer.layout == "ranks":
            return state_of_ranks(self.optimizer.path)
        if self.optimizer.layout == "distributed":
            return state_of_distributed(DistributedFiles(self.optimizer.path))
        return state_of_file(self.optimizer.path, mapped=mapped)


def place_of(folder: Path) -> Place:
    """Return the parts of a checkpoint, found by the names of its files; nothing of them is read.

    Raises:
        CheckpointError: If rank files are missing.
    """
    inner = (folder / name for name in _INNER if not (folder / "config.json").is_file())
    folder = next((path for path in inner if _weights(path) or _optimizer(path)), folder)
    weights, optimizer = _weights(folder), _optimizer(folder)
    homes = (folder, folder / "huggingface")
    home = next((h for h in homes for n in ("adapter_config.json", "config.json") if (h / n).is_file()), None)
    return Place(folder, weights, optimizer, home, _framework(folder, {*_layouts(weights, optimizer)}))


def refuse_missing_weights(place: Place) -> None:
    """Say why there are no weights.

    Raises:
        CheckpointError: Always, with the framework whose files stand in their place, and what to do.
    """
    path = place.folder
    _refuse_foreign(path, "the weights")
    if place.home is None:
        inner = sorted(p.name for pattern in _STEPS for p in path.glob(pattern) if p.is_dir())
        hint = f" It holds {inner[-1]}: give that folder." if inner else ""
        raise CheckpointError(
            f"{path} has neither config.json (a full model) nor adapter_config.json (an adapter).{hint}"
        )
    if pickled := sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(f"*model*{pattern[1:]}")):
        raise CheckpointError(
            f"{path} holds its weights as {pickled[0]}, a pickle, which is never loaded; convert it to safetensors "
            "(load it where you trust it, then model.save_pretrained(folder), which writes safetensors)."
        )
    raise CheckpointError(f"{path} holds no {_weights_name(path)}.safetensors; the weights are missing.")


def refuse_missing_optimizer(place: Place) -> None:
    """Say why there is no optimizer state.

    Raises:
        CheckpointError: Always, with the framework whose files stand in its place, and what to do.
    """
    _refuse_foreign(place.folder, "the optimizer state")
    raise CheckpointError(
        f"{place.folder} holds no optimizer.pt, so Adam's moments are unknown and so is the step that the run would "
        f"take (the trainer was told to save the model only?). {FRESH}, which represents nothing of the run."
    )


def _weights_name(folder: Path) -> str:
    return "adapter_model" if (folder / "adapter_config.json").is_file() else "model"


def _weights(folder: Path) -> Part | None:
    name = _weights_name(folder)
    if list(folder.glob(f"{name}*.safetensors")):
        return Part(folder, "whole")
    if name != "model":  # shards of an adapter are not read
        return None
    if rank_files(folder, "model"):
        return Part(folder, "ranks")
    return _distributed(folder, "pytorch_model_fsdp_0")


def _optimizer(folder: Path) -> Part | None:
    """Return the optimizer's state: whole in `optimizer.pt`, or `optimizer.bin`, as accelerate has it, or in shards."""
    for name in ("optimizer.pt", "optimizer.bin"):
        if (folder / name).is_file():
            return Part(folder / name, "whole")
    if rank_files(folder, "optim"):
        return Part(folder, "ranks")
    return _distributed(folder, "optimizer_0")


def _distributed(folder: Path, name: str) -> Part | None:
    places = (folder / name, *([] if list(_foreign(folder, "Megatron")) else [folder]))
    return next((Part(path, "distributed") for path in places if (path / TABLE).is_file()), None)


def _layouts(*parts: Part | None) -> Iterator[str]:
    yield from (part.layout for part in parts if part is not None)


def _framework(folder: Path, layouts: set[str]) -> str | None:
    if "ranks" in layouts:
        return {"actor": "verl", "policy": "SkyRL"}.get(folder.name, "verl or SkyRL")
    if "distributed" not in layouts:
        return None
    if (folder / TABLE).is_file():
        return "prime-rl" if folder.name == "trainer" else "torch.distributed.checkpoint"
    return "accelerate's FSDP"


def _foreign(folder: Path, framework: str) -> Iterator[str]:
    """Yield the names of files and folders that only a framework's checkpoints have."""
    yield from sorted(path.name for pattern in _FOREIGN[framework][0] for path in folder.glob(pattern))


def _refuse_foreign(folder: Path, what: str) -> None:
    if list(folder.glob("global_step_[0-9]*")):  # verl keeps a file of Megatron's name beside its steps
        return
    for framework, (_, command) in _FOREIGN.items():
        if found := next(_foreign(folder, framework), None):
            raise CheckpointError(
                f"{folder} holds {what} as {framework} shards ({found}), which are not read. Its own tool writes the "
                f"weights as a folder that is: {command}; load that with optimizer: fresh, or use "
                "from_training(model, optimizer) in the training process."
            )
    if found := next((path.name for pattern in _FSDP[what] for path in sorted(folder.glob(pattern))), None):
        raise CheckpointError(
            f"{folder} holds {what} as FSDP shards ({found}) without the table of them, {TABLE}; copy the whole "
            "folder, hidden files too, or save with torch.distributed.checkpoint."
        )
