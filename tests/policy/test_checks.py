"""The copy of a module proves that it is the module, or is refused; each kind of fault with several instances."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import funcprobe as fp
from funcprobe import engine, tree
from funcprobe.errors import InputError
from tests.cases import models
from tests.cases.checked import V, alone


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
