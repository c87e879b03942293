"""The five lines' `H`: an observable as a pure function of parameters."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from funcprobe.data.rollouts import microbatches, take, to_device
from funcprobe.engine.batches import in_order, scores
from funcprobe.engine.kernels import differentiable_attention, transform_errors, whole_derivative
from funcprobe.errors import InputError
from funcprobe.policy.module import Policy
from funcprobe.policy.scoring import score
from funcprobe.types import Microbatch, Observable, Params, Rollouts


def anchored(
    observable: Observable, policy: Policy, rollouts: Rollouts, params: Params, *, microbatch: Microbatch = None
) -> Callable[[Params], Tensor]:
    """Return `params -> observable`, importance-sampled on rollouts that were drawn at the given `params`.

    The anchor's scores are computed once, here, and held constant. The function returned is pure and goes through
    `torch.func.grad`, `jvp` and `vmap`; it runs attention in the math kernel, so that all of them see one arithmetic.
    Under `grad` it keeps the graph of the whole batch: `gradient` and `directional` do not.

    Raises:
        InputError: If the leaves of the policy are parts.
        NumericsError: If a score at the anchor is not finite.
    """
    if policy.is_sharded:
        raise InputError(
            "anchored(...) runs every row in every process, and gradients in parts of leaves are sums over processes: "
            "it would count them several times; use probe(...), or whole leaves."
        )
    rollouts = to_device(rollouts, policy.device)
    anchor = scores(policy, params, rollouts, stats=observable.stats, microbatch=microbatch, order=1)

    def measured(params: Params) -> Tensor:
        found = []
        with differentiable_attention(policy), whole_derivative(policy), transform_errors():
            for rows in microbatches(rollouts, microbatch):  # every process runs them all: a transform may be watching
                found.append((rows, score(policy, params, take(rollouts, rows), observable.stats)))
        return observable(in_order(found, rollouts), anchor, rollouts)

    return measured
