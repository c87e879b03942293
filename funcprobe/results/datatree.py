"""Results as an `xarray.DataTree`, which ArviZ 1 takes its data in.

    /observables/entropy   before, change, first_order, …, change_error, …    scalars, or along `lr` or `update`
    /replicates/entropy    change, first_order, …                             along `prompt`, one of them left out
    /scores                logp, entropy, logp_after, …                       `sequence` × `token`, NaN past the end
    /batch, /evaluation    contribution, logp, entropy, …                     `sequence` × `token`, of an attribution
    /parameters, /ledger, /influence                                          of an attribution

Every variable has its unit in `attrs["units"]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from funcprobe import __version__
from funcprobe.attribution.influence import Influence
from funcprobe.attribution.token_parts import TokenParts
from funcprobe.attribution.token_tables import completion_ids
from funcprobe.data.rollouts import to_device
from funcprobe.errors import missing_extra
from funcprobe.measurement.evidence import Evidence
from funcprobe.measurement.outcome import Outcome
from funcprobe.results.column_units import units_of
from funcprobe.results.provenance import Provenance
from funcprobe.types import Json, Rollouts, TokenScores

if TYPE_CHECKING:
    from xarray import DataTree

#: (dimensions, values, attributes), of which xarray makes a variable.
Variable = tuple[Sequence[str], Any, Json]


class Group(NamedTuple):
    """A group of a tree: variables, coordinates and attributes of an xarray Dataset."""

    data_vars: Mapping[str, Variable]
    coords: Mapping[str, Any]
    attrs: Mapping[str, Any] = MappingProxyType({})


Groups = dict[str, Group]

#: Numbers of a reading, and those of them that replicates have.
_NUMBERS = ("before", "change", "first_order", "second_order", "remainder", "float_error")
_REPLICATED = ("change", "first_order", "second_order")


def tree_of(groups: Groups, kind: str, provenance: Provenance) -> DataTree:
    """Return groups as a tree, whose root says the kind of the result and the size of E.

    Raises:
        MissingExtraError: If xarray is not installed.
    """
    try:
        import xarray
    except ImportError as error:
        missing = missing_extra("xarray", "arviz", "a DataTree")
        raise missing from error
    sizes = {f"evaluation_{name}": count for name, count in provenance.evaluation._asdict().items()}
    attrs = {"kind": kind, "mode": provenance.mode, **sizes, "funcprobe": __version__}
    made = {name: xarray.Dataset(*group) for name, group in groups.items()}
    return xarray.DataTree.from_dict({"/": xarray.Dataset(attrs=attrs), **made})


def outcome_groups(
    outcomes: Sequence[Outcome],
    along: Mapping[str, Sequence[Any]],
    prompts: Tensor | None = None,
) -> Groups:
    """Return the observables of outcomes, and their replicates where there are any.

    Args:
        outcomes: One, or several along a dimension.
        along: The name of that dimension and its coordinate; empty for one outcome.
        prompts: The group ids of the prompts of E, rising; None where they are not known.
    """
    groups: Groups = {}
    lrs = np.array([np.nan if o.lr is None else o.lr for o in outcomes])
    coords: Json = {name: np.asarray(values) for name, values in along.items()}
    coords |= {} if "lr" in along else {"lr": (tuple(along), lrs if along else lrs[0])}
    for name in outcomes[0].readings:
        group = _readings(outcomes, name, tuple(along), coords)
        groups[f"observables/{_node(name)}"] = group
        if all(o.sampled is not None for o in outcomes):
            groups[f"replicates/{_node(name)}"] = _replicates(outcomes, name, tuple(along), coords, prompts)
    return groups


def _readings(outcomes: Sequence[Outcome], name: str, dims: tuple[str, ...], coords: Json) -> Group:
    readings = [o.readings[name] for o in outcomes]
    columns: dict[str, list[float | None]] = {n: [getattr(r, n) for r in readings] for n in _NUMBERS}
    for what in dict.fromkeys(what for r in readings for what in r.bars):
        for end in ("error", "low", "high"):
            columns[f"{what}_{end}"] = [getattr(r.bars.get(what), end, None) for r in readings]
    kept = {n: values for n, values in columns.items() if any(value is not None for value in values)}
    units = {n: "1" if n.startswith("ratio_") else readings[0].unit for n in kept}
    arrays = {n: np.array(values, dtype=np.float64) for n, values in kept.items()}
    found = {n: (dims, x if dims else x[0], {"units": units[n]}) for n, x in arrays.items()}
    levels = {bar.level for r in readings for bar in r.bars.values()}
    return Group(found, coords, {"observable": name, **({"level": levels.pop()} if len(levels) == 1 else {})})


def _replicates(
    outcomes: Sequence[Outcome], name: str, dims: tuple[str, ...], coords: Json, prompts: Tensor | None
) -> Group:
    """Return the values of ΔF, δF₁ and δF₂ with a prompt left out, or of a bootstrap's draws."""
    sampled = [o.sampled for o in outcomes if o.sampled is not None]
    method, count = sampled[0].replicates.method, len(sampled[0].replicates.values)
    own = "draw" if method == "bootstrap" else "prompt"
    known = own == "prompt" and prompts is not None and len(prompts) == count
    found = {}
    for k, what in enumerate(_REPLICATED):
        if all(what in o.readings[name].bars for o in outcomes):
            values = torch.stack([s.replicates.values[:, s.columns[name] + k] for s in sampled]).cpu().numpy()
            said = {"units": outcomes[0].readings[name].unit}
            found[what] = ((*dims, own), values if dims else values[0], said)
    labels = prompts.cpu().numpy() if known and prompts is not None else np.arange(count)
    return Group(found, {**coords, own: labels}, {"observable": name, "method": method})


