"""The lines of other frameworks' dumps as sequences: masked, packed, in turns, or in a table of columns.

Every function here takes a line whose keys have the names of `schema` already, and returns the sequences in it, each
with `prompt_ids` and `completion_ids` (or `prompt` and `completion`, where the dump is text) and the fields beside
them. `tokens` and `marks` are the ids of a whole sequence and the mask of those that the policy chose.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from funcprobe.errors import InputError

#: A line of a dump, or a sequence in one.
Row = dict[str, Any]

#: Fields with one number a token.
BY_TOKEN = ("tokens", "marks", "sampling_logps", "old_logps", "advantage")


def as_it_is(line: Row) -> list[Row]:
    """Return the one sequence of a line."""
    return [line]


def masked(line: Row) -> list[Row]:
    """Return the sequence of a line of ids and mask: its completion begins at the first token that the mask marks.

    `length`, where there is one, is the number of ids before padding; a `counts` of 0 takes every token out of the
    loss. A field that a batch of one has wrapped in a list of one is taken out of it.

    Raises:
        InputError: If a field has another length than the ids.
    """
    line = _unwrapped(line)
    length, counts = line.pop("length", None), line.pop("counts", 1)
    if length is not None:
        if not isinstance(length, int) or not 0 <= length <= len(_listed(line, "tokens")):
            raise InputError(f"the length is {length!r:.60}; expected a number of ids, of which there are fewer.")
        line = {name: value[:length] if _is_by_token(name, value) else value for name, value in line.items()}
    (row,) = [_split(line)]
    return [row if counts else {**row, "completion_mask": [0] * len(row["completion_ids"])}]


def packed(line: Row) -> list[Row]:
    """Return the sequences of a line that holds several, end to end: one begins wherever `positions` do not go on.

    A piece in which no token is marked, such as padding, is left out.

    Raises:
        InputError: If a field has another length than the ids.
    """
    positions = _listed(line, "positions")
    rest = {name: value for name, value in line.items() if name != "positions"}
    _check_lengths(rest, len(positions))
    if wrong := [x for x in positions if not isinstance(x, int)]:
        raise InputError(f"a position is {wrong[0]!r:.60}; expected whole numbers.")
    _listed(rest, "marks")
    starts = [i for i, (last, now) in enumerate(pairwise([None, *positions])) if last is None or now != last + 1]
    pieces = [
        {name: value[start:end] if _is_by_token(name, value) else value for name, value in rest.items()}
        for start, end in pairwise([*starts, len(positions)])
    ]
    return [_split(piece) for piece in pieces if any(piece["marks"])]


def in_turns(line: Row) -> list[Row]:
    """Return the sequences of a line of turns, each of which has the conversation so far and a completion.

    A turn whose prompt begins with all that came before goes on with it, and the tokens in between, which a tool or a
    user wrote, are masked out; any other turn begins a sequence of its own. A line of validation has no sequence.

    Raises:
        InputError: If a turn has no ids.
    """
    found: list[Row] = []
    shared = {name: value for name, value in line.items() if name not in ("turns", "validation")}
    if line.get("validation"):
        return found
    for turn in _listed(line, "turns"):
        prompt, completion = (_of_turn(turn, name) for name in ("prompt_token_ids", "completion_token_ids"))
        logps = None if turn.get("completion_logprobs") is None else _listed(turn, "completion_logprobs")
        if not found or not _goes_on(found[-1], prompt):
            row = {"prompt_ids": prompt, "completion_ids": [], "completion_mask": [], "sampling_logps": []}
            found.append(shared | row | {"step": turn.get("max_policy_version")})
        before = len(found[-1]["prompt_ids"]) + len(found[-1]["completion_ids"])
        _go_on(found[-1], prompt[before:], completion, logps)
    known = [{name: x for name, x in row.items() if x is not None} for row in found]
    return [row | {"old_logps": row["sampling_logps"]} if "sampling_logps" in row else row for row in known]


def in_a_table(line: Row) -> list[Row]:
    """Return the sequences of a line that is a table: every field a list with one entry a sequence.

    Raises:
        InputError: If fields have different lengths.
    """
    columns = {name: _listed(line, name) for name in line}
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(f"the columns of the table have different lengths ({lengths!r:.80}); expected one.")
    return [dict(zip(columns, entries, strict=True)) for entries in zip(*columns.values(), strict=True)]


def after_the_prompt(line: Row) -> list[Row]:
    """Return the sequence of a line of ids whose last `length` are the completion, with mask and log-probs of it.

    Raises:
        InputError: If there are fewer ids than that.
    """
    tokens, length = _listed(line, "tokens"), line.get("length")
    if not isinstance(length, int) or not 0 <= length < len(tokens):
        raise InputError(f"the completion has {length!r:.60} of {len(tokens)} ids; expected fewer, and a whole number.")
    start = len(tokens) - length
    rest = {name: value for name, value in line.items() if name not in ("tokens", "length")}
    return [rest | {"prompt_ids": tokens[:start], "completion_ids": tokens[start:]}]


def _split(row: Row) -> Row:
    """Return one masked sequence as prompt and completion, fields of tokens cut to the completion."""
    tokens, marks = _listed(row, "tokens"), _listed(row, "marks")
    _check_lengths(row, len(tokens))
    start = next((i for i, mark in enumerate(marks) if mark), len(tokens))
    rest = {name: value[start:] if _is_by_token(name, value) else value for name, value in row.items()}
    completion, mask = rest.pop("tokens"), rest.pop("marks")
    return rest | {"prompt_ids": tokens[:start], "completion_ids": completion, "completion_mask": mask}


def _goes_on(row: Row, prompt: list[Any]) -> bool:
    """Return whether a prompt begins with all that a sequence holds so far."""
    start, end = len(row["prompt_ids"]), len(row["prompt_ids"]) + len(row["completion_ids"])
    if len(prompt) < end:
        return False
    return bool(prompt[:start] == row["prompt_ids"] and prompt[start:end] == row["completion_ids"])


def _go_on(row: Row, between: list[Any], completion: list[Any], logps: list[Any] | None) -> None:
    """Lay a turn behind the earlier ones: tokens that nobody chose, and a completion."""
    row["completion_ids"] += [*between, *completion]
    row["completion_mask"] += [0] * len(between) + [1] * len(completion)
    if logps is None or row["sampling_logps"] is None:
        row["sampling_logps"] = None  # known for every turn, or for none
    else:
        row["sampling_logps"] += [0.0] * len(between) + logps


def _of_turn(turn: Any, name: str) -> list[Any]:
    if not isinstance(turn, dict) or not isinstance(turn.get(name), list):
        raise InputError(f"a turn has no '{name}'; the recorder writes ids where it is told log_tensors=True.")
    ids: list[Any] = turn[name]
    return ids


def _unwrapped(line: Row) -> Row:
    tokens = _listed(line, "tokens")
    if len(tokens) != 1 or not isinstance(tokens[0], list):
        return line
    return {name: x[0] if isinstance(x, list) and len(x) == 1 else x for name, x in line.items()}


def _is_by_token(name: str, value: Any) -> bool:
    return name in BY_TOKEN and isinstance(value, list)


def _check_lengths(row: Row, length: int) -> None:
    for name, value in row.items():
        if _is_by_token(name, value) and len(value) != length:
            raise InputError(f"'{name}' has {len(value)} values for {length} tokens; expected one a token.")


def _listed(row: Row, name: str) -> list[Any]:
    value = row.get(name)
    if not isinstance(value, list):
        raise InputError(f"'{name}' is {type(value).__name__}; expected a list.")
    return value
