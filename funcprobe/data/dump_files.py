"""Files and folders of dumps, recognised and read: JSONL, parquet, the tensors of `torch.save`, a folder of ranks."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funcprobe import plugins
from funcprobe.data.dump_rows import Row
from funcprobe.data.dump_text import encoded
from funcprobe.data.dumps import DUMPS, Dump, recognised, reward_names, sequences
from funcprobe.data.jsonl import column_of, objects_of
from funcprobe.data.parquet import parquet_names, parquet_rows
from funcprobe.data.ragged import Array, Ragged, ragged_from_lists
from funcprobe.data.schema import KNOWN, Columns, Table, metadata_of
from funcprobe.errors import FuncprobeWarning, InputError, Note, listed

#: Suffixes of pickles, which are opened as plain tensors and containers or not at all.
PICKLED = (".pt", ".pth", ".pkl", ".pickle")

#: Tokens of a row at most that a tensor stands for; an expanded one may claim more than any memory holds.
LONGEST = 2**24


def dump_in(path: Path, from_: str) -> str | None:
    """Return the name of the dump that a file or folder is, stated or by the keys of its first line; None for none.

    Raises:
        InputError: If `from_` is no name, or the first line cannot be read.
    """
    if from_ not in ("auto", "funcprobe", *DUMPS):
        raise InputError(f"from_ is {from_!r:.60}; expected auto, funcprobe, {', '.join(DUMPS)}.")
    if from_ != "auto":
        return None if from_ == "funcprobe" else from_
    if path.is_dir():
        return "prime-rl" if _ranks(path) else None
    if path.suffix in PICKLED:
        return "slime" if plugins.find("reader", path.suffix.removeprefix("."), {}) is None else None
    if path.suffix == ".parquet":
        return recognised(path.suffix, parquet_names(path))
    if path.suffix != ".jsonl":
        return None
    keys = next((set(row) for _, row in islice(objects_of(path), 1)), set[str]())
    own = "prompt_ids" in keys or "completion_ids" in keys
    return None if own else recognised(path.suffix, keys)


def read_dump(path: Path, name: str, tokenizer: Any, temperature: float | None) -> Table:
    """Return the columns of a dump under our names, a `step` of its file's name included.

    Raises:
        InputError: If it is broken, is text and there is no tokenizer, or there is no temperature; or if it is a
            pickle that holds more than tensors and containers.
        MissingExtraError: If a parquet file is read without pyarrow.
    """
    dump = DUMPS[name]
    _check_asked(dump, tokenizer, temperature)
    lines = list(_lines(path, dump))
    _check_sign(lines[:1], dump)
    _warn_of_rewards(path, lines[:1], dump)
    rows = [(n, row) for n, line in lines for row in sequences(n, line, dump)]
    if dump.is_text:
        rows = [(n, _encoded(n, row, tokenizer, dump)) for n, row in rows]
    if not rows:
        return Table({}, [], metadata_of({}))
    names = [name for name in KNOWN if any(row.get(name) is not None for _, row in rows)]
    columns: Columns = {name: _column(name, rows) for name in names}
    columns["temperature"] = np.full(len(rows), float(temperature or 0.0))
    if "step" not in columns and (step := _step_in(path)) is not None:
        columns["step"] = np.full(len(rows), step)
    return Table(_scored(columns), [], metadata_of({"retokenized": dump.is_text}))


def _check_asked(dump: Dump, tokenizer: Any, temperature: float | None) -> None:
    if dump.is_text and tokenizer is None:
        raise InputError(f"{dump.title} are text; give the tokenizer of the run as tokenizer=.")
    if temperature is None:
        raise InputError(
            f"{dump.title} do not say their temperature; give the one that the rows were sampled at as temperature=."
        )


def _check_sign(lines: Sequence[tuple[int, Row]], dump: Dump) -> None:
    for number, line in lines:
        if missing := sorted(dump.sign - set(line)):
            raise InputError(f"line {number} has no '{missing[0]}', which {dump.title} have; found {listed(line, 12)}.")


def _warn_of_rewards(path: Path, lines: Sequence[tuple[int, Row]], dump: Dump) -> None:
    if lines and len(names := reward_names(lines[0][1], dump)) > 1:
        text = f"{path}: the columns {', '.join(names)} are not read: the file does not say how they make the reward."
        warnings.warn(Note("columns", text), FuncprobeWarning, stacklevel=4)


def _lines(path: Path, dump: Dump) -> Iterable[tuple[int, Row]]:
    if path.is_dir():
        return [line for file in _ranks(path) for line in objects_of(file)]
    if path.suffix in PICKLED:
        return _unpickled(path)
    return enumerate(parquet_rows(path)) if path.suffix == ".parquet" else objects_of(path)


def _ranks(folder: Path) -> list[Path]:
    """Return the files of a step's ranks.

    Raises:
        InputError: If the mark is missing that they are complete.
    """
    files = sorted(folder.glob("rank_*.jsonl"))
    if files and not (folder / "STABLE").is_file():
        raise InputError(
            "the folder has no file STABLE, which marks that every rank has written its part; wait for it."
        )
    return files


def _unpickled(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        LookupError,
        ValueError,
        AttributeError,
        TypeError,
        MemoryError,
        OverflowError,
    ) as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it holds objects of {named[1]}" if named else "it is damaged, or a pickle of another kind"
        raise InputError(
            f"this cannot be read as plain tensors and containers, and nothing else is unpickled (slime's .pt and "
            f"SkyRL's .pkl are pickles): {reason}. Write the rollouts as JSONL or parquet where you trust the file."
        ) from None
    if not isinstance(found, dict) or not isinstance(found.get("samples"), list):
        raise InputError("this holds no list 'samples', as slime's rollout data does; write it as JSONL or parquet.")
    for number, sample in enumerate(found["samples"]):
        if not isinstance(sample, dict):
            raise InputError(f"sample {number} is {type(sample).__name__}; expected a dict.")
        yield number, {name: _listed(x) for name, x in sample.items()} | {"rollout": found.get("rollout_id")}


def _listed(value: Any) -> Any:
    """Return a tensor of numbers as a list; any other value, and a tensor that is more than a row, as it is."""
    is_row = isinstance(value, Tensor) and value.ndim == 1 and value.layout == torch.strided and not value.is_meta
    return value.tolist() if is_row and value.numel() <= LONGEST else value


def _encoded(number: int, row: Row, tokenizer: Any, dump: Dump) -> Row:
    try:
        return encoded(row, tokenizer, dump.rendered)
    except InputError as error:
        raise InputError(f"line {number}: {error}") from None


def _column(name: str, rows: list[tuple[int, Row]]) -> Ragged | Array:
    if name == "advantage" and any(isinstance(row.get(name), list) for _, row in rows):
        return ragged_from_lists([row.get(name) or [] for _, row in rows], name, float)
    return column_of(name, rows)


def _step_in(path: Path) -> int | None:
    """Return the step in the name of a file, as in train_data_step12.jsonl; None where there is none."""
    found = re.search(r"step_?([0-9]{1,18})$", path.stem)
    return None if found is None else int(found[1])


def _scored(columns: Columns) -> Columns:
    """Return the columns with the old policy's log-probs where the sampler reported none; without it where unknown."""
    sampling, old, mask = (columns.get(name) for name in ("sampling_logps", "old_logps", "completion_mask"))
    if not isinstance(sampling, Ragged):
        return columns
    chosen = mask.values if isinstance(mask, Ragged) else np.ones(len(sampling.values), bool)
    if len(chosen) != len(sampling.values) or not (unscored := np.isnan(sampling.values) & chosen).any():
        return columns
    if isinstance(old, Ragged) and len(old.values) == len(sampling.values) and not np.isnan(old.values[unscored]).any():
        return columns | {"sampling_logps": sampling._replace(values=np.where(unscored, old.values, sampling.values))}
    text = (
        f"The sampler reported no log-probability (NaN) for {int(unscored.sum())} of {int(chosen.sum())} tokens, and "
        "nothing stands in for it, so its log-probabilities are left out."
    )
    warnings.warn(Note("unscored tokens", text), FuncprobeWarning, stacklevel=4)
    left_out = ("sampling_logps", "old_logps") if old is not None and _same(old, sampling) else ("sampling_logps",)
    return {name: column for name, column in columns.items() if name not in left_out}


def _same(old: Any, sampling: Ragged) -> bool:
    return np.array_equal(old.values, sampling.values, equal_nan=True)
