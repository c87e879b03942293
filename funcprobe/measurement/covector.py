"""`Covector`: ∇F of one observable at θ, kept so that further updates of the same θ need no pass over E."""

from __future__ import annotations

from dataclasses import dataclass

from funcprobe.errors import InputError
from funcprobe.measurement.first_order import FirstOrder, first_order
from funcprobe.measurement.measurement import Measurement
from funcprobe.types import Observable, Params, Rollouts


@dataclass(frozen=True, repr=False)
class Covector:
    """∇F of an observable on rollouts E at θ: `δF₁ = ⟨∇F, Δθ⟩` of any update of that θ follows from it."""

    name: str  #: what the observable goes by
    observable: Observable
    params: Params  #: θ
    evaluation: Rollouts  #: E
    first: FirstOrder  #: the scores of E at θ, and ∇F by the name of the observable

    @property
    def gradient(self) -> Params:
        """∇F, in the dtype of the parameters."""
        return self.first.gradients[self.name]

    @classmethod
    def of(cls, measurement: Measurement, params: Params, evaluation: Rollouts) -> Covector:
        """Return ∇F of the first observable of a measurement in reverse mode, by a backward pass over E."""
        name, observable = measurement.main
        alone = measurement._replace(observables={name: observable})
        return cls(name, observable, params, evaluation, first_order(alone, params, {}))

    def check(self, params: Params, evaluation: Rollouts, observable: Observable) -> None:
        """Refuse an update, rollouts or an observable that this is not the gradient for.

        Raises:
            InputError: If θ or E is another object, or the observable another one.
        """
        if params is not self.params:
            raise InputError(
                "covector is ∇F at another θ than the update's; take it of an update of the same params, such as the "
                "one that update.vary(batch=...) was called on."
            )
        if evaluation is not self.evaluation:
            raise InputError("covector is ∇F on other rollouts than this E; give the E that it was taken on.")
        if observable != self.observable:
            raise InputError(
                f"covector is ∇F of '{self.observable.name}', and '{observable.name}' is attributed; take it of the "
                "same observable."
            )
