"""A leaf without a gradient is left alone, as torch.optim does where `.grad` is None; 0 is another thing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcprobe as fp
from funcprobe import tree
from funcprobe.errors import InputError
from funcprobe.optimizers.closed_form import PureOptimizer
from funcprobe.optimizers.factories import clip_by_global_norm, from_torch
from funcprobe.training.response import offsets_of, respond
from funcprobe.types import Gradients, OptState, Params
from tests.cases import models
from tests.cases.tables import TORCH_CLASSES
from tests.cases.trees import assert_same, clone

#: A policy of which no model is run here.
NOBODY: Any = SimpleNamespace(names=(), vocab_size=0, device="cpu")

every = pytest.mark.parametrize("name", TORCH_CLASSES)
#: Those that move a leaf whose gradient is 0.
MOVED = [name for name, (_, o) in TORCH_CLASSES.items() if o.get("weight_decay") or o.get("momentum")]
SHAPES = {"first": (4, 6), "unused": (3, 5), "last": (2, 7), "idle": (3, 3)}
ALONE = ("unused", "idle")


def drawn(seed: int, alone: tuple[str, ...] = ()) -> Any:
    g = torch.Generator().manual_seed(seed)
    return {n: None if n in alone else torch.randn(shape, generator=g) for n, shape in SHAPES.items()}


def built(name: str) -> Any:
    cls, options = TORCH_CLASSES[name]
    return from_torch(cls, lr=0.03, **options)


def instance_of(optimizer: Any, params: Params) -> tuple[torch.optim.Optimizer, dict[str, nn.Parameter]]:
    own = {n: nn.Parameter(p.clone()) for n, p in params.items()}
    (group,) = optimizer.groups
    return optimizer.cls([{"params": list(own.values()), **group.hyperparameters}], lr=0.03), own


def torch_step(instance: torch.optim.Optimizer, own: dict[str, nn.Parameter], gradient: Gradients) -> None:
    for n, p in own.items():
        g = gradient[n]
        p.grad = None if g is None else g.clone()
    instance.step()


@every
@pytest.mark.parametrize("warm", [False, True])
def test_two_steps_are_those_of_torch_with_no_grad(name: str, warm: bool) -> None:
    optimizer, params = built(name), drawn(0)
    instance, own = instance_of(optimizer, params)
    state = optimizer.init(params)
    if warm:  # a first step that reaches every leaf, so that there are moments to be kept
        torch_step(instance, own, drawn(1))
        params, _, state = optimizer.apply(params, state, drawn(1))
    kept = clone(params), clone(state)
    for seed in (2, 3):
        gradient = drawn(seed, ALONE)
        torch_step(instance, own, gradient)
        params, update, state = optimizer.apply(params, state, gradient)
        assert_same(params, {n: p.detach() for n, p in own.items()})
        assert list(params) == list(update) == list(state) == list(SHAPES)
        for n in ALONE:
            assert not bool(update[n].any())
            assert_same(state[n], kept[1][n])
            assert_same(params[n], kept[0][n])
        for n in set(SHAPES) - set(ALONE):
            assert_same(state[n], {k: v for k, v in instance.state[own[n]].items() if v is not None})
            assert bool(update[n].any())


@every
def test_an_absent_state_stays_absent(name: str) -> None:
    optimizer, params = built(name), drawn(0)
    state: OptState = {n: {} for n in params}
    found = optimizer.apply(params, state, drawn(2, ALONE))
    assert found.opt_state["unused"] == {}
    assert found.opt_state["idle"] == {}
    assert bool(found.opt_state["first"])


@every
def test_applying_to_some_leaves_is_pure(name: str) -> None:
    optimizer, params = built(name), drawn(0)
    params, _, state = optimizer.apply(params, optimizer.init(params), drawn(1))
    gradient = drawn(2, ALONE)
    found = optimizer.apply(params, state, gradient)
    kept = clone(found.params), clone(found.opt_state)
    for leaf in (*params.values(), *(x for entries in state.values() for x in entries.values())):
        leaf.fill_(7.0)
    assert_same(found.params, kept[0])
    assert_same(found.opt_state, kept[1])


@pytest.mark.parametrize("name", MOVED)
def test_a_gradient_of_zero_is_another_thing(name: str) -> None:
    optimizer, params = built(name), drawn(0)
    params, _, state = optimizer.apply(params, optimizer.init(params), drawn(1))
    zero = {n: torch.zeros(SHAPES[n]) if g is None else g for n, g in drawn(2, ALONE).items()}
    found = optimizer.apply(params, state, zero)
    assert all(bool(found.delta[n].any()) for n in ALONE)


@every
def test_the_step_answers_to_nothing_there(name: str) -> None:
    optimizer, params = built(name), drawn(0)
    params, _, state = optimizer.apply(params, optimizer.init(params), drawn(1))
    gradient, covector = drawn(2, ALONE), tree.cast(drawn(5), torch.float64)
    pulled = optimizer.vjp(params, state, gradient, covector)
    without = {n: x for n, x in params.items() if n not in ALONE}
    alone = optimizer.vjp(without, state, {n: gradient[n] for n in without}, {n: covector[n] for n in without})
    assert list(pulled) == list(SHAPES)
    assert_same({n: pulled[n] for n in without}, alone)
    assert all(pulled[n].dtype == alone["first"].dtype and not bool(pulled[n].any()) for n in ALONE)
    if isinstance(optimizer, PureOptimizer):
        terms = optimizer.terms(params, state, gradient)
        pieces = list(optimizer.pieces(params, state, gradient))
        assert [n for n, _, _ in pieces] == list(SHAPES)
        for n in ALONE:
            assert not any(bool(x.any()) for x in terms[n])
            assert all(x.shape == SHAPES[n] for x in terms[n])
        assert not any(bool(x.any()) for n, g, t in pieces if n in ALONE for x in (g, *t))
        assert not any(bool(optimizer.delta(params, state, gradient)[n].any()) for n in ALONE)


@pytest.mark.parametrize("clip", [None, 0.5, 1e6])
@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop"])
def test_shares_and_offsets_sum_to_the_whole(name: str, clip: float | None) -> None:
    optimizer, params = built(name), drawn(0)
    step: Any = fp.make_step(NOBODY, fp.grpo(), optimizer, clip)
    state = step.apply(params, optimizer.init(params), drawn(1)).opt_state
    gradient, covector = drawn(2, ALONE), tree.cast(drawn(5), torch.float64)
    found, taken = respond(step.rule, params, state, gradient, covector), step.apply(params, state, gradient)
    assert taken.info["leaves_without_gradient"] == 2
    assert taken.gradient["unused"] is None
    assert not any(bool(found.direction[n].any()) for n in ALONE)
    if found.form == "jacobian":
        return
    trees = offsets_of(step.rule, params, state, gradient)
    for n, g in gradient.items():
        shares = [0.0 if g is None else float(tree.dot({n: found.direction[n]}, {n: g}))]
        shares += [offset[n] for offset in found.offsets.values()]
        whole = float(tree.dot({n: covector[n]}, {n: taken.delta[n]}))
        # direction, clipped gradient and update are kept in float32: a few roundings of 2^-24 on each term
        assert sum(shares) == pytest.approx(whole, abs=1e-6 * (sum(map(abs, shares)) + abs(whole)))
        if g is None:
            assert shares == [0.0, 0.0, 0.0]
            assert not any(bool(offset[n].any()) for offset in trees.values())


def test_the_norm_is_that_of_what_is_there() -> None:
    gradient = drawn(2, ALONE)
    own = {n: nn.Parameter(torch.zeros(shape)) for n, shape in SHAPES.items()}
    for n, p in own.items():
        p.grad = None if gradient[n] is None else gradient[n].double().to(torch.float32)
    total = float(torch.nn.utils.clip_grad_norm_(list(own.values()), 0.5))
    coefficient, norm = clip_by_global_norm(gradient, 0.5)
    assert norm == pytest.approx(total, rel=1e-6)  # torch sums 38 squares in float32
    step: Any = fp.make_step(NOBODY, fp.grpo(), fp.sgd(0.1), 0.5)
    clipped, factor, _ = step.rule.clipped(gradient)
    assert factor == coefficient < 1
    assert [n for n, g in clipped.items() if g is None] == list(ALONE)
    for n, p in own.items():
        if p.grad is not None:
            torch.testing.assert_close(clipped[n], p.grad, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("optimizer", [fp.adamw(0.1), from_torch(torch.optim.RMSprop, lr=0.1)])
def test_none_is_said_explicitly_and_not_of_every_leaf(optimizer: Any) -> None:
    params = drawn(0)
    state = optimizer.init(params)
    with pytest.raises(InputError, match="missing 'unused', unexpected none"):
        optimizer.apply(params, state, {n: g for n, g in drawn(2).items() if n != "unused"})
    with pytest.raises(InputError, match="missing none, unexpected 'other'"):
        optimizer.apply(params, state, {**drawn(2), "other": None})
    with pytest.raises(InputError, match=r"No leaf has a gradient \(first, unused, last, idle\): the loss depends on"):
        optimizer.apply(params, state, drawn(2, tuple(SHAPES)))
    step: Any = fp.make_step(NOBODY, fp.grpo(), optimizer, 1.0)
    with pytest.raises(InputError, match="No leaf has a gradient"):
        step.apply(params, state, drawn(2, tuple(SHAPES)))


def value_head() -> nn.Module:
    """A language model with a head for values, which no log-probability depends on."""

    class WithValues(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.v_head = models.gpt2(vocabulary=9), nn.Linear(9, 1)

        def forward(self, ids: Tensor) -> Any:
            logits = self.model(input_ids=ids).logits
            return SimpleNamespace(logits=logits, value=self.v_head(logits))

    with models.seeded(4):
        return WithValues().double()


def two_adapters() -> nn.Module:
    """A model with two LoRA adapters that are both trainable, of which one is active."""
    from peft import LoraConfig

    model: Any = models.lora(torch.float64)
    with models.seeded(11):
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("default")
    for name, leaf in model.named_parameters():
        leaf.requires_grad_("lora_" in name)
    return model.double()


#: The model, what only its first step reaches, and rollouts that leave something unreached.
MODELS: dict[str, tuple[Any, fp.Rollouts, set[str]]] = {
    "experts": (models.experts, models.reaching([0, 1, 3, 4, 6, 7]), {"experts.2.weight"}),
    "one expert": (models.experts, models.reaching([0, 3]), {"experts.1.weight", "experts.2.weight"}),
    "value head": (value_head, models.reaching([0, 1, 5]), {"v_head.weight", "v_head.bias"}),
    "two adapters": (two_adapters, models.reaching([0, 1, 5]), {"second"}),
}
#: One of each way to step.
OPTIMIZERS = [TORCH_CLASSES[name] for name in ("SGD", "Adam", "AdamW", "RMSprop", "Adafactor decay", "Muon")]


def loss_by_hand(model: nn.Module, batch: fp.Rollouts) -> Tensor:
    """REINFORCE over rows of equal length, as a training loop writes it."""
    output = model(batch.ids)
    logp = getattr(output, "logits", output).double().log_softmax(-1)[:, :-1]
    taken = logp.gather(-1, batch.ids[:, 1:, None])[..., 0]
    assert batch.advantages is not None
    return -(batch.advantages * taken.mean(1)).mean()


@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
@pytest.mark.parametrize("warm", [False, True])
def test_a_training_loop_is_followed(
    which: str, cls: type[torch.optim.Optimizer], options: dict[str, Any], warm: bool
) -> None:
    make, batch, words = MODELS[which]
    model = make().eval()
    leaves = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if cls is torch.optim.Muon and any(p.dim() != 2 for p in leaves.values()):
        for p in model.parameters():  # Muon takes matrices only
            p.requires_grad_(p.requires_grad and p.dim() == 2)
        leaves = {n: p for n, p in leaves.items() if p.requires_grad}
    optimizer = cls(list(leaves.values()), lr=0.01, **options)
    if warm:
        for n, p in leaves.items():
            p.grad = torch.full_like(p, 0.1 + len(n) % 3)
        optimizer.step()
    c = fp.from_training(model, optimizer)
    assert c.optimizer is not None
    step = fp.make_step(c.policy, fp.reinforce(aggregation="sequence_mean"), c.optimizer)
    params, state = clone(c.params), clone(c.opt_state)
    for _ in range(2):
        gradient, _ = step.gradient(params, batch)
        optimizer.zero_grad()
        loss_by_hand(model, batch).backward()
        alone = {n for n, p in leaves.items() if p.grad is None}
        assert (
            alone == {n for n, g in gradient.items() if g is None} == {n for n in leaves if any(w in n for w in words)}
        )
        for n, p in leaves.items():
            g = gradient[n]
            if g is not None:
                assert p.grad is not None
                # two orders of summation in float64 over a few hundred terms of size 1
                torch.testing.assert_close(g, p.grad, rtol=1e-9, atol=1e-12)
                p.grad = g.clone()
        optimizer.step()
        params, update, state, _, info = step.apply(params, state, gradient)
        assert_same(params, {n: p.detach() for n, p in leaves.items()})
        assert info["leaves_without_gradient"] == len(alone)
        assert not any(bool(update[n].any()) for n in alone)
    expected = {n: {k: v for k, v in optimizer.state.get(p, {}).items() if v is not None} for n, p in leaves.items()}
    assert_same(
        {n: dict(sorted(s.items())) for n, s in state.items()},
        {n: dict(sorted(s.items())) for n, s in expected.items()},
    )


def test_a_loss_that_reaches_no_leaf_is_refused() -> None:
    model = models.experts()
    for name, leaf in model.named_parameters():
        leaf.requires_grad_("experts.2" in name)
    policy, params = fp.from_module(model)
    step = fp.make_step(policy, fp.reinforce(), fp.adamw(1e-3))
    with pytest.raises(InputError, match=r"No leaf has a gradient \(experts\.2\.weight\)"):
        step(params, step.optimizer.init(params), models.reaching([0, 1, 3]))
