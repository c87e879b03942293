"""Whatever trains has a gradient in the copy too, and what is unreached is told from what has a gradient of 0."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import funcprobe as fp
from funcprobe import engine
from funcprobe.errors import InputError, ReverseModeError
from funcprobe.policy.checks import COARSEST_FLOAT32
from tests.cases import models
from tests.cases.checked import V


class Old(torch.autograd.Function):
    """A custom function of the old kind, whose forward takes ctx."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return g * (s + x * s * (1 - s))


class Acts(nn.Module):
    """A two-line module with an activation of somebody's."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.middle, self.head = nn.Embedding(V, 5), nn.Linear(5, 5), nn.Linear(5, V)
        self.act = act

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.act(self.middle(self.embed(ids))))


def bloom() -> nn.Module:
    from transformers import BloomConfig, BloomForCausalLM

    with models.seeded(2):
        return BloomForCausalLM(BloomConfig(vocab_size=V, hidden_size=16, n_layer=1, n_head=2, initializer_range=0.3))


def sparse() -> nn.Module:
    module = models.two_lines()
    module.embed.sparse = True
    return module


def weight_normed() -> nn.Module:
    module = Acts(torch.tanh)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        module.middle = torch.nn.utils.weight_norm(module.middle)
    module(torch.tensor([[1, 2]]))  # leaves an activation of its pass on the layer
    return module.double()


def locked() -> nn.Module:
    module = models.two_lines()
    module.lock = threading.Lock()  # type: ignore[assignment]
    module.kept = {"activation": module.embed(torch.tensor([1, 2]))}  # type: ignore[assignment]
    return module


def compiled() -> nn.Module:
    return torch.compile(models.two_lines(), backend="eager")  # type: ignore[return-value]


RUNS: dict[str, Callable[[], nn.Module]] = {
    "old function": lambda: Acts(Old.apply).double(),
    "bloom": bloom,
    "checkpointed": lambda: Acts(lambda x: checkpoint(torch.tanh, x, use_reentrant=False)).double(),
    "sparse": sparse,
    "weight norm": weight_normed,
    "lock and activation": locked,
    "compiled": compiled,
}


@pytest.mark.parametrize("name", RUNS)
def test_whatever_trains_has_a_gradient(name: str) -> None:
    with models.seeded(5):
        module = RUNS[name]()
    policy, params = fp.from_module(module)
    rollouts = models.rollouts(6)
    found = engine.gradient(lambda s, r: (s.logp.sum(), {}), policy, params, rollouts).gradient
    own = dict(module.named_parameters())
    total = 0.0
    for row in range(len(rollouts.ids)):
        start, length = int(rollouts.prompt_lengths[row]), int(rollouts.attention_mask[row].sum())
        out = module(rollouts.ids[row : row + 1, :length])
        log_probs = (getattr(out, "logits", out)[0].double() / rollouts.temperature[row]).log_softmax(-1)
        total = total + sum(log_probs[t - 1, rollouts.ids[row, t]] for t in range(start, length))
    wanted = torch.autograd.grad(total, [own[n] for n in params])  # type: ignore[arg-type]
    for (leaf, g), w in zip(found.items(), wanted, strict=True):
        dense = w if w.layout == torch.strided else w.to_dense()
        # float64, but for BLOOM, which is float32: sums of some hundred terms
        torch.testing.assert_close(g, dense, rtol=1e-4, atol=COARSEST_FLOAT32 * float(dense.abs().max() + 1), msg=leaf)


def test_a_reentrant_checkpoint_is_named() -> None:
    with models.seeded(5):
        policy, params = fp.from_module(Acts(lambda x: checkpoint(torch.tanh, x, use_reentrant=True)).double())
    with pytest.raises(ReverseModeError, match="use_reentrant=False"):
        fp.make_step(policy, fp.grpo(), fp.sgd(1.0)).gradient(params, models.rollouts())


def test_an_unreached_leaf_is_told_from_one_with_a_gradient_of_0() -> None:
    class Idle(models.TwoLines):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.flat = nn.Linear(2, 2), nn.Parameter(torch.ones(()))

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) + 0.0 * self.flat

    policy, params = fp.from_module(Idle().double())
    found = engine.gradient(lambda s, r: (s.logp.sum(), {}), policy, params, models.rollouts(), microbatch=2)
    assert found.unreached == {"idle.weight", "idle.bias"}
    assert float(found.gradient["flat"]) == 0.0
    assert float(found.gradient["idle.weight"].abs().max()) == 0.0


def test_what_was_found_can_be_read() -> None:
    policy, _ = fp.from_module(models.qwen2())
    text = str(policy.checks)
    assert text.startswith("copy of Qwen2ForCausalLM")
    assert "logits are the module's own" in text
    assert "decoding says what scoring says" in text


def test_a_checkpoint_of_what_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Break the copy once: a copy that ignores a leaf, and one whose head is scaled, are not believed."""
    from funcprobe.policy import split

    right = split.whole

    def scaled(skeleton: Any) -> split.Parts:
        parts = right(skeleton)
        return parts._replace(readout=lambda params, h: 1.01 * parts.readout(params, h))

    def deaf(skeleton: Any) -> split.Parts:
        parts = right(skeleton)
        held = {n: p.detach() for n, p in skeleton.module.named_parameters()}
        return parts._replace(
            features=lambda params, ids, mask: parts.features({**params, "head.bias": held["head.bias"]}, ids, mask)
        )

    for broken, message in ((scaled, "its logits are off by"), (deaf, "it does not react to 'head.bias'")):
        monkeypatch.setattr("funcprobe.policy.module.whole", broken)
        with pytest.raises(InputError, match=message):
            fp.from_module(models.two_lines())
