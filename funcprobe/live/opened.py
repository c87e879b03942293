"""A step of a window opened down to the prompts and tokens of its batch U, with ∇F from the window's end."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from funcprobe import engine, tree
from funcprobe.attribution.decoding import vocabulary_of
from funcprobe.attribution.step_parts import StepParts
from funcprobe.attribution.token_parts import token_parts
from funcprobe.attribution.token_tables import Columns, movers, prompt_columns, token_columns
from funcprobe.errors import Note, percent
from funcprobe.live.steps import Kept
from funcprobe.optimizers.unreached import with_zeros
from funcprobe.results.window import MovedPrompt, MovedToken, Opened
from funcprobe.training.response import form_of
from funcprobe.types import Gradients, Microbatch, Params

#: Tokens and prompts kept in a window's line, either way.
KEPT_ROWS = 10

#: Relative distance of the objective's gradient from the trainer's above which tokens are told with a warning: a
#: thousand times what sums of float32 products in another order leave.
OTHER_GRADIENT = 1e-2


class Told(NamedTuple):
    """A step that was opened."""

    summary: Opened
    tokens: Columns  #: every token of U
    warnings: tuple[Note, ...]


def opened(kept: Kept, covector: Params, cut: Microbatch, tokenizer: Any = None) -> Told:
    """Return the contributions of a step's tokens to δF₁, and of its prompts: a gradient on U and a pass over it.

    Raises:
        InputError: If the objective cannot use the batch.
        NumericsError: If scores or contributions are not finite.
        ForwardModeError: If the model has no forward derivative.
    """
    update = kept.update
    assert update.step is not None
    own = update.gradient().gradient
    clipped, coefficient, _ = update.step.rule.clipped(own)
    off = _distance(clipped, kept.gradient, update.params)
    move, _ = update.move()
    parts = StepParts.of(update, move, update.step.microbatch or cut, form_of(update.step.optimizer, "auto"))
    direction = parts.carried(covector).direction
    along = engine.directional(
        update.policy,
        parts.params,
        direction,
        parts.prepared,
        as_training=True,
        stats=update.step.objective.stats,
        microbatch=parts.microbatch,
        what="U, looking back",
    )
    told = token_parts(parts.on_batch, along, parts.prepared, "update")
    vocabulary = vocabulary_of(tokenizer, (told.rollouts,))
    columns = token_columns(told, vocabulary)
    rows = _tokens(kept.step, columns), _prompts(kept.step, prompt_columns(told, vocabulary))
    given = float(tree.dot(with_zeros(kept.gradient, covector), direction)) / coefficient
    warned = [*update.warnings, *_other_gradient(kept.step, off)]
    share = update.gradient().info.get("clip_fraction")
    return Told(Opened(kept.step, told.sum(), given, off, share, *rows), columns, tuple(warned))


def _distance(own: Gradients, used: Gradients, params: Params) -> float:
    """Return ‖own − used‖ / ‖used‖ over all leaves, in float64."""
    a, b = with_zeros(own, params), with_zeros(used, params)
    off = sum(float(tree.norm({n: a[n].double() - b[n].double()})) ** 2 for n in a)
    size = float(tree.norm(b))
    return math.sqrt(off) / size if size else math.inf if off else 0.0


def _other_gradient(step: int, off: float) -> Iterator[Note]:
    if off > OTHER_GRADIENT:
        yield Note(
            "other gradient",
            f"The objective's gradient at step {step} is off by {percent(off)} from the one that was used (dropout, "
            "autocast, a term of the loss that is not in the objective); its tokens are told of the objective.",
        )


def _tokens(step: int, columns: Columns) -> tuple[MovedToken, ...]:
    return tuple(
        MovedToken(
            step=step,
            sequence=int(row["sequence"]),
            prompt=int(row["prompt"]),
            position=int(row["position"]),
            token=int(row["token"]),
            text=str(row["text"]),
            contribution=float(row["contribution"]),
            advantage=float(row["advantage"]) if "advantage" in row else None,
        )
        for row in _largest(columns)
    )


def _prompts(step: int, columns: Columns) -> tuple[MovedPrompt, ...]:
    return tuple(
        MovedPrompt(
            step=step,
            prompt=int(row["prompt"]),
            sequences=int(row["sequences"]),
            tokens=int(row["tokens"]),
            contribution=float(row["contribution"]),
            text=str(row["text"]),
        )
        for row in _largest(columns)
    )


def _largest(columns: Columns) -> Iterator[dict[str, Any]]:
    """Yield the rows that did most, either way, each as a mapping."""
    for side in movers(columns, KEPT_ROWS):
        for values in zip(*side.values(), strict=True):
            yield dict(zip(side, values, strict=True))
