"""The optimizer state of a checkpoint, from numbered parameters to named ones, or a refusal.

`optimizer.pt` stores no names: parameters are numbered group by group, and inside a group they follow
`named_parameters()`. `transformers.Trainer` keeps decayed parameters in group 0 and the others in group 1, by a rule
that differs between its releases, so numbering all parameters in their own order is wrong for a full model and may
fail unseen, because shapes agree. The split is therefore solved for: the shapes of the groups' states must interleave,
each group in order, into the shapes of the named parameters, and in one way only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funcprobe.errors import CheckpointError
from funcprobe.optimizers.state import as_tensor
from funcprobe.types import OptState

Shape = tuple[int, ...]
#: What a state_dict goes by: torch's own numbers parameters, a gathered FSDP one names them.
Id = int | str
#: How many parameters of every group have been placed.
Placed = tuple[int, ...]

#: What can be done without a saved state, as a configuration and as a call say it.
FRESH = "Set optimizer: fresh and lr (in Python optimizer='fresh', lr=...) for the first step of a new AdamW"

#: State entries that have no shape of their leaf, and pairs of which one lacks its columns and the other its rows.
_SCALARS = frozenset({"step", "mu_product", "eta", "mu", "RMS"})
_FACTORED = (("row_var", "col_var"), ("exp_avg_sq_row", "exp_avg_sq_col"))

#: What wrappers put into the name of a parameter: DDP and accelerate before it, the others anywhere.
_WRAPPERS = re.compile(r"^(module\.)+|(?:(?<=\.)|^)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")

#: Placements kept for one parameter; more of them mean that many groups have the same shapes in the same order.
_TOO_MANY = 10_000


def map_ids_to_names(
    named_shapes: Mapping[str, Shape], optimizer_state_dict: Mapping[str, Any], what: str = "optimizer.pt"
) -> dict[Id, str]:
    """Return the name of every parameter id in a torch.optim state_dict, verified by group sizes and shapes.

    Counts the order-preserving interleavings of the groups' shape sequences into the names' shape sequence by dynamic
    programming over how many parameters each group has placed, and accepts exactly one. An id without state (it never
    stepped) fits any shape. Groups that carry `param_names` are read by those, and ids that are names by themselves,
    without what wrappers put into them. Where nothing is stored for any id and the groups have equal hyperparameters,
    every assignment is the same optimizer and the plain order is returned.

    Args:
        named_shapes: The trainable leaves, in `named_parameters()` order.
        optimizer_state_dict: `{"state": {id: {...}}, "param_groups": [{..., "params": [ids]}]}`, ids being numbers or
            names.
        what: What messages call the state.

    Raises:
        CheckpointError: If counts or shapes do not fit, or if more than one mapping does.

    Example:
        >>> state = {i: {"exp_avg": torch.zeros(n)} for i, n in enumerate([3, 3, 2])}
        >>> saved = {"state": state, "param_groups": [{"params": [0, 1]}, {"params": [2]}]}
        >>> map_ids_to_names({"a": (3,), "a_norm": (2,), "b": (3,)}, saved)
        {0: 'a', 2: 'a_norm', 1: 'b'}
    """
    check_layout(optimizer_state_dict, what)
    groups = [list(group["params"]) for group in optimizer_state_dict["param_groups"] if group["params"]]
    ids: list[Id] = [i for group in groups for i in group]
    _check_counts(named_shapes, ids, optimizer_state_dict["state"], what)
    if ids and all(isinstance(i, str) for i in ids):
        by_name = _by_own_names([str(i) for i in ids], named_shapes, what)
        return _verified(by_name, named_shapes, optimizer_state_dict["state"], what)
    if named := _stored_names(optimizer_state_dict, named_shapes):
        return _verified(named, named_shapes, optimizer_state_dict["state"], what)
    if not optimizer_state_dict["state"] and _equal_hyperparameters(optimizer_state_dict["param_groups"]):
        return dict(zip(ids, named_shapes, strict=True))
    shapes = [[_shape(i, optimizer_state_dict["state"], what) for i in group] for group in groups]
    paths = _interleavings(named_shapes, shapes, what)
    mappings = [_numbered(named_shapes, groups, path) for path in paths]
    if len(mappings) > 1:
        raise CheckpointError(_ambiguous(named_shapes, mappings, what))
    return mappings[0]


def without_wrappers(name: str) -> str:
    """Return a parameter's name without the parts that wrappers (DDP, FSDP, torch.compile, checkpointing) put into it.

    Example:
        >>> without_wrappers("module._orig_mod.layers.0._checkpoint_wrapped_module.weight")
        'layers.0.weight'
    """
    while (plain := _WRAPPERS.sub("", name)) != name:
        name = plain
    return name


def names_of_groups(param_groups: Sequence[Mapping[str, Any]], names: Mapping[Any, str]) -> list[list[str]]:
    """Return for every param_group, empty ones included, the names of its parameters in its own order."""
    return [[names[i] for i in group["params"]] for group in param_groups]


def state_by_name(state: Mapping[Any, Mapping[str, Any]], names: Mapping[Any, str]) -> OptState:
    """Return the state keyed by parameter name, sharing storage; a parameter that never stepped has an empty one."""
    return {name: named_entries(name, state.get(i, {})) for i, name in names.items()}


def named_entries(name: str, entries: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state of one parameter as tensors, sharing storage; entries that are None are left out."""
    return {
        key: value.detach() if isinstance(value, Tensor) else as_tensor(name, key, value)
        for key, value in entries.items()
        if value is not None
    }


