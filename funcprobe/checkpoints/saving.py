"""A checkpoint folder as transformers.Trainer writes it, from pure values."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from funcprobe.checkpoints.models import quiet, structural_copy
from funcprobe.checkpoints.optimizer_state import map_ids_to_names
from funcprobe.data.atomic import fresh_directory
from funcprobe.errors import CheckpointError, missing_extra
from funcprobe.optimizers.any_class import LiftedOptimizer
from funcprobe.optimizers.closed_form import PureOptimizer
from funcprobe.optimizers.groups import Group
from funcprobe.optimizers.state import state_to_torch
from funcprobe.optimizers.stored import Storage, narrowed, narrowed_state
from funcprobe.tree import same_keys
from funcprobe.types import OptState, Params


def save_checkpoint(
    folder: str | Path,
    module: nn.Module,
    params: Params,
    optimizer: PureOptimizer | LiftedOptimizer,
    opt_state: OptState,
    tokenizer: Any = None,
    global_step: int = 0,
) -> Path:
    """Write the folder that transformers.Trainer would have written, so that `load_checkpoint` returns the same bits.

    `module` gives configuration and frozen weights, `params` the trainable leaves; neither is changed. The ids in
    `optimizer.pt` are the decayed leaves in `named_parameters()` order, then the others, by the decay rule of the
    installed transformers; group 1 exists even where it is empty, as under LoRA. Every group keeps the hyperparameters
    that its leaves have in `optimizer`, learning rate included. What a `stored` optimizer keeps in a narrower dtype is
    written in that, weights and moments, as its run would. Written beside and renamed, so nothing is half there.

    Raises:
        CheckpointError: If the folder exists and is not empty, if the module cannot save itself, or if the groups could
            not be told apart again on loading.
        InputError: If `params` are not the module's trainable leaves, or `opt_state` is not theirs.
        MissingExtraError: If transformers is not installed.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} exists and is not empty; give a new folder, nothing is overwritten.")
    if not hasattr(module, "save_pretrained"):
        raise CheckpointError(f"A {type(module).__name__} cannot save itself; expected a transformers or peft model.")
    trainable: Params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    same_keys(trainable, params, what="module's trainable leaves and the parameters")
    storage: Storage = getattr(optimizer, "storage", {})
    opt_state = narrowed_state(opt_state, params, storage)
    params = narrowed({name: params[name] for name in trainable}, storage)
    saved = trainer_state_dict(module, params, optimizer, opt_state)
    with fresh_directory(path, overwrite=True, marked=False) as partial:  # there is none, or an empty one
        _write(partial, structural_copy(module, params), saved, tokenizer, global_step)
    return path


def trainer_state_dict(
    module: nn.Module, params: Params, optimizer: PureOptimizer | LiftedOptimizer, opt_state: OptState
) -> dict[str, Any]:
    """Return `optimizer.pt` in the Trainer's order of ids, checked against the state that loading will make of it.

    Raises:
        CheckpointError: If loading could not tell its groups apart.
        InputError: If a leaf has no group or no state.
        MissingExtraError: If transformers is not installed.
    """
    ordered = dataclasses.replace(optimizer, groups=_trainer_groups(module, params, optimizer.groups))
    saved = state_to_torch(ordered, opt_state, list(params))
    order = [name for group in ordered.groups for name in group.names or ()]
    read = map_ids_to_names({name: tuple(p.shape) for name, p in params.items()}, saved)
    if saved["state"] and read != dict(enumerate(order)):
        raise CheckpointError(
            "The optimizer's groups do not follow the order of the module's parameters; reorder them."
        )
    return saved


def _trainer_groups(module: nn.Module, params: Params, groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """Return the groups split into decayed leaves first and the others second, each in the order of `params`."""
    decayed = _decayed(module)
    ordered: list[Group] = []
    for half in ([n for n in params if n in decayed], [n for n in params if n not in decayed]):
        split = [
            Group(tuple(n for n in half if group.names is None or n in group.names), group.hyperparameters)
            for group in groups
        ]
        ordered += [group for group in split if group.names] or [Group((), groups[-1].hyperparameters)]
    return tuple(ordered)


def _decayed(module: nn.Module) -> set[str]:
    """Return the names that the installed transformers.Trainer decays; asked of the class, which needs no instance."""
    try:
        from transformers.trainer import Trainer
    except ImportError as error:
        missing = missing_extra("transformers", "hf", "writing a Hugging Face checkpoint")
        raise missing from error
    rule: Any = Trainer.get_decay_parameter_names
    return set(rule(None, module))


def _write(path: Path, module: nn.Module, saved: dict[str, Any], tokenizer: Any, global_step: int) -> None:
    from transformers.trainer_callback import TrainerState

    with quiet():
        module.save_pretrained(str(path))  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(str(path))
    torch.save(saved, path / "optimizer.pt")
    TrainerState(global_step=global_step).save_to_json(str(path / "trainer_state.json"))
