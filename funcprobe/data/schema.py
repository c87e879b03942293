"""The columns of a rollout file, one row per sequence, and the errors that every reader raises about them.

column              type          field            when absent
prompt_ids          list of int   ids              an error
completion_ids      list of int   ids              an error
temperature         float         temperature      an error
completion_mask     list of 0/1   completion_mask  every completion token was chosen by the policy
sampling_logps      list of float sampling_logps   unknown
old_logps           list of float old_logps        unknown
ref_logps           list of float ref_logps        unknown
reward              float         rewards          unknown
advantage           float         advantages       unknown
group_id            int or text   group_ids        equal prompts form a group
weight              float         weight           1
top_p               float         top_p            unrestricted
top_k               int           top_k            unrestricted
step                int           step             unknown
"""

from __future__ import annotations

from typing import Any, NamedTuple

from funcprobe.data.ragged import Array, Ragged
from funcprobe.errors import InputError

SCHEMA_VERSION = 1

#: Columns with one number per token, and the type of the number.
LIST_COLUMNS: dict[str, type] = {
    "prompt_ids": int,
    "completion_ids": int,
    "completion_mask": bool,
    "sampling_logps": float,
    "old_logps": float,
    "ref_logps": float,
}

#: Columns with one number per sequence, and the type of the number.
ROW_COLUMNS: dict[str, type] = {
    "reward": float,
    "advantage": float,
    "group_id": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "step": int,
    "weight": float,
}

KNOWN = (*LIST_COLUMNS, *ROW_COLUMNS)
REQUIRED = ("prompt_ids", "completion_ids", "temperature")

#: Columns in memory: ragged for lists, an array [B] for numbers.
Columns = dict[str, Ragged | Array]


class Table(NamedTuple):
    """The contents of a rollout file, column by column."""

    columns: Columns  #: the known columns that are there and not empty
    unknown: list[str]  #: names of the columns that funcprobe does not know
    metadata: dict[str, Any]  #: `schema_version`, `tokenizer` and `retokenized`: see `metadata_of`


def check_columns(found: list[str]) -> None:
    """Check that a file has the columns that every rollout needs.

    Raises:
        InputError: Naming the missing columns and those that were found.
    """
    if missing := [name for name in REQUIRED if name not in found]:
        raise InputError(
            f"the column {_quoted(missing)} is missing; found {_quoted(found)}. A rollout file needs "
            f"{_quoted(REQUIRED)} (the temperature is the one that the rows were sampled at)."
        )


def metadata_of(found: dict[str, Any]) -> dict[str, Any]:
    """Return `schema_version` (an int, None where not stated), `tokenizer` (None likewise) and `retokenized`.

    The last is whether the ids were made again from text, and so may differ from those that were sampled.

    Raises:
        InputError: If the version is one that this release does not read.
    """
    version = found.get("schema_version")
    if version is not None and str(version) != str(SCHEMA_VERSION):
        raise InputError(
            f"the schema version is {version!r:.60}; this release reads version {SCHEMA_VERSION}. Update funcprobe, or "
            "write the file again with this release."
        )
    stamped = str(found.get("retokenized")) == "True"  # a footer holds text, a header a truth value
    known = None if version is None else SCHEMA_VERSION
    return {"schema_version": known, "tokenizer": found.get("tokenizer"), "retokenized": stamped}


def type_error(name: str, found: object, example: str = "") -> InputError:
    """Return the error for a column of the wrong type; the example names the row and shows its value."""
    kind = {int: "int", float: "float", bool: "0/1"}[LIST_COLUMNS.get(name) or ROW_COLUMNS[name]]
    expected = f"list of {kind}" if name in LIST_COLUMNS else "int or text" if name == "group_id" else kind
    return InputError(f"the column '{name}' has type {found}; expected {expected}{example}.")


def _quoted(names: Any) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"
