"""Words that all results share: sizes of batches, numbers with their errors, how the numbers were made."""

from __future__ import annotations

import math
from collections.abc import Sequence

from funcprobe.estimators.uncertainty import Bar
from funcprobe.results.blocks import Remark, Sentence
from funcprobe.results.provenance import BatchCounts, Provenance


def sizes_of(provenance: Provenance) -> tuple[Sentence, ...]:
    """Return the sizes of both batches, a line each."""
    given = {"E": provenance.evaluation, "U": provenance.batch}
    return tuple(
        Sentence(f"{name}: {counted(counts)}", "quiet") for name, counts in given.items() if counts is not None
    )


def counted(counts: BatchCounts) -> str:
    """Return the size of a batch in words."""
    return f"{counts.sequences} sequences, {counts.tokens} tokens, {counts.prompts} prompts"


def closing(provenance: Provenance, notes: Sequence[str], warnings: Sequence[str]) -> tuple[Sentence | Remark, ...]:
    """Return the lines that end a result: notes, how the numbers were made, warnings."""
    return (
        *(Remark("note", str(text)) for text in notes),
        Sentence(cost_of(provenance), "quiet"),
        *(Remark("warning", str(text)) for text in warnings),
    )


def cost_of(provenance: Provenance) -> str:
    """Return how the numbers were made: mode, precision, device, parameters, seconds."""
    place, seconds = provenance.environment, sum(provenance.timings.values())
    stored = f" stored in {storage_of(provenance)}" if is_stored_narrower(provenance) else ""
    return (
        f"First order in {provenance.mode} mode, {place.get('dtype', '')}{stored} on {place.get('device', '')}, "
        f"{place.get('parameters', 0):,} trainable parameters, {seconds:.1f} s"
    )


def storage_of(provenance: Provenance) -> str:
    """Return the dtype that θ′ is stored in, as a word."""
    return str(provenance.environment.get("storage") or provenance.environment.get("dtype") or "its dtype")


def is_stored_narrower(provenance: Provenance) -> bool:
    """Return whether θ′ is stored in another dtype than it was computed in."""
    return storage_of(provenance) != str(provenance.environment.get("dtype") or "its dtype")


def with_error(value: float, found: Bar | None, digits: int = 6) -> str:
    """Return a number with its standard error, where there is one.

    Example:
        >>> with_error(-2.5e-3, None)
        '-2.500000e-03'
    """
    known = found is not None and math.isfinite(found.error)
    return f"{value:+.{digits}e}" + (f" ± {found.error:.1e}" if known and found else "")
