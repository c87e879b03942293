"""A class of torch.optim on parameters of its own, beside a pure optimizer of the same options."""

from typing import Any

import torch

from funcprobe.optimizers.groups import Group
from funcprobe.types import Optimizer, Params
from tests.cases.trees import assert_same, gradients, live_state

STEPS = 20


def live(
    cls: type[torch.optim.Optimizer], params: Params, options: dict[str, Any], groups: list[Group] | None = None
) -> tuple[torch.optim.Optimizer, dict[str, torch.nn.Parameter]]:
    """The torch class on parameters of its own."""
    # Adafactor sums over entries, in the order of memory: of contiguous leaves, as a step here does
    layout = torch.contiguous_format if cls is torch.optim.Adafactor else torch.preserve_format
    own = {name: torch.nn.Parameter(p.clone(memory_format=layout)) for name, p in params.items()}
    if groups is None:
        return cls(list(own.values()), **options), own
    dicts = [{"params": [own[n] for n in group.names], **group.hyperparameters} for group in groups]
    return cls(dicts, **options), own


def assert_parity(
    optimizer: Optimizer, instance: torch.optim.Optimizer, own: dict[str, torch.nn.Parameter], params: Params
) -> None:
    """Both go through the same 20 gradients and agree bitwise, parameters and state, after every one."""
    state = optimizer.init(params)
    for step in range(STEPS):
        gradient = gradients(params, step)
        for name, p in own.items():
            p.grad = torch.empty_like(p).copy_(gradient[name])  # in the layout of its leaf, as autograd leaves it
        instance.step()
        params, _, state = optimizer.apply(params, state, gradient)
        assert_same(params, {name: p.detach() for name, p in own.items()}, f"step {step}")
        assert_same(state, live_state(instance, list(own.values()), list(own)), f"step {step}")


class Counting(torch.optim.Optimizer):
    """A third-party class: a Python step count, a Python float, state of another shape, noise from the global RNG."""

    def __init__(self, params: Any, lr: float = 0.1, noise: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "noise": noise, "internal": 3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                state["total"] = state.get("total", 0.0) + float(p.grad.sum())
                state["rows"] = p.grad.reshape(-1)[:1].clone()
                state["nothing"] = None
                bias = 1 - 0.9 ** state["step"]
                p.sub_(group["lr"] * bias * (p.grad + group["noise"] * torch.randn_like(p)))
