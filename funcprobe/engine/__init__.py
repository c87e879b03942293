"""Values, gradients and directional derivatives of any function of scores, by microbatch and exactly.

Everything expensive is a score. A scalar f of the scores of a whole batch is differentiated by the chain rule through
them: reverse mode takes the cotangents `c = ∂f/∂s` on the small float64 arrays and pulls each microbatch's slice of
them back through the model; forward mode pushes a tangent through each microbatch and contracts at the end. Neither
knows what f is, so there is nothing to scale and no mean of means.
"""

from funcprobe.engine.anchor import anchored
from funcprobe.engine.batches import Stats, detached, each, fields, own_pieces, scores, scores_of_many
from funcprobe.engine.curvature import curvature_by_reverse
from funcprobe.engine.forward import (
    Directional,
    Functional,
    contributions,
    cotangents,
    derivative,
    derivatives,
    directional,
    directional_of_many,
    rows_of,
    second_derivative,
)
from funcprobe.engine.kernels import Arithmetic, arithmetic, math_attention
from funcprobe.engine.reverse import Gradient, ScoresFunction, Wanted, gradient, gradients, pull_back

__all__ = [
    "Arithmetic",
    "Directional",
    "Functional",
    "Gradient",
    "ScoresFunction",
    "Stats",
    "Wanted",
    "anchored",
    "arithmetic",
    "contributions",
    "cotangents",
    "curvature_by_reverse",
    "derivative",
    "derivatives",
    "detached",
    "directional",
    "directional_of_many",
    "each",
    "fields",
    "gradient",
    "gradients",
    "math_attention",
    "own_pieces",
    "pull_back",
    "rows_of",
    "scores",
    "scores_of_many",
    "second_derivative",
]