def counted_beside(param_groups: Sequence[Mapping[str, Any]], names: Mapping[Any, str]) -> dict[str, bool]:
    """Return for every parameter whether its group, fused or capturable, keeps `step` as float32 beside it."""
    return {
        names[i]: bool(group.get("fused") or group.get("capturable")) for group in param_groups for i in group["params"]
    }


def as_loaded(entries: Mapping[str, Tensor], leaf: Tensor, beside: bool = False) -> dict[str, Tensor]:
    """Return the state of one leaf, placed and typed as `torch.optim.Optimizer.load_state_dict` does.

    Moments take device and dtype of their parameter, because torch's kernels refuse a mixture. `step` stays as it was
    saved, unless it is wanted `beside` the parameter, as float32. What fits is not copied.
    """
    return {key: _placed(key, value, leaf, beside) for key, value in entries.items()}


def check_layout(state_dict: Any, what: str = "optimizer.pt") -> None:
    """Check that a loaded object is a torch.optim state_dict.

    Raises:
        CheckpointError: If it is something else, naming what was found in it.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        found = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise CheckpointError(
            f"{what} holds {found}; expected a torch.optim state_dict with 'state' and 'param_groups'."
        )
    state, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(state, Mapping) or not all(isinstance(entry, Mapping) for entry in state.values()):
        raise CheckpointError(f"'state' in {what} is no mapping of parameter ids to named tensors.")
    if not isinstance(groups, Sequence) or not all(isinstance(g, Mapping) and "params" in g for g in groups):
        raise CheckpointError(f"'param_groups' in {what} is no list of groups with 'params' in each.")


def _check_counts(names: Mapping[str, Shape], ids: list[Id], state: Mapping[Id, Any], what: str) -> None:
    if len(set(ids)) != len(ids):
        raise CheckpointError(f"{what} lists a parameter id in two groups; the file is damaged.")
    if stray := [i for i in state if i not in set(ids)]:
        raise CheckpointError(f"{what} holds state for id {stray[0]!r}, which is in no group; the file is damaged.")
    if len(ids) != len(names):
        raise CheckpointError(
            f"{what} numbers {len(ids)} parameters and the model has {len(names)} trainable ones; they do not belong "
            "together. Load the weights that were saved beside it, and train the same leaves as the run did."
        )


def _stored_names(state_dict: Mapping[str, Any], names: Mapping[str, Shape]) -> dict[Id, str] | None:
    """Return the names that the optimizer was built with (torch keeps them as `param_names`), if the model has them."""
    stored: dict[Id, str] = {}
    for group in state_dict["param_groups"]:
        stored |= zip(group["params"], group.get("param_names", ()), strict=False)
    plain = {without_wrappers(name): name for name in names}
    found = {i: plain[without_wrappers(name)] for i, name in stored.items() if without_wrappers(name) in plain}
    return found if set(found.values()) == set(names) and len(found) == len(stored) else None


def _by_own_names(ids: list[str], names: Mapping[str, Shape], what: str) -> dict[Id, str]:
    """Return the leaf of every id that is a name itself.

    Raises:
        CheckpointError: If a leaf has no id, or an id is that of no leaf.
    """
    plain = {without_wrappers(name): name for name in names}
    found: dict[Id, str] = {i: plain[without_wrappers(i)] for i in ids if without_wrappers(i) in plain}
    if stray := [i for i in ids if i not in found]:
        missing = sorted(set(names).difference(found.values()))
        raise CheckpointError(
            f"{what} goes by names, and '{stray[0]}' is no trainable parameter of the model (the model's "
            f"'{missing[0]}' has no entry); load the weights that were saved beside it, and train the same leaves."
        )
    if len(set(found.values())) != len(ids):
        raise CheckpointError(f"{what} holds two states for one parameter under different prefixes; it is damaged.")
    return found


def _verified(named: dict[Id, str], names: Mapping[str, Shape], state: Mapping[Id, Any], what: str) -> dict[Id, str]:
    for i, name in named.items():
        if (found := _shape(i, state, what)) not in (None, tuple(names[name])):
            raise CheckpointError(
                f"The state of '{name}' in {what} has shape {found} and the parameter {tuple(names[name])}; they do "
                "not belong together."
            )
    return named


def _equal_hyperparameters(param_groups: Sequence[Mapping[str, Any]]) -> bool:
    filled = [{k: v for k, v in g.items() if k not in ("params", "param_names")} for g in param_groups if g["params"]]
    return all(group == filled[0] for group in filled)


def _shape(i: Id, state: Mapping[Id, Any], what: str) -> Shape | None:
    """Return the shape of the leaf that the state of an id is of; None for an id without state.

    Adafactor keeps sums over rows and over columns, which have the shape between them.

    Raises:
        CheckpointError: If its tensors differ in shape.
    """
    entries = {k: v for k, v in state.get(i, {}).items() if k not in _SCALARS and isinstance(v, Tensor)}
    shapes = {key: tuple(value.shape) for key, value in entries.items()}
    for row, column in _FACTORED:
        if row in shapes and column in shapes:
            rows = shapes.pop(row)  # [..., n, 1] in torch, [..., n] in transformers
            shapes["second moment"] = (*(rows[:-1] if row == "row_var" else rows), *shapes.pop(column)[-1:])
    if len(set(shapes.values())) > 1:
        raise CheckpointError(
            f"The state tensors of id {i} in {what} differ in shape: {shapes}; one shape was expected."
        )
    return next(iter(shapes.values()), None)


def _interleavings(names: Mapping[str, Shape], groups: list[list[Shape | None]], what: str) -> list[list[int]]:
    """Return one or, where there are several, two ways to interleave the groups: for every name its group.

    Raises:
        CheckpointError: If there is no way, or if there are too many to be kept.
    """
    layers: list[set[Placed]] = [{(0,) * len(groups)}]
    for name, shape in names.items():
        layer = {
            _advanced(placed, g) for placed in layers[-1] for g in range(len(groups)) if _fits(placed, g, groups, shape)
        }
        if not layer:
            raise CheckpointError(_no_fit(name, tuple(shape), layers[-1], groups, what))
        if len(layer) > _TOO_MANY:
            raise CheckpointError(
                f"{what} is ambiguous: its {len(groups)} groups have too many parameters of equal shapes to be told "
                f"apart (at '{name}'). {_REMEDY}"
            )
        layers.append(layer)
    return _traced(layers, list(names.values()), groups)


def _traced(layers: list[set[Placed]], shapes: list[Shape], groups: list[list[Shape | None]]) -> list[list[int]]:
    """Walk back from the end, where every group is used up; at a fork two walks go on. Every layer is reachable."""
    walks: list[tuple[Placed, list[int]]] = [(next(iter(layers[-1])), [])]
    for depth in range(len(shapes) - 1, -1, -1):
        onward = []
        for placed, path in walks:
            for g in range(len(groups)):
                before = _advanced(placed, g, -1)
                if before in layers[depth] and _fits(before, g, groups, shapes[depth]):
                    onward.append((before, [g, *path]))
        walks = onward[:2]
    return [path for _, path in walks]


def _fits(placed: Placed, g: int, groups: list[list[Shape | None]], shape: Shape) -> bool:
    return placed[g] < len(groups[g]) and groups[g][placed[g]] in (None, tuple(shape))


def _advanced(placed: Placed, g: int, by: int = 1) -> Placed:
    return (*placed[:g], placed[g] + by, *placed[g + 1 :])


def _numbered(names: Mapping[str, Shape], groups: list[list[Id]], path: list[int]) -> dict[Id, str]:
    queues = [iter(group) for group in groups]
    return {next(queues[g]): name for name, g in zip(names, path, strict=True)}


def _no_fit(name: str, shape: Shape, layer: set[Placed], groups: list[list[Shape | None]], what: str) -> str:
    offered = {groups[g][placed[g]] for placed in layer for g in range(len(groups)) if placed[g] < len(groups[g])}
    listed = " or ".join(str(s) for s in sorted(offered, key=str))
    return (
        f"{what} does not fit the model: the first parameter without a place is '{name}' of shape {shape}, where the "
        f"{'next state' if len(groups) == 1 else 'next states of the groups'} would be of shape {listed}. Load the "
        "weights that were saved beside it, and train the same leaves as the run did."
    )


def _ambiguous(names: Mapping[str, Shape], mappings: list[dict[Id, str]], what: str) -> str:
    one, other = mappings
    i = next(i for i in one if one[i] != other[i])
    return (
        f"{what} is ambiguous: the state of id {i} fits '{one[i]}' as well as '{other[i]}' (both of shape "
        f"{tuple(names[one[i]])}), and the file stores no names. {_REMEDY}"
    )


_REMEDY = (
    "from_training(model, optimizer), called in Python inside the training process, reads names from the live pair. "
    f"{FRESH}."
)


def _placed(key: str, value: Tensor, leaf: Tensor, beside: bool) -> Tensor:
    if key == "step":
        return value.to(device=leaf.device, dtype=torch.float32) if beside else value
    return value.to(device=leaf.device, dtype=leaf.dtype)
