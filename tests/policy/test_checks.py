"""The copy of a module proves that it is the module, or is refused; each kind of fault with several instances."""

from __future__ import annotations

import functools
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import funcprobe as fp
from funcprobe import engine, tree
from funcprobe.errors import InputError, ReverseModeError
from funcprobe.policy.checks import COARSEST_FLOAT32
from tests.cases import models

V = models.VOCABULARY


def alone(module: nn.Module, rollouts: fp.Rollouts) -> Tensor:
    """Return the log-probabilities [B, T] that the module itself gives every row by itself, without padding."""
    module.eval()
    found = torch.zeros(rollouts.completion_mask.shape, dtype=torch.float64)
    for row in range(len(rollouts.ids)):
        start, length = int(rollouts.prompt_lengths[row]), int(rollouts.attention_mask[row].sum())
        with torch.no_grad():
            out = module(rollouts.ids[row : row + 1, :length])
        log_probs = (getattr(out, "logits", out)[0].double() / rollouts.temperature[row]).log_softmax(-1)
        for t in range(length - start):
            found[row, t] = log_probs[start + t - 1, rollouts.ids[row, start + t]]
    return found


def moves(policy: fp.Policy, params: fp.types.Params) -> bool:
    """Return whether first order and a small difference agree, and are not 0."""
    rollouts = models.rollouts(5, seed=1)
    v = models.direction(params, 1e-3)
    H = fp.anchored(fp.entropy(), policy, rollouts, params)
    change = float(H(tree.axpy(1.0, v, params)) - H(tree.axpy(-1.0, v, params))) / 2
    along = engine.directional(policy, params, v, rollouts)
    anchor = engine.detached(along.scores)
    slope = float(engine.derivative(lambda s: fp.entropy()(s, anchor, rollouts), along)[1])
    # third order at a step of 1e-3, and float32 inside
    return abs(change) > 1e-7 and abs(slope - change) < 2e-2 * abs(change)


def closure(module: nn.Module) -> nn.Module:
    inner = module.forward
    module.forward = lambda *a, **k: inner(*a, **k)  # type: ignore[method-assign]
    return module


def wrapped(module: nn.Module) -> nn.Module:
    inner = module.forward
    module.forward = functools.wraps(inner)(functools.partial(lambda f, *a, **k: f(*a, **k), inner))  # type: ignore[method-assign]
    return module


def fused_head(module: nn.Module) -> nn.Module:
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(module, outputs=("log_probs", "entropy"))
    return module


def hooked(module: nn.Module) -> nn.Module:
    import accelerate

    return accelerate.dispatch_model(module, {"": "cpu"}, force_hooks=True)


@pytest.mark.parametrize("patch", [closure, wrapped, fused_head, hooked], ids=lambda f: f.__name__)
def test_a_forward_set_on_an_instance_is_left_out(patch: Callable[[nn.Module], nn.Module]) -> None:
    plain, module = models.qwen2(), patch(models.qwen2())
    held = module.__dict__.get("forward")
    (policy, params), (own, _) = fp.from_module(module), fp.from_module(plain)
    rollouts = models.rollouts()
    assert torch.equal(fp.score(policy, params, rollouts).logp, fp.score(own, params, rollouts).logp)
    flat = {name: torch.zeros_like(p) for name, p in params.items()}
    found = fp.score(policy, flat, rollouts).logp[rollouts.completion_mask]
    torch.testing.assert_close(found, torch.full_like(found, -torch.tensor(float(V)).log()))
    assert moves(policy, params)
    assert module.__dict__.get("forward") is held
    assert policy.checks is not None
    assert "left out (" in policy.checks.results["forward set on an instance"]


def test_a_forward_that_is_not_the_class_s_is_kept_where_it_can_be() -> None:
    module = models.two_lines()
    module.forward = types.MethodType(lambda self, ids: 2 * type(self).forward(self, ids), module)  # type: ignore[method-assign]
    policy, params = fp.from_module(module)
    rollouts = models.rollouts()
    torch.testing.assert_close(fp.score(policy, params, rollouts).logp, alone(module, rollouts))
    assert moves(policy, params)
    assert policy.checks is not None
    assert any("is kept" in note for note in policy.checks.notes)


def bound_to_itself() -> nn.Module:
    """Return a module that keeps a closure over its own layer."""
    module = models.two_lines()
    head = module.head
    module.run = lambda x: head(x)  # type: ignore[assignment]
    module.forward = types.MethodType(lambda self, ids: self.run(torch.tanh(self.embed(ids))), module)  # type: ignore[method-assign]
    return module


