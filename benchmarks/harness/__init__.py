"""Everything that several benchmark scripts use; no script imports another.

    record      how numbers are kept: with options, commit and environment
    timing      two passes side by side, as a ratio
    memory      the peak of one pass, in a process of its own
    workload    a model, a batch, and the passes over them
    pair        one live pair and the same as pure values, for both systems
    comparing   options, FLOPs, peaks and tables of the scripts that compare the two
    narrow      a float32 model small enough for a float64 copy, and rollouts of it
    prompted    a policy whose every completion is listed: exact values
    ranking     how well predictors order pairs of checkpoint and batch
    leaderboard docs/validation.md, of the numbers of `validate.py`
    claims      docs/literature.md, of the numbers of `literature.py`

Imports within are relative, so that it is `benchmarks.harness` from the repository root and `harness` for the scripts
beside it; `pair` alone is the latter only, since it takes `stateful` from beside the scripts too.
"""
