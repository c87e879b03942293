"""The stateful way to probe one update, written out: mutate a module, snapshot, step, measure, restore.

It is what funcprobe is compared with, and a second oracle: it shares the `Rollouts` container and the cutting of
batches with the package, and no arithmetic. Every formula is derived by hand where it stands. Read in this order:

    probe      the procedure, phase by phase
    snapshot   what is kept of a live pair, and how it is put back
    scoring    log-probabilities and entropies of completion tokens from a live module
    losses     advantages, token weights and token losses of dr_grpo, grpo and reinforce
    updates    the RL step on U, and the buffer Δθ = after − before
    entropy    importance-sampled entropy, and its score-function gradient

Imports within are relative, so that it is `benchmarks.stateful` from the repository root and `stateful` for the
scripts beside it.
"""

from .probe import StatefulProbe, StatefulResult

__all__ = ["StatefulProbe", "StatefulResult"]
