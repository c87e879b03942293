"""Tables of token contributions as plain columns: by token, sequence, prompt and position; movers and correlations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funcprobe.attribution.decoding import shown
from funcprobe.attribution.token_parts import TokenParts
from funcprobe.errors import InputError

#: Columns by name: what a pandas frame or a parquet file is made of.
Columns = dict[str, Any]

Vocabulary = Mapping[int, str] | None


def completion_ids(parts: TokenParts) -> Tensor:
    """Return the token id at every completion position, `[B, T]`; 0 past the end of a row."""
    r = parts.rollouts
    columns = r.prompt_lengths[:, None] + torch.arange(r.completion_mask.shape[1])
    inside = columns < r.attention_mask.sum(1, keepdim=True)
    return torch.where(inside, r.ids.gather(1, columns.clamp(max=r.ids.shape[1] - 1)), 0)


def token_columns(parts: TokenParts, vocabulary: Vocabulary = None) -> Columns:
    """Return a row for every completion token: place, text, contribution, and the scores that it went through."""
    r = parts.rollouts
    row, position = parts.mask.nonzero(as_tuple=True)
    token = completion_ids(parts)[row, position].tolist()
    cells = _contributions(parts)
    cells |= {"logp": parts.scores.logp, "entropy": parts.scores.entropy, **parts.predictors}
    by_row = {"advantage": r.advantages, "reward": r.rewards}
    given = {name: x[row] if x.ndim == 1 else x[row, position] for name, x in by_row.items() if x is not None}
    return {
        "sequence": row.numpy(),
        "prompt": r.group_ids[row].numpy(),
        "position": position.numpy(),
        "token": np.array(token, dtype=np.int64),
        "text": [shown(t, vocabulary) for t in token],
        **{name: x[row, position].numpy() for name, x in cells.items()},
        **{name: x.numpy() for name, x in given.items()},
    }


def sequence_columns(parts: TokenParts, vocabulary: Vocabulary = None) -> Columns:
    """Return a row for every sequence: contribution, length, advantage (the mean of its tokens') and text."""
    r, mask = parts.rollouts, parts.mask
    length = mask.sum(1)
    cells = _contributions(parts)
    means = {"logp": parts.scores.logp, "entropy": parts.scores.entropy}
    by_row = {"advantage": _of_rows(r.advantages, mask), "reward": r.rewards}
    ids = completion_ids(parts)
    return {
        "sequence": np.arange(len(r.ids)),
        "prompt": r.group_ids.numpy(),
        "length": length.numpy(),
        **{name: x.sum(1).numpy() for name, x in cells.items()},
        **{f"mean_{name}": (x.sum(1) / length.clamp(min=1)).numpy() for name, x in means.items()},
        **{name: x.sum(1).numpy() for name, x in parts.predictors.items()},
        **{name: x.numpy() for name, x in by_row.items() if x is not None},
        "text": [_joined(ids[b][mask[b]].tolist(), vocabulary) for b in range(len(r.ids))],
    }


def _of_rows(advantages: Tensor | None, mask: Tensor) -> Tensor | None:
    if advantages is None or advantages.ndim == 1:
        return advantages
    return torch.where(mask, advantages, 0.0).sum(1) / mask.sum(1).clamp(min=1)


def prompt_columns(parts: TokenParts, vocabulary: Vocabulary = None) -> Columns:
    """Return a row for every prompt (group): the sums over its sequences."""
    r = parts.rollouts
    groups, member = torch.unique(r.group_ids, return_inverse=True)
    first = [int((member == g).nonzero()[0]) for g in range(len(groups))]
    cells = _contributions(parts)
    count = torch.bincount(member, minlength=len(groups))

    def summed(x: Tensor) -> Tensor:
        return torch.zeros(len(groups), dtype=torch.float64).index_add(0, member, x.double())

    tokens = summed(parts.mask.sum(1))
    found: Columns = {
        "prompt": groups.numpy(),
        "sequences": count.numpy(),
        "tokens": tokens.long().numpy(),
        **{name: summed(x.sum(1)).numpy() for name, x in cells.items()},
        "mean_entropy": (summed(parts.scores.entropy.sum(1)) / tokens.clamp(min=1)).numpy(),
    }
    if r.rewards is not None:
        found["mean_reward"] = (summed(r.rewards) / count).numpy()
    found["text"] = [_joined(r.ids[b, : int(r.prompt_lengths[b])].tolist(), vocabulary) for b in first]
    return found


def position_columns(parts: TokenParts, vocabulary: Vocabulary = None) -> Columns:
    """Return a row for every completion position that holds a token."""
    tokens = parts.mask.sum(0)
    held = tokens > 0
    cells = _contributions(parts)
    return {
        "position": held.nonzero().flatten().numpy(),
        "tokens": tokens[held].numpy(),
        **{name: x.sum(0)[held].numpy() for name, x in cells.items()},
        "mean_entropy": (parts.scores.entropy.sum(0)[held] / tokens[held]).numpy(),
    }


#: Every table of a batch by name.
TOKEN_TABLES = {
    "tokens": token_columns,
    "sequences": sequence_columns,
    "prompts": prompt_columns,
    "positions": position_columns,
}


def movers(columns: Columns, count: int) -> tuple[Columns, Columns]:
    """Return the rows that raise most, largest first, and those that lower most, most negative first.

    Of rows that tie the earlier ones come first.

    Raises:
        InputError: If count is no whole number of at least 0.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise InputError(f"count is {count!r}; expected a whole number of at least 0.")
    value = np.asarray(columns["contribution"])
    down = [k for k in np.argsort(value, kind="stable")[:count] if value[k] < 0]
    up = [k for k in np.argsort(-value, kind="stable")[:count] if value[k] > 0]
    return _rows(columns, up), _rows(columns, down)


def correlations(columns: Columns, against: Sequence[str]) -> Columns:
    """Return Pearson's and Spearman's correlation of contributions with other columns, NaN where one is constant."""
    from scipy.stats import rankdata

    value = np.asarray(columns["contribution"], dtype=float)
    names = [name for name in against if name in columns]
    others = [np.asarray(columns[name], dtype=float) for name in names]
    return {
        "with": names,
        "pearson": [_correlation(value, other) for other in others],
        "spearman": [_correlation(rankdata(value), rankdata(other)) for other in others],
        "rows": [len(value)] * len(names),
    }


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    if x.min() == x.max() or y.min() == y.max():  # the mean of equal numbers may differ from them by rounding
        return float("nan")
    x, y = _centred(x), _centred(y)
    return float(x @ y) / float(np.sqrt((x @ x) * (y @ y)))


def _centred(x: np.ndarray) -> np.ndarray:
    """Return the distances from the mean as shares of the largest, whose squares neither vanish nor overflow."""
    x = x - x.mean()
    return x / np.abs(x).max()


def _rows(columns: Columns, index: Sequence[int]) -> Columns:
    return {
        name: values[index] if isinstance(values, np.ndarray) else [values[k] for k in index]
        for name, values in columns.items()
    }


def _contributions(parts: TokenParts) -> dict[str, Tensor]:
    """Return the columns `[B, T]` that every table of a batch sums: in all, and by the way that they went."""
    return {"contribution": parts.total, **{f"through_{name}": x for name, x in parts.through.items()}}


def _joined(tokens: Sequence[int], vocabulary: Vocabulary) -> str:
    return ("" if vocabulary is not None else " ").join(shown(t, vocabulary) for t in tokens)
