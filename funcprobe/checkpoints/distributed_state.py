"""Weights and optimizer state in a torch.distributed.checkpoint folder, by the names of the model's parameters.

accelerate, prime-rl, AReaL, NeMo-RL and torchtitan join nested names with dots, each under words of its own:
`optimizer.state.<name>.exp_avg` and `app.optimizers.state.<name>.exp_avg` are one thing. Groups come numbered, with a
list of their parameters, or, where the state was flattened, as options of every parameter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from funcprobe.checkpoints.distributed_files import DistributedFiles
from funcprobe.checkpoints.optimizer_state import FRESH, Id, check_layout
from funcprobe.checkpoints.optimizer_values import check_groups
from funcprobe.checkpoints.saved_state import SavedState
from funcprobe.checkpoints.weights import ShardedWeights, Stored
from funcprobe.errors import CheckpointError

_OPTIMIZER = r"^(?:.+?\.)??(?:optimizers?|optim)\."
_ENTRY = re.compile(_OPTIMIZER + r"state\.(?P<name>.+)\.(?P<entry>[^.]+)$", re.DOTALL)
_OPTION = re.compile(_OPTIMIZER + r"param_groups\.(?P<group>.+)\.(?P<option>[^.]+)$", re.DOTALL)


def state_of_distributed(files: DistributedFiles) -> SavedState:
    """Return the optimizer state in a folder; its tensors stay there until they are asked for.

    Raises:
        CheckpointError: If there is none, or its groups cannot be read.
    """
    entries: dict[str, dict[str, str]] = {}
    for key in [*files.contents.tensors, *files.contents.values]:
        if found := _ENTRY.match(key):
            entries.setdefault(found["name"], {})[found["entry"]] = key
    if not entries:
        raise CheckpointError(f"{files.folder} holds no optimizer state: none of its keys stands under one. {FRESH}.")
    what = f"the optimizer state in {files.folder}"
    described: dict[str, Any] = {
        "state": {name: {e: _described(files, key) for e, key in keys.items()} for name, keys in entries.items()},
        "param_groups": _groups(files),
    }
    check_layout(described, what)
    check_groups(described["param_groups"], what)

    def read(i: Id) -> Mapping[str, Any]:
        return {entry: _read(files, key) for entry, key in entries.get(str(i), {}).items()}

    return SavedState(what, described, read)


def weights_of_distributed(files: DistributedFiles) -> ShardedWeights:
    """Return the weights in a folder, which stay there until they are asked for.

    Raises:
        CheckpointError: If it holds none.
    """
    keys = {}
    for key in files.contents.tensors:
        *outer, name = files.path(key)
        if not _ENTRY.match(key) and (not outer or outer[-1] == "model"):
            keys[name] = key
    if not keys:
        raise CheckpointError(f"{files.folder} holds no weights: none of its tensors stands under 'model'.")
    entries = {name: files.contents.tensors[key] for name, key in keys.items()}
    stored = {n: Stored(e.shape, e.dtype if e.dtype.is_floating_point else None) for n, e in entries.items()}
    return ShardedWeights(stored, lambda name: files.tensor(keys[name]))


def _described(files: DistributedFiles, key: str) -> Any:
    return files.described(key) if key in files.contents.tensors else files.value(key)


def _read(files: DistributedFiles, key: str) -> Any:
    return files.tensor(key) if key in files.contents.tensors else files.value(key)


def _groups(files: DistributedFiles) -> list[dict[str, Any]]:
    """Return the param_groups, with the names of parameters in place of ids."""
    options: dict[str, dict[str, Any]] = {}
    for key in [*files.contents.values, *files.contents.tensors]:
        if found := _OPTION.match(key):
            options.setdefault(found["group"], {})[found["option"]] = _read(files, key)
    numbered = {group: found for group, found in options.items() if group.isdecimal()}
    if numbered:
        return [{"params": [], **numbered[group]} for group in sorted(numbered, key=int)]
    together: dict[str, dict[str, Any]] = {}
    for name, of in options.items():
        plain = {option: value for option, value in of.items() if option not in ("params", "param_names")}
        together.setdefault(repr(sorted(plain.items())), {**plain, "params": []})["params"].append(name)
    return list(together.values())
