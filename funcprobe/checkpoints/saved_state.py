"""An optimizer's state as a checkpoint holds it: described before it is read, and read one parameter at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from funcprobe.checkpoints.optimizer_state import Id, check_layout
from funcprobe.checkpoints.optimizer_values import check_entries, check_groups
from funcprobe.checkpoints.tensor_files import tensors_of
from funcprobe.errors import CheckpointError


class SavedState(NamedTuple):
    """A torch.optim state_dict whose tensors may still lie on disk."""

    what: str  #: what messages call it
    described: Mapping[str, Any]  #: the state_dict; its tensors may be on `meta`, with shape and dtype alone
    read: Callable[[Id], Mapping[str, Any]]  #: the entries of one parameter, with their numbers; nothing if none

    def entries(self, i: Id) -> Mapping[str, Any]:
        """Return the entries of one parameter, checked.

        Raises:
            CheckpointError: If one is damaged, or cannot be read.
        """
        found = self.read(i)
        check_entries(i, found, self.what)
        return found


def state_of_file(path: Path, *, mapped: bool = False) -> SavedState:
    """Return the state in an `optimizer.pt`; `mapped` leaves its tensors in the file.

    Raises:
        CheckpointError: If it is missing, needs unpickling, or is no torch.optim state_dict.
    """
    if not path.exists():
        raise CheckpointError(f"The optimizer state {path} does not exist.")
    return state_in(tensors_of(path, mapped=mapped), path.name)


def state_in(state_dict: Any, what: str) -> SavedState:
    """Return the state in a state_dict that is there with its tensors.

    Raises:
        CheckpointError: If it is none, or a hyperparameter is out of range.
    """
    check_layout(state_dict, what)
    check_groups(state_dict["param_groups"], what)
    state: Mapping[Id, Mapping[str, Any]] = state_dict["state"]
    return SavedState(what, state_dict, lambda i: state.get(i, {}))


class StateOnDisk(Mapping[str, dict[str, Tensor]]):
    """A state by name whose tensors are read when they are asked for, one leaf at a time."""

    def __init__(self, names: Mapping[str, Id], read: Callable[[str], dict[str, Tensor]]) -> None:
        self._names, self._read = names, read

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