class Keeps(models.TwoLines):
    """A layer reached by a closure alone, in the class's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.run = lambda x: self.head(x)

    def forward(self, ids: Tensor) -> Tensor:
        return self.run(torch.tanh(self.embed(ids)))


def doubled() -> nn.Module:
    """Return a module whose own forward is a closure and says something else than its class."""
    module = models.two_lines()
    inner = module.forward
    module.forward = lambda ids: 2 * inner(ids)  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize("build", [lambda: Keeps().double(), doubled], ids=["closure", "doubled"])
def test_what_is_bound_to_the_original_is_refused(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(InputError, match=r"A copy of \w+ is not the module: .*; pass the module without that"):
        fp.from_module(build())


class Casts(nn.Module):
    """A module that is float32 outside and bfloat16 inside."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.embed, self.head, self.how = nn.Embedding(V, 8), nn.Linear(8, V), how

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.embed(ids))
        if self.how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return self.head(x).float()
        if self.how == "cast":
            return nn.functional.linear(x.bfloat16(), self.head.weight.bfloat16()).float()
        return self.head(x)


@pytest.mark.parametrize(
    ("how", "dtype"), [("plain", torch.float32), ("autocast", torch.bfloat16), ("cast", torch.bfloat16)]
)
def test_the_precision_is_that_of_the_coarsest_product(how: str, dtype: torch.dtype) -> None:
    with models.seeded(1):
        policy, params = fp.from_module(Casts(how))
    assert engine.arithmetic(policy, params).eps == torch.finfo(dtype).eps


def test_constants_in_float32_are_no_precision() -> None:
    """Rotary tables are float32 in a float64 model; its norms are too, and these depend on the leaves."""
    policy, params = fp.from_module(models.gpt2())
    assert engine.arithmetic(policy, params).eps == torch.finfo(torch.float64).eps
    policy, params = fp.from_module(models.qwen2(torch.float64))
    assert engine.arithmetic(policy, params).eps == torch.finfo(torch.float32).eps


def test_autocast_of_accelerate_is_kept() -> None:
    from accelerate import Accelerator

    module = Accelerator(mixed_precision="bf16", cpu=True).prepare(models.qwen2())
    policy, params = fp.from_module(module)
    rollouts = models.rollouts()
    low = torch.finfo(torch.bfloat16).eps
    # logits of order one, rounded a few times in either; which way is a matter of kernels and shapes
    assert float((fp.score(policy, params, rollouts).logp - alone(module, rollouts)).abs().max()) < 16 * low
    assert engine.arithmetic(policy, params).eps == torch.finfo(torch.bfloat16).eps
    assert policy.checks is not None
    assert any("autocast in bfloat16" in note for note in policy.checks.notes)
    objective = fp.grpo()
    gradient, _ = fp.make_step(policy, objective, fp.sgd(1.0)).gradient(params, rollouts)
    assert set(gradient) == set(params)
    five_lines = torch.func.grad(fp.anchored(fp.entropy(), policy, rollouts, params))(params)
    assert all(bool(torch.isfinite(g).all()) for g in five_lines.values())
    assert float(tree.norm(five_lines)) > 0


