"""Every hyperparameter and every moment of a saved optimizer, held against one table of types and ranges."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcprobe.errors import CheckpointError


class _Range(NamedTuple):
    """A finite number between bounds."""

    low: float = -math.inf
    high: float = math.inf
    below: bool = False  #: whether the upper bound is out of reach

    def __contains__(self, value: object) -> bool:
        x = _real(value)
        return x is not None and self.low <= x <= self.high and not (self.below and x == self.high)

    def __str__(self) -> str:
        if self.high < math.inf:
            return f"a number from {self.low:g} to {'below ' if self.below else ''}{self.high:g}"
        return "a finite number" if self.low == -math.inf else f"a finite number of at least {self.low:g}"


class _Several(NamedTuple):
    """A list of so many numbers, each in its range; None may stand for one."""

    each: tuple[_Range, ...]
    optional: bool = False

    def __contains__(self, value: object) -> bool:
        if isinstance(value, Tensor) or not isinstance(value, Sequence) or isinstance(value, str):
            return False
        pairs = zip(self.each, value, strict=False)
        return len(value) == len(self.each) and all((self.optional and x is None) or x in r for r, x in pairs)

    def __str__(self) -> str:
        return f"{len(self.each)} numbers, each {self.each[0]}"


class _Either(NamedTuple):
    """One of several kinds of value."""

    kinds: tuple[Any, ...]

    def __contains__(self, value: object) -> bool:
        return any(value in kind for kind in self.kinds)

    def __str__(self) -> str:
        return ", or ".join(str(kind) for kind in self.kinds)


class _Flag(NamedTuple):
    """True or false, or None where torch chooses."""

    def __contains__(self, value: object) -> bool:
        return value is None or isinstance(value, bool)

    def __str__(self) -> str:
        return "true, false or None"


class _Nothing(NamedTuple):
    """None."""

    def __contains__(self, value: object) -> bool:
        return value is None

    def __str__(self) -> str:
        return "None"


_POSITIVE, _SHARE, _ANY = _Range(0.0), _Range(0.0, 1.0, below=True), _Range()
_NONE = _Nothing()
_PAIR = _Several((_POSITIVE, _POSITIVE))

#: Name of a hyperparameter -> the values that it may have, in any class of torch.optim and in transformers' Adafactor.
HYPERPARAMETERS: Mapping[str, Any] = {
    "lr": _Either((_POSITIVE, _NONE)),  # None: of an Adafactor that makes its own, which is refused by name
    "initial_lr": _POSITIVE,
    "betas": _Several((_SHARE, _SHARE)),
    "eps": _Either((_POSITIVE, _Several((_POSITIVE, _POSITIVE), optional=True))),
    "weight_decay": _POSITIVE,
    "momentum": _POSITIVE,
    "dampening": _ANY,
    "momentum_decay": _POSITIVE,
    "alpha": _POSITIVE,
    "rho": _Range(0.0, 1.0),
    "lr_decay": _POSITIVE,
    "initial_accumulator_value": _POSITIVE,
    "lambd": _ANY,
    "t0": _POSITIVE,
    "etas": _PAIR,
    "step_sizes": _PAIR,
    "clip_threshold": _POSITIVE,
    "decay_rate": _ANY,
    "beta2_decay": _ANY,
    "beta1": _Either((_SHARE, _NONE)),
    "d": _POSITIVE,
    "ns_steps": _Range(0, 100),
    "ns_coefficients": _Several((_ANY, _ANY, _ANY)),
    **dict.fromkeys(("amsgrad", "maximize", "nesterov", "centered", "decoupled_weight_decay"), _Flag()),
    **dict.fromkeys(("foreach", "fused", "capturable", "differentiable"), _Flag()),
    **dict.fromkeys(("scale_parameter", "relative_step", "warmup_init"), _Flag()),
}

#: Moments that are means or sums of squares, or absolute values.
_NOT_NEGATIVE = frozenset(
    {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta", "exp_inf", "row_var", "col_var", "variance"}
    | {"exp_avg_sq_row", "exp_avg_sq_col"}
)


def check_groups(param_groups: Sequence[Mapping[str, Any]], what: str = "optimizer.pt") -> None:
    """Refuse groups of which a step could not be taken, or would be taken of something else than was saved.

    Raises:
        CheckpointError: Naming the hyperparameter, its value, and the values that it may have.
    """
    for number, group in enumerate(param_groups):
        _check_ids(number, group, what)
        for name, value in group.items():
            expected = HYPERPARAMETERS.get(name) if isinstance(name, str) else None
            if expected is not None and value not in expected:
                raise CheckpointError(
                    f"{name} of group {number} in {what} is {_told(value)}; expected {expected}. The file is damaged, "
                    "or was written by something else than torch.optim."
                )


def check_entries(i: int | str, entries: Mapping[str, Any], what: str = "optimizer.pt") -> None:
    """Refuse the state of a parameter that is none: no finite numbers, squares below 0, a step that is not whole.

    Raises:
        CheckpointError: Naming the moment and its fault.
    """
    for name, value in entries.items():
        if (reason := _fault(str(name), value)) is not None:
            raise CheckpointError(f"{name} of parameter {i} in {what} {reason}; the file is damaged, or diverged.")


def _check_ids(number: int, group: Mapping[str, Any], what: str) -> None:
    names = group.get("param_names", ())
    if not isinstance(group["params"], list | tuple) or not all(isinstance(i, int | str) for i in group["params"]):
        raise CheckpointError(
            f"params of group {number} in {what} is {_told(group['params'])}; expected a list of ids."
        )
    if names is not None and not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
        raise CheckpointError(f"param_names of group {number} in {what} is {_told(names)}; expected a list of names.")


def _fault(name: str, value: Any) -> str | None:
    """Return why a state entry is none; None where it is one."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        return None if _real(value) is not None else f"is {_told(value)}, expected a tensor or a finite number"
    if type(value) is not Tensor:  # such as a DTensor, of which one process saved its part
        return f"is a {type(value).__name__}, expected a tensor that is all there"
    if value.layout != torch.strided:
        return f"is a tensor of layout {value.layout}, expected a dense one"
    if value.is_meta or value.is_quantized:
        return "is a tensor without numbers of its own, expected a dense one"
    if name == "step":
        return _fault_of_step(value)
    if not value.is_floating_point():
        count = value.numel() <= 1 and not value.is_complex()
        return None if count else f"holds {_dtype(value)}, expected floating-point numbers"
    if not bool(torch.isfinite(value).all()):
        return f"holds {int((~torch.isfinite(value)).sum())} entries that are NaN or infinite"
    if name in _NOT_NEGATIVE and value.numel() and float(value.min()) < 0:
        return f"holds {float(value.min()):g}, and its entries are squares or sizes"
    return None


def _fault_of_step(value: Tensor) -> str | None:
    if value.is_complex() or value.numel() != 1:
        return f"is a tensor of {value.numel()} numbers of {_dtype(value)}, expected one whole number"
    step = float(value)
    return None if math.isfinite(step) and step >= 0 and step == int(step) else f"is {step:g}, expected a whole number"


def _real(value: object) -> float | None:
    """Return a finite real number as a float; None for anything else, and for a truth value."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dim() > 0 or value.is_complex() or value.is_meta or value.dtype == torch.bool:
            return None
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        x = float(value)
    except OverflowError:
        return None
    return x if math.isfinite(x) else None


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _told(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {_dtype(value)}"
    if isinstance(value, int) and abs(value) >= 2**63:
        return "an integer of more than 64 bits"
    return f"{value!r:.60}"
