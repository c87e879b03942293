"""Forward mode past constants: an elementwise operation of a dual number and a constant makes no tangent of zeros.

torch gives the constant a tangent of zeros without storage, and works out the shape of a product or sum with it in
Python, some 0.1 ms each: more than the arithmetic on a small model, and several times that in nested forward mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Number
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    _unwrap_for_grad,
    _wrap_for_grad,
    get_interpreter_stack,
    peek_interpreter_stack,
)
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.overrides import TorchFunctionMode

#: (dual, constant, their result, its tangent by the dual's) in terms of plain tensors.
Rule = Callable[[Tensor, Any, Tensor, Tensor], Tensor]


def _scaled(x: Tensor, c: Any, y: Tensor, dx: Tensor) -> Tensor:
    return dx * c


def _shifted(x: Tensor, c: Any, y: Tensor, dx: Tensor) -> Tensor:
    return dx.expand_as(y).clone()  # the model may write to its result in place, and x keeps its tangent


def _subtracted(x: Tensor, c: Any, y: Tensor, dx: Tensor) -> Tensor:
    return -dx.expand_as(y)


def _divided(x: Tensor, c: Any, y: Tensor, dx: Tensor) -> Tensor:
    return dx / c


def _divisor(x: Tensor, c: Any, y: Tensor, dx: Tensor) -> Tensor:
    return -(dx * y) / x


class ConstantOperands(TorchFunctionMode):
    """A context in which `+ − × ÷` of a dual number and a constant go by a rule with one tangent term.

    The rules are those of torch without the terms that are zero. Of nested `jvp`s the outer one differentiates what the
    inner one's rule is made of, by rules again; vmap batches them. In place, with a further argument, of mixed dtypes
    or directly under another transform than `torch.func.jvp`, an operation is torch's own.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, by its rule where it has one and a single operand moves."""
        rules = _RULES.get(func)
        if rules is None or kwargs or len(args) != 2 or not _under_jvp():
            return func(*args, **(kwargs or {}))
        duals = [_dual(x) for x in args]
        for place, other in ((0, 1), (1, 0)):
            moving, constant = duals[place], duals[other]
            if moving is not None and moving.tangent is not None and (constant is None or constant.tangent is None):
                fixed = args[other]
                if not _same_arithmetic(args[place], fixed):
                    break
                return self._ruled(func, rules[place], moving.primal, moving.tangent, fixed, place)
        return func(*args)

    def _ruled(self, func: Any, rule: Rule, x: Tensor, dx: Tensor, c: Any, place: int) -> Tensor:
        """Return the dual of value and tangent, made at the level below where that is one of another `jvp`."""
        if not _nested():
            y = func(x, c) if place == 0 else func(c, x)
            return forward_ad.make_dual(y, rule(x, c, y, dx))
        interpreter = retrieve_current_functorch_interpreter()
        level = interpreter.level()
        x, dx, c = (_unwrap_for_grad(z, level) if isinstance(z, Tensor) else z for z in (x, dx, c))
        with interpreter.lower(), self:  # neither moves at this level, so nothing of it is lost
            y = func(x, c) if place == 0 else func(c, x)
            dy = rule(x, c, y, dx)
        return forward_ad.make_dual(_wrap_for_grad(y, level), _wrap_for_grad(dy, level))


def _nested() -> bool:
    return any(level.key() == TransformType.Jvp for level in get_interpreter_stack()[:-1])


def _under_jvp() -> bool:
    """Return whether the innermost transform is a `jvp`, whose duals can be taken apart."""
    level = peek_interpreter_stack()
    return level is not None and level.key() == TransformType.Jvp


def _dual(x: Any) -> Any:
    return forward_ad.unpack_dual(x) if isinstance(x, Tensor) and x.is_floating_point() else None


def _same_arithmetic(x: Tensor, constant: Any) -> bool:
    if isinstance(constant, Tensor):
        return constant.dtype == x.dtype and constant.device == x.device
    return isinstance(constant, Number) and not isinstance(constant, complex)


#: By function: the rule where the first operand moves, and where the second does.
_RULES: dict[Any, tuple[Rule, Rule]] = {
    **dict.fromkeys((torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__), (_scaled, _scaled)),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__), (_shifted, _shifted)),
    **dict.fromkeys((torch.sub, torch.subtract, Tensor.sub, Tensor.__sub__), (_shifted, _subtracted)),
    **dict.fromkeys((torch.rsub, Tensor.__rsub__), (_subtracted, _shifted)),
    **dict.fromkeys((torch.div, torch.true_divide, Tensor.div, Tensor.__truediv__), (_divided, _divisor)),
}
