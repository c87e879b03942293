"""An attribution on disk: numbers in JSON, arrays in safetensors, nothing pickled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from funcprobe.attribution.influence import Influence
from funcprobe.attribution.parameter_parts import LeafPart
from funcprobe.attribution.token_parts import TokenParts
from funcprobe.data.atomic import fresh_directory, write_arrays
from funcprobe.errors import InputError
from funcprobe.measurement.evidence import NOISE
from funcprobe.measurement.readings import bar_from_dict
from funcprobe.results.probe import ProbeResult, json_safe
from funcprobe.types import Rollouts, TokenScores

if TYPE_CHECKING:
    from funcprobe.results.attribution import Attribution

#: Raised when a field changes its meaning.
SCHEMA_VERSION = 1

#: The files of an attribution, beside those of its result.
FILES = ("attribution.json", "attribution.safetensors")

_BATCHES = ("evaluation", "update")


def save(attribution: Attribution, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write the folder `path`, whole or not at all.

    Raises:
        InputError: If the folder exists and `overwrite` is false.
    """
    with fresh_directory(path, overwrite=overwrite) as folder:
        write_into(attribution, folder)
    return Path(path)


def write_into(attribution: Attribution, folder: Path) -> None:
    """Write an attribution's files, and its result's, into an existing folder."""
    attribution.result.write_into(folder)
    influence, vocabulary = attribution.influence, attribution.vocabulary
    arrays = {f"{batch}.{name}": x for batch in _BATCHES for name, x in _arrays(getattr(attribution, batch)).items()}
    if influence is not None:
        arrays |= {"influence.matrix": influence.matrix, "influence.rows": influence.rows}
    plain = {
        "schema_version": SCHEMA_VERSION,
        "observable": attribution.observable,
        "form": attribution.form,
        "leaves": [part._asdict() for part in attribution.leaves],
        "ledger": attribution.ledger,
        "completeness": attribution.completeness,
        "influence": None if influence is None else {"by": influence.by, "leaves": influence.leaves},
        "vocabulary": None if vocabulary is None else list(vocabulary.items()),
        "bars": {
            table: {row: found._asdict() for row, found in rows.items()} for table, rows in attribution.bars.items()
        },
        "arrays": list(arrays),  # in their order, which safetensors does not keep
    }
    (folder / FILES[0]).write_text(
        json.dumps(json_safe(plain), indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    write_arrays({name: x.clone() for name, x in arrays.items()}, folder / FILES[1])


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the fields of the attribution in a folder.

    Raises:
        InputError: If there is none, it is damaged, or it has another schema version.
    """
    folder = Path(path)
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise InputError(
            f"{folder} holds no {missing[0]}; expected a folder that Attribution.save or `funcprobe attribute` wrote."
        )
    result = ProbeResult.load(folder)
    try:
        plain = json.loads((folder / FILES[0]).read_text(encoding="utf-8"))
        version = plain.get("schema_version") if isinstance(plain, dict) else None
        if version != SCHEMA_VERSION:
            raise InputError(
                f"{folder / FILES[0]} has schema version {version}; this funcprobe reads {SCHEMA_VERSION}."
            )
        stored = load_file(folder / FILES[1])
        arrays = {name: stored[name] for name in plain["arrays"]}
        parts = {batch: _parts(_under(batch, arrays)) for batch in _BATCHES}
        main = result.readings[plain["observable"]]
        for batch, expected in (("evaluation", main.first_order), ("update", plain["ledger"]["gradient on U"])):
            _check_sum(folder, batch, parts[batch], expected, NOISE * abs(main.before))
        return {
            "result": result,
            "observable": plain["observable"],
            "form": plain["form"],
            "leaves": tuple(LeafPart(**part) for part in plain["leaves"]),
            **parts,
            "influence": _influence(plain["influence"], arrays),
            "vocabulary": None if plain["vocabulary"] is None else dict(plain["vocabulary"]),
            "bars": {
                table: {row: bar_from_dict(found) for row, found in rows.items()}
                for table, rows in plain["bars"].items()
            },
        }
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise InputError(f"{folder} is not a whole attribution ({error}); its files are damaged.") from error


def _check_sum(folder: Path, batch: str, parts: TokenParts, expected: float, noise: float) -> None:
    """Check that stored parts are those of the stored sum.

    Raises:
        InputError: If they are another attribution's, or some are missing.
    """
    if not abs(parts.sum() - expected) <= 1e-6 * parts.magnitude() + noise:
        raise InputError(
            f"The {batch} tokens in {folder} sum to {parts.sum():g}, and {expected:g} is stored beside them; its files "
            "are damaged, or those of two attributions."
        )


def _arrays(parts: TokenParts) -> dict[str, Tensor]:
    found = {f"rollouts.{name}": x for name, x in parts.rollouts._asdict().items() if x is not None}
    found |= {"scores.logp": parts.scores.logp, "scores.entropy": parts.scores.entropy}
    for group, values in (("extra", parts.scores.extra), ("through", parts.through), ("predictors", parts.predictors)):
        found |= {f"{group}.{name}": x for name, x in values.items()}
    return found


def _parts(arrays: Mapping[str, Tensor]) -> TokenParts:
    scores = _under("scores", arrays)
    return TokenParts(
        Rollouts(**_under("rollouts", arrays)),
        TokenScores(scores["logp"], scores["entropy"], _under("extra", arrays)),
        _under("through", arrays),
        _under("predictors", arrays),
    )


def _influence(plain: Mapping[str, Any] | None, arrays: Mapping[str, Tensor]) -> Influence | None:
    if plain is None:
        return None
    leaves = None if plain["leaves"] is None else tuple(plain["leaves"])
    return Influence(arrays["influence.matrix"].to(torch.float64), plain["by"], arrays["influence.rows"], leaves)


def _under(prefix: str, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): x for name, x in arrays.items() if name.startswith(f"{prefix}.")}
