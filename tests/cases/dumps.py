"""Dumps as their frameworks document them, written here by hand: the lines, and the rollouts that they hold."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from funcprobe.data.files import read_rollouts
from funcprobe.errors import FuncprobeWarning, Note
from funcprobe.types import Rollouts
from tests.cases.trl_runs import tokenizer

#: Two groups of two: prompt, completion, reward, advantage, log-probabilities.
SEQUENCES = [
    ([3, 4], [5, 6, 1], 1.0, 0.5, [-0.5, -1.0, -0.25]),
    ([3, 4], [7, 1], 0.0, -0.5, [-0.75, -0.125]),
    ([8], [9, 1], 1.0, 0.25, [-2.0, -0.5]),
    ([8], [9], 0.5, -0.25, [-1.5]),
]


class Written(NamedTuple):
    """A dump by hand: the lines of its file, and whether a framework writes log-probabilities, rewards, advantages."""

    file: str
    lines: list[dict[str, Any]]
    sampling: bool = True
    rewards: bool = True
    advantages: bool = True


def open_instruct(step: int = 3) -> Written:
    lines = [
        {
            "step": step,
            "sample_idx": i,
            "prompt_idx": i // 2,
            "prompt_tokens": prompt,
            "response_tokens": completion,
            "reward": reward,
            "advantage": advantage,
            "finish_reason": "stop",
            "dataset": "math",
            "ground_truth": None,
            "request_info": {"num_calls": 0},
            "logprobs": logps,
        }
        for i, (prompt, completion, reward, advantage, logps) in enumerate(SEQUENCES)
    ]
    return Written("run_rollouts_000000.jsonl", lines)


def nemo(step: int = 3, width: int = 6) -> Written:
    """As `log_batched_dict_as_jsonl` writes a batch: one row at a time, every value in a list of one, padded."""
    lines = []
    for i, (prompt, completion, reward, advantage, logps) in enumerate(SEQUENCES):
        ids = prompt + completion
        pad, before = [0] * (width - len(ids)), [0.0] * len(prompt)
        lines.append(
            {
                "content": ["text"],
                "rewards": [reward],
                "input_lengths": [len(ids)],
                "token_ids": [ids + pad],
                "token_loss_mask": [[0] * len(prompt) + [1] * len(completion) + pad],
                "sample_loss_mask": [1.0],
                "advantages": [[advantage] * width],
                "generation_logprobs": [before + logps + [0.0] * len(pad)],
                "prev_logprobs": [before + [x - 0.125 for x in logps] + [0.0] * len(pad)],
                "idx": i,
            }
        )
    return Written(f"train_data_step{step}.jsonl", lines)


def prime_rl(step: int = 3) -> Written:
    """As `TokenExporter` writes them, two sequences packed in a line, with nulls where a number is not finite."""
    lines = []
    for pair in (SEQUENCES[:2], SEQUENCES[2:]):
        line: dict[str, Any] = {"schema_version": 1, "step": step, "rank": 0, "env_name": "math"}
        names = ("token_ids", "position_ids", "loss_mask", "advantages", "inference_logprobs", "trainer_logprobs")
        line |= {name: [] for name in names}
        for prompt, completion, _, advantage, logps in pair:
            ids = prompt + completion
            line["token_ids"] += ids
            line["position_ids"] += range(len(ids))
            line["loss_mask"] += [False] * len(prompt) + [True] * len(completion)
            line["advantages"] += [0.0] * len(prompt) + [advantage] * len(completion)
            line["inference_logprobs"] += [None] * len(prompt) + logps
            line["trainer_logprobs"] += [None] * len(prompt) + logps
        lines.append(line)
    return Written("rank_0.jsonl", lines, rewards=False)


def torchtitan(version: int = 3) -> Written:
    lines: list[dict[str, Any]] = [
        {
            "is_validation": False,
            "group_id": 10 + i // 2,
            "rollout_id": i % 2,
            "status": "completed",
            "reward": reward,
            "reward_breakdown": {},
            "advantage": advantage,
            "turns": [
                {
                    "turn_id": 0,
                    "min_policy_version": version,
                    "max_policy_version": version,
                    "prompt_token_ids": prompt,
                    "completion_token_ids": completion,
                    "completion_logprobs": logps,
                }
            ],
        }
        for i, (prompt, completion, reward, advantage, logps) in enumerate(SEQUENCES)
    ]
    return Written("rollout_samples.jsonl", [*lines, {**lines[0], "is_validation": True}])


def texts(ids: list[int]) -> str:
    """Return the text of ids in the tokenizer of the real TRL runs, whose special tokens are left out."""
    return " ".join(f"w{i - 3}" for i in ids if i > 2)


def verl(step: int = 3) -> Written:
    lines = [
        {"input": texts(p), "output": texts(c), "gts": "4", "score": r, "step": step, "acc": r > 0.5}
        for p, c, r, _, _ in SEQUENCES
    ]
    return Written(f"{step}.jsonl", lines, sampling=False, advantages=False)


def ms_swift(step: int = 3) -> Written:
    """A table for every logging event; steps are text, and a reward has the name of its function."""
    table = {
        "step": [str(step)] * len(SEQUENCES),
        "prompt": [texts(s[0]) for s in SEQUENCES],
        "completion": [texts(s[1]) for s in SEQUENCES],
        "Accuracy": [s[2] for s in SEQUENCES],
        "advantages": [s[3] for s in SEQUENCES],
        "entropy": [0.5] * len(SEQUENCES),
    }
    return Written("completions.jsonl", [table], sampling=False)


#: By the name that `from_` takes, what a function here writes for a step.
BY_NAME = {
    "open-instruct": open_instruct,
    "nemo-rl": nemo,
    "prime-rl": prime_rl,
    "torchtitan": torchtitan,
    "verl": verl,
    "ms-swift": ms_swift,
}


def write(folder: Path, written: Written, lines: list[dict[str, Any]] | None = None) -> Path:
    """Write a dump under its framework's name, with other lines where they are given."""
    path = folder / written.file
    path.write_text("".join(json.dumps(line) + "\n" for line in (written.lines if lines is None else lines)))
    return path


def read(path: Path, from_: str = "auto", **options: Any) -> tuple[Rollouts, dict[str, str]]:
    """Read a dump; return the rollouts, and the warnings by kind."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = read_rollouts(path, from_=from_, **{"temperature": 0.7, "tokenizer": tokenizer(), **options})
    notes = [w.message.args[0] for w in caught if isinstance(w.message, FuncprobeWarning)]  # type: ignore[union-attr]
    assert all(isinstance(note, Note) for note in notes), notes
    return found, {note.kind: str(note) for note in notes}


def row(found: Rollouts, b: int, name: str) -> list[Any]:
    mask = found.completion_mask[b]
    values = getattr(found, name)
    return values[b][mask].tolist() if values.ndim == 2 else [values[b].item()]


def turn(prompt: list[int], completion: list[int], logps: list[float] | None = None) -> dict[str, Any]:
    made = {"min_policy_version": 3, "max_policy_version": 3, "prompt_token_ids": prompt}
    return made | {"completion_token_ids": completion, "completion_logprobs": logps}
