"""Every option of the built-in classes steps as torch does, bit for bit, and what does not fit is refused."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcprobe.errors import InputError
from funcprobe.optimizers.closed_form import PureOptimizer
from funcprobe.optimizers.factories import adam, adamw, clip_by_global_norm, from_param_groups, from_torch, sgd
from funcprobe.optimizers.groups import Group
from funcprobe.types import Optimizer
from tests.cases.live_optimizers import Counting, assert_parity, live
from tests.cases.scored import law
from tests.cases.trees import assert_same, gradients, leaves

SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW


#: Every option of the built-in classes, and every implementation of them that runs on a CPU.
OPTIONS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (SGD, {}),
    (SGD, {"momentum": 0.9}),
    (SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    (SGD, {"momentum": 0.8, "nesterov": True, "maximize": True}),
    (SGD, {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1, "foreach": True}),
    (SGD, {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1, "fused": True}),
    *(
        (cls, options)
        for cls in (ADAM, ADAMW)
        for options in (
            {},
            {"betas": (0.7, 0.95), "eps": 1e-5, "weight_decay": 0.2},
            {"amsgrad": True, "weight_decay": 0.1},
            {"maximize": True},
            {"foreach": True, "amsgrad": True, "maximize": True},
            {"fused": True, "weight_decay": 0.1},
            {"fused": True, "amsgrad": True, "maximize": True},
        )
    ),
    (ADAM, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("cls", "options"), OPTIONS, ids=lambda x: "" if isinstance(x, type) else None)
def test_bit_identical_to_the_class(
    cls: type[torch.optim.Optimizer], options: dict[str, Any], dtype: torch.dtype
) -> None:
    params = leaves(dtype)
    optimizer = from_torch(cls, lr=0.03, **options)
    assert isinstance(optimizer, PureOptimizer)
    assert_parity(optimizer, *live(cls, params, {"lr": 0.03, **options}), params)


def test_the_factories_are_the_classes() -> None:
    groups = [Group(("a",), {"lr": 0.2})]
    assert sgd(0.1, 0.9, 0.0, True, 0.2, True, fused=True) == from_torch(
        SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.2, maximize=True, fused=True
    )
    assert adam(0.1, (0.8, 0.9), 1e-6, 0.1, True, True, decoupled_weight_decay=True) == from_torch(
        ADAM,
        lr=0.1,
        betas=(0.8, 0.9),
        eps=1e-6,
        weight_decay=0.1,
        amsgrad=True,
        maximize=True,
        decoupled_weight_decay=True,
    )
    assert adamw(groups=groups, foreach=True) == from_torch(ADAMW, groups=groups, foreach=True)
    for optimizer in (sgd(0.1), adam(), adamw(), from_torch(torch.optim.RMSprop)):
        assert isinstance(optimizer, Optimizer)


@pytest.mark.parametrize(("cls", "options"), [(ADAMW, {}), (ADAMW, {"fused": True}), (ADAM, {}), (SGD, {})])
def test_groups_and_mixed_dtypes_keep_their_own_hyperparameters(
    cls: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    params = leaves()
    params = {**params, "gain": params["gain"].double(), "head": params["head"].bfloat16()}
    groups = [
        Group(("gain", "layer.10.weight"), {"weight_decay": 0.3, "lr": 0.01}),
        Group(()),
        Group(("head", "layer.2.bias"), {"weight_decay": 0.0, "lr": 0.05}),
    ]
    optimizer = from_torch(cls, groups=groups, lr=0.5, **options)
    assert optimizer.lr == 0.01
    instance, own = live(cls, params, {"lr": 0.5, **options}, groups)
    assert_parity(optimizer, instance, own, params)


def test_an_lr_for_one_call_replaces_every_groups() -> None:
    params, gradient = leaves(), gradients(leaves(), 1)
    groups = [Group(("gain", "head"), {"lr": 1.0}), Group(("layer.10.weight", "layer.2.bias"), {"lr": 2.0})]
    grouped, plain = adamw(groups=groups), adamw(0.125)
    state = plain.init(params)
    assert_same(grouped.apply(params, state, gradient, 0.125).params, plain.apply(params, state, gradient).params)
    assert_same(grouped.apply(params, state, gradient, 0.125).delta, plain.apply(params, state, gradient).delta)
    assert grouped.lr == 1.0


@pytest.mark.parametrize("lr", [-1e-3, float("nan"), float("inf"), "fast", None])
def test_a_learning_rate_out_of_range_is_refused(lr: Any) -> None:
    with pytest.raises(InputError, match="learning rate is"):
        adamw(lr)
    params = leaves()
    optimizer = adamw()
    if lr is not None:
        with pytest.raises(InputError, match="learning rate is"):
            optimizer.apply(params, optimizer.init(params), gradients(params, 0), lr)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adamw(eps=-1.0), "torch.optim.AdamW does not take these hyperparameters: Invalid epsilon"),
        (lambda: adamw(betas=(1.0, 0.9)), "Invalid beta parameter at index 0"),
        (lambda: sgd(0.1, nesterov=True), "Nesterov momentum requires a momentum"),
        (lambda: adam(foreach=True, fused=True), "cannot be `True` together"),
        (lambda: from_torch(torch.optim.RMSprop, lr=0.1, beta=1), "unexpected keyword argument 'beta'"),
        (lambda: sgd(0.1, groups=[]), "one group without names"),
        (lambda: sgd(0.1, groups=[Group(), Group(("a",))]), "one group without names"),
        (lambda: sgd(0.1, groups=[Group(("a", "b")), Group(("b",))]), "leaf 'b' is in two groups"),
        (lambda: Group("abc"), "single string 'abc'"),  # type: ignore[arg-type]
    ],
)
def test_options_that_do_not_fit_are_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_groups_must_name_every_leaf_and_no_other() -> None:
    params = {"a": torch.ones(1), "b": torch.ones(1)}
    with pytest.raises(InputError, match=r"No group of the optimizer names the parameter 'b' \(1 such\)"):
        sgd(0.1, groups=[Group(("a",))]).init(params)
    for optimizer in (sgd(0.1, groups=[Group(("a", "b", "c"))]), from_torch(Counting, groups=[Group(("a", "b", "c"))])):
        with pytest.raises(InputError, match="groups name 'c', which is not among the parameters"):
            optimizer.init(params)


def test_trees_that_do_not_fit_are_refused() -> None:
    params = {"a": torch.ones(2)}
    optimizer = adamw()
    state = optimizer.init(params)
    with pytest.raises(InputError, match="parameters and the gradient do not have the same leaves"):
        optimizer.apply(params, state, {"b": torch.ones(2)})
    with pytest.raises(InputError, match="differ in shape at 'a'"):
        optimizer.apply(params, state, {"a": torch.ones(3)})
    with pytest.raises(InputError, match="state has no entry for 'a'"):
        optimizer.apply(params, {}, {"a": torch.ones(2)})
    with pytest.raises(InputError, match=r"holds \['momentum_buffer'\], and this optimizer keeps"):
        optimizer.apply(params, {"a": {"momentum_buffer": torch.ones(2)}}, {"a": torch.ones(2)})
    with pytest.raises(InputError, match=r"'exp_avg' of 'a' has shape \(3,\) and the parameter \(2,\)"):
        optimizer.apply(params, {"a": {**state["a"], "exp_avg": torch.ones(3)}}, {"a": torch.ones(2)})
    with pytest.raises(InputError, match=r"'a' is torch\.int64"):
        optimizer.apply({"a": torch.ones(2).long()}, state, {"a": torch.ones(2).long()})


@pytest.mark.parametrize("cls", [SGD, ADAM, ADAMW, torch.optim.RMSprop])
def test_a_live_optimizers_groups_are_read_and_its_defaults_are_not(cls: type[torch.optim.Optimizer]) -> None:
    params = leaves()
    names = [["head", "gain"], [], ["layer.2.bias", "layer.10.weight"]]
    groups = [Group(tuple(mine), {"lr": 0.01 * (i + 1), "weight_decay": 0.1 * i}) for i, mine in enumerate(names)]
    instance, own = live(cls, params, {"lr": 0.5}, groups)
    torch.optim.lr_scheduler.LambdaLR(instance, lambda step: 0.5)  # leaves 'initial_lr' in the groups
    instance.defaults["lr"] = instance.defaults["weight_decay"] = 123.0
    for source in (instance.param_groups, instance.state_dict()["param_groups"]):
        optimizer = from_param_groups(cls, source, names)
        assert [g.hyperparameters["lr"] for g in optimizer.groups] == [0.005, 0.01, 0.015]
        assert [g.hyperparameters["weight_decay"] for g in optimizer.groups] == [0.0, 0.1, 0.2]
    ordered = {name: params[name] for name in params}
    assert_parity(from_param_groups(cls.__name__, instance.param_groups, names), instance, own, ordered)


def test_a_tensor_learning_rate_becomes_a_float() -> None:
    instance = ADAMW([torch.nn.Parameter(torch.ones(1))], lr=torch.tensor(0.25), betas=(0.5, 0.75))
    optimizer = from_param_groups(ADAMW, instance.param_groups, [["w"]])
    assert optimizer.lr == 0.25
    assert isinstance(optimizer.groups[0].hyperparameters["lr"], float)
    assert optimizer.groups[0].hyperparameters["betas"] == (0.5, 0.75)


def test_stored_groups_that_do_not_fit_are_refused() -> None:
    stored = ADAMW([torch.nn.Parameter(torch.ones(1))]).state_dict()["param_groups"]
    with pytest.raises(InputError, match="1 param_groups and 2 lists of names"):
        from_param_groups("AdamW", stored, [["a"], ["b"]])
    with pytest.raises(InputError, match="no optimizer named 'AdamX'"):
        from_param_groups("AdamX", stored, [["a"]])
    with pytest.raises(InputError, match=r"param_groups\[0\] has no 'betas', which AdamW needs"):
        from_param_groups("AdamW", [{k: v for k, v in stored[0].items() if k != "betas"}], [["a"]])
    old = [{k: v for k, v in stored[0].items() if k not in ("fused", "foreach", "maximize", "decoupled_weight_decay")}]
    assert from_param_groups("AdamW", old, [["a"]]) == from_param_groups("AdamW", stored, [["a"]])


@given(norm=st.floats(1e-8, 1e3), bound=st.floats(1e-6, 1e3))
@law
def test_clipping_is_torchs(norm: float, bound: float) -> None:
    direction = gradients(leaves(torch.float64), 3)
    scale = norm / float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in direction.values()])))
    gradient = {name: g * scale for name, g in direction.items()}
    coefficient, found = clip_by_global_norm(gradient, bound)
    own = {name: torch.nn.Parameter(torch.zeros_like(g)) for name, g in gradient.items()}
    for name, p in own.items():
        p.grad = gradient[name].clone()
    total = torch.nn.utils.clip_grad_norm_(list(own.values()), bound)
    # Two orders of summation over 63 squares in float64.
    assert found == pytest.approx(float(total), rel=1e-14)
    for name, p in own.items():
        torch.testing.assert_close(gradient[name] * coefficient, p.grad, rtol=1e-14, atol=0.0)


def test_a_clip_bound_is_above_zero() -> None:
    for bound in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="max_grad_norm is"):
            clip_by_global_norm({"w": torch.ones(1)}, bound)


def test_a_group_does_not_change_with_the_options_it_was_made_from() -> None:
    options = {"weight_decay": 0.5}
    group = Group(("a",), options)
    optimizer = adamw(groups=[group])
    options["weight_decay"] = 7.0
    assert group.hyperparameters["weight_decay"] == optimizer.groups[0].hyperparameters["weight_decay"] == 0.5
