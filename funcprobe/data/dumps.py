"""Dumps of rollouts that training frameworks write: a row of `DUMPS` for each, with its columns by our names.

| from | file | ids or text | sampler's log-probs | rows that a checkpoint at step N is stepped on |
|---|---|---|---|---|
| trl | completions_*.parquet | text | no | step N + 1 |
| ms-swift | completions.jsonl | text | no | step N + 1 |
| verl | {step}.jsonl | text | no | step N + 1 |
| open-instruct | {run}_rollouts_*.jsonl | ids | logprobs | step N + 1 |
| nemo-rl | train_data_step{N}.jsonl | ids | generation_logprobs | step N + 1 |
| prime-rl | step_{N}/rank_{R}.jsonl, or the folder | ids | inference_logprobs | step N + 1 |
| torchtitan | rollout_samples.jsonl | ids | completion_logprobs | policy version N |
| slime | rollout_data_*.pt | ids | rollout_log_probs | rollout N |

Sources, of August 2026: TRL `GRPOTrainer.log`; ms-swift `GRPOTrainer.log`; verl `RayPPOTrainer._dump_generations`;
open-instruct `rl_utils.RolloutRecord`; NeMo-RL `Logger.log_batched_dict_as_jsonl`; prime-rl `TokenExporter`; torchtitan
`RolloutSampleRecorder`; slime `Sample.to_dict`. prime-rl and torchtitan take their ratio against the sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from funcprobe.data.dump_rows import Row, after_the_prompt, as_it_is, in_a_table, in_turns, masked, packed
from funcprobe.errors import InputError


class Dump(NamedTuple):
    """A framework's dump: how it is recognised, its columns by our names, and how its lines are sequences."""

    title: str  #: for messages
    sign: frozenset[str]  #: keys that all its lines have, and those of no other dump
    columns: Mapping[str, tuple[str, ...]]  #: its name -> ours, of which `dump_rows` has some more
    rows: Callable[[Row], list[Row]]  #: the sequences of a line
    suffix: str = ".jsonl"
    is_text: bool = False
    rendered: bool = False  #: whether a chat template has been applied to a prompt of text
    #: columns between which rewards stand, one a reward function, under names of their own
    rewards: tuple[str, str] | None = None
    lead: int = 1  #: rows of step N + lead are those that a checkpoint at step N is stepped on


def _dump(title: str, sign: str, columns: Mapping[str, str], rows: Any = as_it_is, **more: Any) -> Dump:
    ours = {theirs: tuple(names.split()) for theirs, names in columns.items()}
    return Dump(title, frozenset(sign.split()), ours, rows, **more)


#: By the name that `from_` takes. What a dump's columns are called is told above; `sampling_logps` may be `old_logps`
#: as well, where a framework's ratio is against the sampler.
DUMPS: dict[str, Dump] = {
    "trl": _dump(
        "TRL's completions",
        "step prompt completion advantage",
        {"step": "step", "prompt": "prompt", "completion": "completion", "advantage": "advantage"},
        suffix=".parquet",
        is_text=True,
        rewards=("completion", "advantage"),
    ),
    "ms-swift": _dump(
        "ms-swift's completions",
        "step prompt completion advantages",
        {"step": "step", "prompt": "prompt", "completion": "completion", "advantages": "advantage"},
        in_a_table,
        is_text=True,
        rendered=True,
        rewards=("completion", "advantages"),
    ),
    "verl": _dump(
        "verl's generations",
        "input output score step",
        {"input": "prompt", "output": "completion", "score": "reward", "step": "step", "uid": "group_id"},
        is_text=True,
    ),
    "open-instruct": _dump(
        "open-instruct's rollouts",
        "prompt_tokens response_tokens prompt_idx",
        {
            "step": "step",
            "prompt_idx": "group_id",
            "prompt_tokens": "prompt_ids",
            "response_tokens": "completion_ids",
            "reward": "reward",
            "advantage": "advantage",
            "logprobs": "sampling_logps",
        },
    ),
    "nemo-rl": _dump(
        "NeMo-RL's train data",
        "token_ids token_loss_mask sample_loss_mask",
        {
            "token_ids": "tokens",
            "token_loss_mask": "marks",
            "input_lengths": "length",
            "sample_loss_mask": "counts",
            "rewards": "reward",
            "advantages": "advantage",
            "generation_logprobs": "sampling_logps",
            "prev_logprobs": "old_logps",
        },
        masked,
    ),
    "prime-rl": _dump(
        "prime-rl's token exports",
        "token_ids position_ids loss_mask inference_logprobs",
        {
            "step": "step",
            "token_ids": "tokens",
            "position_ids": "positions",
            "loss_mask": "marks",
            "advantages": "advantage",
            "inference_logprobs": "sampling_logps old_logps",
        },
        packed,
    ),
    "torchtitan": _dump(
        "torchtitan's rollout samples",
        "group_id rollout_id turns",
        {
            "group_id": "group_id",
            "is_validation": "validation",
            "turns": "turns",
            "reward": "reward",
            "advantage": "advantage",
        },
        in_turns,
        lead=0,
    ),
    "slime": _dump(
        "slime's rollout data",
        "tokens response_length",
        {
            "rollout": "step",
            "group_index": "group_id",
            "tokens": "tokens",
            "response_length": "length",
            "reward": "reward",
            "loss_mask": "completion_mask",
            "rollout_log_probs": "sampling_logps",
        },
        after_the_prompt,
        suffix=".pt",
        lead=0,
    ),
}


def recognised(suffix: str, keys: Iterable[str]) -> str | None:
    """Return the name of the dump whose signs are among the keys of a line, or the names of columns; None if none is.

    Example:
        >>> recognised(".jsonl", ["input", "output", "gts", "score", "step"])
        'verl'
    """
    found = set(keys)
    return next((name for name, dump in DUMPS.items() if dump.suffix == suffix and dump.sign <= found), None)


def reward_names(keys: Iterable[str], dump: Dump) -> list[str]:
    """Return the columns of rewards that have names of their own; where there are several, their weights are unknown.

    Example:
        >>> reward_names(["step", "prompt", "completion", "accuracy", "advantage"], DUMPS["trl"])
        ['accuracy']
    """
    names = list(keys)
    if dump.rewards is None or not set(dump.rewards) <= set(names):
        return []
    first, last = map(names.index, dump.rewards)
    return names[first + 1 : last]


def sequences(number: int, line: Row, dump: Dump) -> list[Row]:
    """Return the sequences of a line by our names; null fields are left out, and a step that is text is a number.

    Raises:
        InputError: If the line does not hold what the dump's lines hold; the message begins with its number.
    """
    columns = dump.columns
    if len(rewards := reward_names(line, dump)) == 1:
        columns = {**columns, rewards[0]: ("reward",)}
    given = {ours: line[name] for name, several in columns.items() for ours in several if line.get(name) is not None}
    try:
        rows = dump.rows(given)
    except InputError as error:
        raise InputError(f"line {number}: {error}") from None
    return [{name: _plain(name, value) for name, value in row.items()} for row in rows]


def _plain(name: str, value: Any) -> Any:
    is_text = name == "step" and isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19
    return int(value) if is_text else value
