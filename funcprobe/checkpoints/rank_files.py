"""Weights and optimizer state as verl and SkyRL leave them: a file a process, each with its part of every tensor.

    actor/model_world_size_8_rank_3.pt      {name: DTensor}
    actor/optim_world_size_8_rank_3.pt      a torch.optim state_dict, its moments DTensors, its ids numbers

A DTensor says along which dimension it is cut, and which process has which part, so no process group is needed to put
one together. Read with `weights_only=True`, mapped into memory, one tensor at a time.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funcprobe.checkpoints.optimizer_state import Id, check_layout
from funcprobe.checkpoints.optimizer_values import check_groups
from funcprobe.checkpoints.saved_state import SavedState
from funcprobe.checkpoints.tensor_files import tensors_of
from funcprobe.checkpoints.weights import ShardedWeights, Stored
from funcprobe.data.numbers import whole
from funcprobe.errors import CheckpointError

_NAME = re.compile(r"(?P<kind>model|optim)_world_size_(?P<size>[0-9]{1,6})_rank_(?P<rank>[0-9]{1,6})\.pt")


def rank_files(folder: Path, kind: str) -> list[Path]:
    """Return the files of one kind, "model" or "optim", in the order of their ranks; none where there are none.

    Raises:
        CheckpointError: If one is missing, or they are of runs with different numbers of processes.
    """
    found: dict[int, Path] = {}
    sizes = set()
    for path in folder.glob(f"{kind}_world_size_*_rank_*.pt"):
        if named := _NAME.fullmatch(path.name):
            found[whole(named["rank"], 0)] = path
            sizes.add(whole(named["size"], 0))
    if len(sizes) > 1:
        raise CheckpointError(f"{folder} holds files of runs with {' and '.join(map(str, sorted(sizes)))} processes.")
    if sizes and sorted(found) != list(range(*sizes)):
        missing = next(rank for rank in range(*sizes) if rank not in found)
        raise CheckpointError(
            f"{folder} lacks '{kind}_world_size_{sizes.pop()}_rank_{missing}.pt', the part of one process; copy the "
            "whole folder."
        )
    return [found[rank] for rank in sorted(found)]


def weights_of_ranks(folder: Path) -> ShardedWeights:
    """Return the weights of all processes, put together one at a time.

    Raises:
        CheckpointError: If a file is missing, cannot be read, or holds anything but tensors by name.
    """
    files = rank_files(folder, "model")
    parts = _loaded(files)
    if not all(isinstance(part, Mapping) and all(isinstance(name, str) for name in part) for part in parts):
        raise CheckpointError(f"{files[0]} holds no tensors by name; expected the state_dict of a model.")
    first = {name: value for name, value in parts[0].items() if isinstance(value, Tensor)}
    stored = {n: Stored(tuple(t.shape), t.dtype if t.dtype.is_floating_point else None) for n, t in first.items()}
    return ShardedWeights(stored, lambda name: _whole([part.get(name) for part in parts], f"'{name}' in {folder}"))


def state_of_ranks(folder: Path) -> SavedState:
    """Return the optimizer state of all processes; its tensors stay in the files until they are asked for.

    Raises:
        CheckpointError: If a file is missing, cannot be read, or is no torch.optim state_dict.
    """
    files = rank_files(folder, "optim")
    parts = _loaded(files)
    for file, part in zip(files, parts, strict=True):
        check_layout(part, file.name)
        check_groups(part["param_groups"], file.name)
    what = f"the optimizer state in {folder}"
    state = {i: {key: _described(value) for key, value in of.items()} for i, of in parts[0]["state"].items()}

    def read(i: Id) -> Mapping[str, Any]:
        every = [part["state"].get(i, {}) for part in parts]
        keys = every[0]
        return {key: _whole([of.get(key) for of in every], f"{key} of parameter {i} in {folder}") for key in keys}

    return SavedState(what, {"state": state, "param_groups": parts[0]["param_groups"]}, read)


def _loaded(files: Sequence[Path]) -> list[Any]:
    import torch.distributed.tensor  # noqa: F401  lets weights_only read a DTensor

    with _without_groups():
        return [tensors_of(file, mapped=True) for file in files]


@contextmanager
def _without_groups() -> Iterator[None]:
    """Keep torch from saying that the processes of a file are not here: none of them is asked for anything."""
    logger = logging.getLogger("torch.distributed.device_mesh")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def _described(value: Any) -> Any:
    """Return a tensor of the shape and dtype of a whole one, without numbers; anything else as it is."""
    return torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, Tensor) else value


def _whole(parts: Sequence[Any], what: str) -> Any:
    """Return the tensor that the parts of all processes make up, or the value that all of them have.

    Raises:
        CheckpointError: If they make up none.
    """
    if not any(_is_sharded(part) for part in parts):
        _check_whole(parts, what)
        return parts[0]
    try:
        return _joined(parts)
    except (AttributeError, TypeError, ValueError, LookupError, RuntimeError):
        raise CheckpointError(
            f"{what} is no tensor cut along one dimension over {len(parts)} processes, the only kind that is put "
            "together here; the files are damaged, or of a run with tensor parallelism."
        ) from None


def _check_whole(parts: Sequence[Any], what: str) -> None:
    """Refuse the flat parameters of FSDP 1, of which every process has a piece that bears no names.

    Raises:
        CheckpointError: If the parts are such pieces.
    """
    first = parts[0]
    if not isinstance(first, Tensor) or first.dim() != 1:
        return
    if not all(isinstance(part, Tensor) and torch.equal(part, first) for part in parts):
        raise CheckpointError(
            f"{what} is a piece of a flat parameter of FSDP 1, and the files do not say which parameters it holds; "
            "train with strategy fsdp2, whose state is read."
        )


def _is_sharded(part: Any) -> bool:
    return hasattr(part, "_local_tensor")


def _joined(parts: Sequence[Any]) -> Tensor:
    """Return the tensor that parts of a DTensor make up.

    Raises:
        ValueError: If they do not.
    """
    placements = tuple(parts[0].placements)
    cut = [d for d, placement in enumerate(placements) if not placement.is_replicate()]
    if len(cut) > 1 or any(type(placements[d]).__name__ != "Shard" for d in cut):
        raise ValueError
    pieces: dict[int, Tensor] = {}
    for rank, part in enumerate(parts):
        ((*place,),) = (part.device_mesh.mesh == rank).nonzero().tolist()
        if (
            tuple(part.placements) != placements
            or part.shape != parts[0].shape
            or type(part._local_tensor) is not Tensor
        ):
            raise ValueError
        pieces.setdefault(place[cut[0]] if cut else 0, part._local_tensor)
    ordered = [pieces[i] for i in sorted(pieces)]
    found = torch.cat(ordered, placements[cut[0]].dim) if cut else ordered[0]
    if found.shape != parts[0].shape:
        raise ValueError
    return found
