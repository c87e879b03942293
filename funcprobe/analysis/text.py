"""The plain words and numbers of a result, for terminals, notebooks and logs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from funcprobe.analysis.result import ProbeResult


def rows_of(result: ProbeResult) -> list[tuple[str, str]]:
    """Return the result as (what, value) rows, most important first."""
    share = f"  ({result.first_order / result.change:.2%} of ΔF)" if result.change else ""
    health, n = result.health, result.evaluation.sequences
    rounding = "negligible" if result.rounding is None else f"{result.rounding:+.6e}"
    khat = "not fitted" if health.khat is None else f"{health.khat:.2f}"
    return [
        ("before  F(θ)", f"{result.before:.9f}"),
        ("after   F(θ′)", f"{result.after:.9f}"),
        ("measured   ΔF", f"{result.change:+.6e}"),
        ("predicted  δF₁", f"{result.first_order:+.6e}{share}"),
        ("remainder  ΔF − δF₁", f"{result.remainder:+.6e}"),
        ("  of it rounding of θ′", rounding),
        ("step  ‖Δθ‖₂", f"{result.update_norm:.6e} at lr {result.lr:g}"),
        ("entries too small to move", f"{result.unmoved:.2%}"),
        (
            "effective sample",
            f"{health.ess_sequence:.1f} of {n} sequences, prefixes at least {health.ess_prefix_min:.1f}",
        ),
        ("Pareto k̂", khat),
    ]


def summary_of(result: ProbeResult) -> str:
    """Return the text of `ProbeResult.summary`."""
    e, u = result.evaluation, result.update_batch
    head = [
        f"{result.observable}, {result.unit} (first order in {result.mode} mode)",
        f"E: {e.sequences} sequences, {e.tokens} tokens, {e.prompts} prompts   "
        f"U: {u.sequences} sequences, {u.tokens} tokens, {u.prompts} prompts",
    ]
    rows = rows_of(result)
    width = max(len(name) for name, _ in rows)
    body = [f"  {name:<{width}}  {value}" for name, value in rows]
    moved = [f"  {norm:.3e}  {name}" for name, norm in result.top[:3]]
    said = [f"Warning: {text}" for text in result.warnings]
    return "\n".join([*head, "", *body, "", "largest moves ‖Δθ‖₂", *moved, *([""] if said else []), *said])
