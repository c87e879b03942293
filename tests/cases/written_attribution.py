"""Attributions written by hand: the report sees values, never a model. Their parts sum to the whole that they state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from funcprobe.attribution.influence import Influence
from funcprobe.attribution.parameter_parts import LeafPart
from funcprobe.attribution.token_parts import TokenParts
from funcprobe.data.rollouts import rollouts_from_lists
from funcprobe.estimators.uncertainty import Bar
from funcprobe.results.attribution import Attribution
from funcprobe.results.provenance import BatchCounts
from funcprobe.types import Rollouts, TokenScores
from tests.cases.written_probe import result

NAME = "rao_blackwell/per_decision/token"

#: What a hostile or careless vocabulary holds, by token id from 100 on.
NASTY = (
    "<script>document.title='pwned'</script>",
    "</style></article><h1>out</h1>",
    "\"'`&amp;<b>",
    "\n",
    "\x1b[31m\x00",
    "\u202eevil\u202c",
    "$x_2$ and $",
    "你好世界",
    "🙂",
    "\ufffd",
    "‏שלום",
    "{{ 7*7 }}{% raw %}",
    "a very long token " * 12,
    "<!--",
    "</script><script>document.title='pwned'</script>",
)


def batch(lengths: Sequence[int], group_size: int, seed: int, vocabulary: int, hole: bool = False) -> Rollouts:
    """Return rollouts with completions of these lengths, `group_size` to a prompt; perhaps with a hole in the first."""
    draw = torch.Generator().manual_seed(seed)

    def drawn(n: int) -> list[int]:
        return torch.randint(0, vocabulary, (n,), generator=draw).tolist()

    groups = [b // group_size for b in range(len(lengths))]
    prompts = {g: drawn(3 + g % 4) for g in set(groups)}
    mask = [[not (hole and b == 0 and t == 1) for t in range(n)] for b, n in enumerate(lengths)]
    return rollouts_from_lists(
        [prompts[g] for g in groups],
        [drawn(n) for n in lengths],
        temperature=1.0,
        group_ids=groups,
        rewards=[float(b % 3) for b in range(len(lengths))],
        advantages=[(-1.0) ** b * (0.5 + b / len(lengths)) for b in range(len(lengths))],
        completion_masks=mask,
    )


def parts_of(rollouts: Rollouts, seed: int, scale: float) -> TokenParts:
    """Return contributions of both ways, heavy-tailed as real ones are, where there is a token."""
    draw = torch.Generator().manual_seed(seed)
    mask = rollouts.completion_mask.double()

    def normal(power: int) -> torch.Tensor:
        return torch.randn(mask.shape, generator=draw, dtype=torch.float64) ** power * mask

    scores = TokenScores(-normal(2), normal(2))
    return TokenParts(
        rollouts, scores, {"logp": scale * normal(3), "entropy": 0.3 * scale * normal(3) - 0.1 * scale * mask}
    )


def leaves_of(whole: float, layers: int, momentum: float) -> tuple[LeafPart, ...]:
    """Return leaves of a small model whose contributions sum to `whole`."""
    names = ["model.embed_tokens.weight"]
    for k in range(layers):
        names += [f"model.layers.{k}.{x}.weight" for x in ("input_layernorm", "self_attn.q_proj", "mlp.up_proj")]
    names += ["model.norm.weight", "lm_head.weight"]
    shares = torch.linspace(-0.6, 1.0, len(names), dtype=torch.float64)
    shares /= shares.sum()
    return tuple(
        LeafPart(
            n, whole * s, (1 - momentum) * whole * s, 1.1 * momentum * whole * s, -0.1 * momentum * whole * s, 0.1, 7
        )
        for n, s in zip(names, shares.tolist(), strict=True)
    )


def attribution(
    lengths: Sequence[int] = (5, 1, 7, 4, 6, 3),
    *,
    group_size: int = 2,
    layers: int = 3,
    form: str = "additive",
    vocabulary: Mapping[int, str] | None = None,
    words: int = 40,
    hole: bool = False,
    influence: bool = False,
    scale: float = 1e-5,
    bars: Mapping[str, Mapping[str, Bar]] | None = None,
    **changes: Any,
) -> Attribution:
    """Return an attribution of a step that lowers the entropy; with `vocabulary`, ids are text."""
    u = parts_of(batch(lengths, group_size, 1, words, hole), 2, scale)
    e = parts_of(batch([4, 6, 2, 5], 2, 3, words), 4, scale)
    whole = e.sum()
    momentum = 1 - u.sum() / whole if whole else 0.0
    reading = {"change": 0.98 * whole, "first_order": whole}
    own = {"evaluation": BatchCounts.of(e.rollouts), "batch": BatchCounts.of(u.rollouts)}
    matrix = Influence(
        torch.outer(torch.tensor([0.7, 0.3]), u.total.sum(1).float()).double(), "prompts", torch.tensor([0, 1])
    )
    values: dict[str, Any] = {
        "probe": result(**{**own, **reading, **changes}),
        "observable": NAME,
        "form": form,
        "leaves": leaves_of(whole, layers, momentum),
        "evaluation": e,
        "batch": u,
        "influence": matrix if influence else None,
        "vocabulary": None if vocabulary is None else dict(vocabulary),
        "bars": {table: dict(rows) for table, rows in (bars or {}).items()},
    }
    return Attribution(**values)


def words(count: int = 40) -> dict[int, str]:
    """Return the text of ids 0 to `count`: words with a leading space, and some marks."""
    plain = ["\n", ".", ",", " (", ")", "2", " + ", "="]
    return {i: plain[i] if i < len(plain) else f" word{i}" for i in range(count)}


def nasty() -> dict[int, str]:
    """Return the hostile vocabulary under the ids 0, 1, ..."""
    return dict(enumerate(NASTY))


def with_bars(found: Attribution, error: float, *tables: str) -> Attribution:
    """Return the attribution with an interval of one error below and two above every row of some tables."""
    bars = {}
    for table in tables:
        columns = found.columns(table)
        values = zip(columns[table[:-1]], columns["contribution"], strict=True)
        bars[table] = {str(row): Bar(float(x), error, x - error, x + 2 * error) for row, x in values}
    return dataclasses.replace(found, bars=bars)
