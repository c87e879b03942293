"""The model passes over the evaluation rollouts that an analysis is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from funcprobe import engine
from funcprobe.data.rollouts import to_device
from funcprobe.engine.clock import Clock
from funcprobe.errors import InputError
from funcprobe.policy.module import Policy
from funcprobe.types import Leaves, Microbatch, Observable, Params, Progress, Rollouts, Statistic, TokenScores


class Passes(NamedTuple):
    """A policy on its evaluation rollouts: the inputs of a pass beside parameters."""

    policy: Policy
    evaluation: Rollouts
    stats: Mapping[str, Statistic]  #: what the observables declare, all together
    microbatch: Microbatch
    progress: Progress | None
    clock: Clock  #: told of every pass

    @classmethod
    def over(
        cls,
        policy: Policy,
        evaluation: Rollouts,
        observables: Mapping[str, Observable],
        microbatch: Microbatch,
        progress: Progress | None,
        clock: Clock,
    ) -> Passes:
        """Return the passes that serve several observables at once.

        Raises:
            InputError: If two of them call different statistics by one name.
        """
        stats: dict[str, Statistic] = {}
        for o in observables.values():
            for name, statistic in o.stats.items():
                if stats.setdefault(name, statistic) is not statistic:
                    raise InputError(
                        f"Two observables declare different statistics under the name '{name}'; rename one of them, or "
                        "let both refer to one function."
                    )
        return cls(policy, to_device(evaluation, policy.device), stats, microbatch, progress, clock)

    def scores(self, params: Leaves, what: str, order: Literal[0, 1, 2] = 0) -> TokenScores:
        """Return the scores of E at some parameters, in the arithmetic of forward mode where an order is given."""
        with self.clock(what):
            return engine.scores(self.policy, dict(params), self.evaluation, order=order, **self._options(what))

    def directional(self, params: Leaves, direction: Leaves, what: str, order: Literal[1, 2] = 1) -> engine.Directional:
        """Return the scores of E and their tangents along a direction."""
        with self.clock(what):
            return engine.directional(
                self.policy, params, direction, self.evaluation, order=order, **self._options(what)
            )

    def directional_of_many(self, params: Leaves, directions: Sequence[Leaves], what: str) -> list[engine.Directional]:
        """Return the scores of E and their tangents along each of several directions, from one pass."""
        with self.clock(what):
            return engine.directional_of_many(self.policy, params, directions, self.evaluation, **self._options(what))

    def gradient(self, f: engine.ScoresFunction, params: Params, what: str) -> engine.Gradient:
        """Return a function of E's scores and its gradient, by reverse mode."""
        with self.clock(what):
            return engine.gradient(f, self.policy, params, self.evaluation, as_training=False, **self._options(what))

    def pull_back(self, fixed: TokenScores, params: Params, what: str) -> Params:
        """Return known cotangents of E's scores, pulled back to the parameters by reverse mode."""
        with self.clock(what):
            return engine.pull_back(fixed, self.policy, params, self.evaluation, **self._options(what))

    def cut_of(self, own: Microbatch) -> Microbatch:
        """Return how U is cut: as its step cuts it, or as E is where that says nothing."""
        return self.microbatch if own is None else own

    def over_rows(self, part: Rollouts) -> Passes:
        """Return the same passes over some rows of E, without a progress of their own."""
        return self._replace(evaluation=part, progress=None)

    def curvature_by_reverse(self, fixed: TokenScores, params: Params, direction: Leaves, what: str) -> float:
        """Return Σ c·s̈ over E, forward over reverse."""
        with self.clock(what):
            return float(
                engine.curvature_by_reverse(
                    fixed, self.policy, params, direction, self.evaluation, **self._options(what)
                )
            )

    def _options(self, what: str) -> dict[str, Any]:
        return {"stats": self.stats, "microbatch": self.microbatch, "progress": self.progress, "what": what}
