"""Batches as plain lists: what the laws draw, what the bad-input tables spoil, and how two batches are compared."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st

from funcprobe.data.rollouts import rollouts_from_lists
from funcprobe.types import Rollouts

VOCABULARY = 5
END = 0  # the end-of-sequence id: drawn inside completions, and used as padding

LOGPS = ("sampling_logps", "old_logps", "ref_logps")


class Lists(NamedTuple):
    """The arguments of `rollouts_from_lists`."""

    prompts: list[list[int]]
    completions: list[list[int]]
    keywords: dict[str, Any]

    def build(self) -> Rollouts:
        return rollouts_from_lists(self.prompts, self.completions, **self.keywords)

    def rows(self, index: list[int]) -> Lists:
        """The same rows, taken from the lists."""
        keywords = {k: [v[i] for i in index] if isinstance(v, list) else v for k, v in self.keywords.items()}
        return Lists([self.prompts[i] for i in index], [self.completions[i] for i in index], keywords)


@st.composite
def masks(draw: st.DrawFn, length: int) -> list[int]:
    """A completion mask with holes anywhere and at least one 1."""
    mask = draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
    mask[draw(st.integers(0, length - 1))] = 1
    return mask


@st.composite
def lists(draw: st.DrawFn, max_rows: int = 5) -> Lists:
    """A ragged batch: prompts that repeat, ends inside completions, holes, every optional field present or not."""
    token = st.integers(0, VOCABULARY - 1)
    count = draw(st.integers(1, max_rows))
    prompts = draw(st.lists(st.lists(token, min_size=1, max_size=3), min_size=count, max_size=count))
    completions = draw(st.lists(st.lists(token, min_size=1, max_size=4), min_size=count, max_size=count))

    def per_row(entry: st.SearchStrategy[Any]) -> Any:
        return draw(st.lists(entry, min_size=count, max_size=count))

    finite = st.floats(-1e300, 1e300, allow_subnormal=True)
    keywords: dict[str, Any] = {"temperature": per_row(st.floats(1e-3, 1e3))}
    # a prompt may have several ids, and an id has one prompt
    keywords["group_ids"] = [
        10 * prompts.index(p) + g for p, g in zip(prompts, per_row(st.integers(0, 9)), strict=True)
    ]
    keywords["weight"] = draw(st.one_of(st.just([1.0] * count), st.just([0.25 + 0.75 * i for i in range(count)])))
    optional = {"rewards": finite, "advantages": finite, "step": st.integers(0, 3)}
    optional |= {"top_p": st.just(1.0), "top_k": st.just(0)}
    keywords |= {name: per_row(entry) for name, entry in optional.items() if draw(st.booleans())}
    if draw(st.booleans()):
        keywords["completion_masks"] = [draw(masks(len(row))) for row in completions]
    # Any bit pattern of a float64 below 0 must survive a file: two decades of digits, tiny numbers, and -0.0.
    logp = st.floats(-1e4, 0.0, allow_subnormal=True)
    for name in LOGPS:
        if draw(st.booleans()):
            keywords[name] = [draw(st.lists(logp, min_size=len(row), max_size=len(row))) for row in completions]
    return Lists(prompts, completions, keywords)


def fixed() -> Lists:
    """Three rows of two prompts, ragged, with a hole: the batch that the bad-input tables spoil."""
    return Lists(
        [[1, 2], [1, 2], [3]],
        [[4, END], [2], [1, 2, END]],
        {
            "temperature": [1.0, 0.7, 1.0],
            "rewards": [1.0, 0.0, -0.5],
            "completion_masks": [[1, 1], [1], [1, 0, 1]],
            "sampling_logps": [[-0.1, -0.2], [-0.3], [-0.4, None, -0.6]],
            "step": [0, 0, 1],
        },
    )


def assert_same_rollouts(found: Rollouts, expected: Rollouts, ignore: tuple[str, ...] = ()) -> None:
    """Structure before values: presence, dtype, shape, then every bit (so that -0.0 is not 0.0)."""
    for name in Rollouts._fields:
        a, b = getattr(found, name), getattr(expected, name)
        if name in ignore:
            continue
        assert (a is None) == (b is None), f"{name}: {a} against {b}"
        if a is None:
            continue
        assert (a.dtype, a.shape) == (b.dtype, b.shape), f"{name}: {a.dtype} {a.shape} against {b.dtype} {b.shape}"
        same = torch.equal(a.view(torch.int64), b.view(torch.int64)) if a.is_floating_point() else torch.equal(a, b)
        assert same, f"{name}: {a} against {b}"