def test_autocast_around_a_call_is_refused() -> None:
    policy, params = fp.from_module(models.two_lines(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        for call in (
            lambda: fp.score(policy, params, models.rollouts()),
            lambda: fp.from_module(models.two_lines(torch.float32)),
        ):
            with pytest.raises(InputError, match=r"torch.autocast \(bfloat16\) is on around this call"):
                call()


class Counts(models.TwoLines):
    """A router that counts tokens in a buffer, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(V))
        self.calls, self.last = 0, None

    def forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            self.seen.add_(torch.bincount(ids.flatten(), minlength=V))
        self.calls += 1
        self.last = self.embed(ids)
        return self.head(torch.tanh(self.last)) + 1e-3 * (self.seen > 100)


class Replaces(models.TwoLines):
    """A module that puts a new buffer in the place of an old one, as dynamic rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, ids: Tensor) -> Tensor:
        self.register_buffer("scale", self.scale * 0.5 + 0.5)
        return self.head(torch.tanh(self.embed(ids))) * self.scale


@pytest.mark.parametrize("build", [Counts, Replaces])
def test_what_forward_writes_is_the_copy_s_own_and_gone_afterwards(build: Callable[[], nn.Module]) -> None:
    with models.seeded(4):
        module = build().double()
    before = {name: b.clone() for name, b in module.named_buffers()}
    attributes = dict(module.__dict__)
    policy, params = fp.from_module(module)
    rollouts = models.rollouts()
    first, second = (fp.score(policy, params, rollouts).logp for _ in range(2))
    assert torch.equal(first, second)
    assert moves(policy, params)
    fp.make_step(policy, fp.grpo(), fp.sgd(1.0)).gradient(params, rollouts)
    assert all(torch.equal(b, before[name]) for name, b in module.named_buffers())
    assert module.__dict__ == attributes


def max_norm() -> nn.Module:
    module = models.two_lines()
    module.embed.max_norm = 1.0
    return module


class Normalises(models.TwoLines):
    """A module that keeps its head normalised, in forward."""

    def forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            self.head.weight.div_(self.head.weight.norm())
        return self.head(torch.tanh(self.embed(ids)))


@pytest.mark.parametrize(
    ("build", "where"),
    [
        (max_norm, r"The module 'embed' \(Embedding\) writes to its parameter 'embed.weight'"),
        (Normalises, "head.weight"),
    ],
)
def test_a_module_that_writes_to_a_leaf_is_named(build: Callable[[], nn.Module], where: str) -> None:
    module = build()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    with pytest.raises(InputError, match=where):
        fp.from_module(module)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


class Divides(models.TwoLines):
    """A module that divides by the norm of its input, which is 0 for the padding token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, 5, padding_idx=0)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x / x.norm(dim=-1, keepdim=True))


class Centred(models.TwoLines):
    """A module that centres its activations over the batch."""

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.embed(ids))
        return self.head(x - 0.5 * x.mean(0, keepdim=True))


def test_a_row_that_depends_on_its_batch_is_run_alone() -> None:
    for build in (Divides, Centred):
        with models.seeded(3):
            module = build().double()
        rollouts = models.rollouts()
        if build is Divides:  # token 0 never occurs
            rollouts = rollouts._replace(ids=rollouts.ids.clamp(min=1))
        policy, params = fp.from_module(module)
        step = fp.make_step(policy, fp.grpo(), fp.sgd(1.0))
        whole, _ = step.gradient(params, rollouts)
        apart, _ = fp.make_step(policy, fp.grpo(), fp.sgd(1.0), microbatch=1).gradient(params, rollouts)
        for name in whole:
            torch.testing.assert_close(whole[name], apart[name], rtol=1e-9, atol=1e-12)
        assert policy.checks is not None
        assert any("so every row is run alone" in text for text in policy.checks.warnings)
        torch.testing.assert_close(fp.score(policy, params, rollouts).logp, alone(module, rollouts))


class Backwards(models.TwoLines):
    """A module in which a token sees what comes after it."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids).flip(1).cumsum(1).flip(1)))


def encoder() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    with models.seeded(1):
        return BertForMaskedLM(
            BertConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        )


def encoder_decoder() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(vocab_size=V, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8))


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(nn.Sequential(nn.Embedding(V, 4), nn.Linear(4, V)))


def by_frequency() -> nn.Module:
    module = models.two_lines()
    module.embed.scale_grad_by_freq = True
    return module


class Random(models.TwoLines):
    """A module that drops at random whatever mode it is in."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(nn.functional.dropout(torch.tanh(self.embed(ids)), 0.5, training=True))


def offloaded() -> nn.Module:
    import accelerate

    return accelerate.cpu_offload(models.qwen2(), execution_device=torch.device("cpu"))


def inferred() -> nn.Module:
    with torch.inference_mode():
        return models.two_lines()


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "not causal": (Backwards, "sees what comes after it"),
    "encoder": (encoder, "sees what comes after it"),
    "encoder-decoder": (encoder_decoder, "is an encoder-decoder"),
    "scripted": (scripted, r"is scripted \(torch.jit\)"),
    "by frequency": (by_frequency, r"'embed' \(Embedding\) divides its gradient by how often"),
    "random": (Random, "draws random numbers in eval mode"),
    "offloaded": (offloaded, "is on the meta device and holds no numbers"),
    "inference": (inferred, "was made in inference mode"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_module_that_cannot_be_copied_is_refused_in_one_sentence(name: str) -> None:
    build, message = REFUSED[name]
    with pytest.raises(InputError, match=message) as caught:
        fp.from_module(build())
    assert str(caught.value).count("\n") == 0


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


def test_decoding_that_does_not_say_what_scoring_says_is_not_used() -> None:
    from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

    with models.seeded(2):
        recurrent = MambaForCausalLM(MambaConfig(vocab_size=V, hidden_size=8, state_size=4, num_hidden_layers=1))
        biased = BloomForCausalLM(BloomConfig(vocab_size=V, hidden_size=16, n_layer=1, n_head=2)).double()
    for module in (recurrent, biased):
        policy, params = fp.from_module(module)
        g = torch.Generator().manual_seed(0)
        drawn = fp.sample(policy, params, [[1, 2, 3, 4], [5]], generator=g, max_new_tokens=4, eos_id=None, group_size=2)
        assert drawn.sampling_logps is not None
        gap = (fp.score(policy, params, drawn).logp - drawn.sampling_logps).abs().max()
        assert float(gap) < 1e-5  # float32 inside both