def evidence_group(evidence: Evidence) -> Group:
    """Return the scores of E at θ and at θ′, and their tangents along Δθ where these were taken."""
    scores = {"": evidence.anchor, "_after": evidence.after}
    if evidence.along is not None:
        scores["_tangent"] = evidence.along.tangents
    cells = {f"{n}{end}": x for end, s in scores.items() for n, x in _fields(s).items()}
    return _tokens(TokenParts(evidence.rollouts, evidence.anchor, {}), cells, dict.fromkeys(cells, "nats"))


def parts_group(parts: TokenParts, unit: str) -> Group:
    """Return the contributions of the tokens of a batch, beside their scores at θ."""
    through = {f"through_{name}": x for name, x in parts.through.items()}
    cells = {"contribution": parts.total, **through, **_fields(parts.scores), **parts.predictors}
    return _tokens(parts, cells, units_of(cells, unit))


def influence_group(influence: Influence, unit: str) -> Group:
    """Return the influence matrix: rows of E, or its prompts, by sequences of U."""
    dims = (influence.by[:-1], "batch_sequence")
    coords = {dims[0]: influence.rows.numpy(), dims[1]: np.arange(influence.matrix.shape[1])}
    return Group({"influence": (dims, influence.matrix.numpy(), {"units": unit})}, coords)


def table_group(columns: Mapping[str, Any], dim: str, unit: str) -> Group:
    """Return a table whose first column names its rows: numbers as variables, words as coordinates."""
    first, *rest = columns
    arrays = {name: _array(columns[name]) for name in rest}
    units = units_of(rest, unit)
    found = {n: ((dim,), x, {"units": units[n]} if n in units else {}) for n, x in arrays.items() if x.dtype != object}
    words = {n: ((dim,), x.astype(str)) for n, x in arrays.items() if x.dtype == object}
    return Group(found, {dim: np.asarray(columns[first]), **words})


def _array(values: Any) -> np.ndarray:
    """Return a column: NaN for a number that is not there, and objects for words."""
    if isinstance(values, np.ndarray):
        return values
    words = any(isinstance(value, str) for value in values)
    return np.array(values, dtype=object) if words else np.array([np.nan if v is None else v for v in values])


def _fields(scores: TokenScores) -> dict[str, Tensor]:
    return {"logp": scores.logp, "entropy": scores.entropy}


def _tokens(parts: TokenParts, cells: Mapping[str, Tensor], units: Mapping[str, str]) -> Group:
    """Return variables `sequence × token`, NaN where the completion mask is 0, with the coordinates of a batch."""
    rollouts = to_device(parts.rollouts, torch.device("cpu"))
    mask = rollouts.completion_mask
    dims = ("sequence", "token")
    found: dict[str, Variable] = {}
    for name, x in cells.items():
        inside = torch.where(mask, x.detach().cpu().double(), torch.nan)
        found[name] = (dims, inside.numpy(), {"units": units[name]} if name in units else {})
    ids = torch.where(mask, completion_ids(parts._replace(rollouts=rollouts)), -1)
    coords: Json = {
        "sequence": np.arange(len(mask)),
        "token": np.arange(mask.shape[1]),
        "prompt": (("sequence",), rollouts.group_ids.numpy()),
        "token_id": (dims, ids.numpy(), {"missing": -1}),
    }
    given = {"reward": rollouts.rewards, "advantage": rollouts.advantages}
    coords |= {name: (dims[: x.ndim], x.detach().numpy()) for name, x in given.items() if x is not None}
    return Group(found, coords)


def prompts_of(rollouts: Rollouts) -> Tensor:
    """Return the group ids of the prompts that carry weight, rising: the order of replicates."""
    return torch.unique(rollouts.group_ids[rollouts.weight > 0]).cpu()


def _node(name: str) -> str:
    """Return the name of an observable as that of a group, in which a slash would be a level."""
    return name.replace("/", ".")
