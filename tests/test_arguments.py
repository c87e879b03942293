"""Arguments that are swapped, missing or of another kind: every public verb names them, in an error of funcprobe's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import funcprobe as fp
from funcprobe.arguments import KINDS, checked
from funcprobe.errors import FuncprobeError, InputError
from tests.cases import models

MODULE = models.TwoLines().double()
POLICY, PARAMS = fp.from_module(MODULE)
E = fp.rollouts_from_lists(
    [[1, 2], [1, 2], [3], [3]], [[3, 4], [5], [2, 2], [1]], temperature=1.0, rewards=[0, 1, 1, 0]
)
OPTIMIZER = fp.adamw(1e-3)
STATE = OPTIMIZER.init(PARAMS)
STEP = fp.make_step(POLICY, fp.grpo(), OPTIMIZER)
UPDATE = fp.Update.from_step(STEP, PARAMS, STATE, batch=E)

#: Values of every kind, each wrong for most arguments.
WRONG: dict[str, Any] = {
    "None": None,
    "an integer": 3,
    "a text": "abc",
    "parameters": PARAMS,
    "rollouts": E,
    "an update": UPDATE,
    "a policy": POLICY,
    "a tensor": torch.zeros(2, 3),
    "a tensor on meta": torch.zeros(2, 3, device="meta"),
    "a list": [1, 2],
    "a dict": {"a": 1},
}

DRAWN = {"max_new_tokens": 2, "eos_id": 0}
MEASURED = {"update": UPDATE, "evaluation": E}
VERBS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "probe": (fp.probe, MEASURED),
    "sweep": (fp.sweep, {**MEASURED, "lrs": [1e-5, 1e-4]}),
    "curve": (fp.curve, {**MEASURED, "lr_max": 1e-4}),
    "attribute": (fp.attribute, MEASURED),
    "diagnose": (fp.diagnose, MEASURED),
    "validate": (fp.validate, MEASURED),
    "compare": (fp.compare, {"updates": {"a": UPDATE}, "evaluation": E}),
    "predict": (fp.predict, {"update": UPDATE}),
    "largest_lr": (fp.largest_lr, {**MEASURED, "min_ess": 0.5}),
    "second_order": (fp.second_order, MEASURED),
    "slope": (fp.slope, MEASURED),
    "from_module": (fp.from_module, {"module": MODULE}),
    "make_step": (fp.make_step, {"policy": POLICY, "objective": fp.grpo(), "optimizer": OPTIMIZER}),
    "score": (fp.score, {"policy": POLICY, "params": PARAMS, "rollouts": E}),
    "sample": (
        fp.sample,
        {"policy": POLICY, "params": PARAMS, "prompts": [[1]], "generator": torch.Generator(), **DRAWN},
    ),
    "from_step": (fp.Update.from_step, {"step": STEP, "params": PARAMS, "opt_state": STATE, "batch": E}),
    "from_delta": (fp.Update.from_delta, {"policy": POLICY, "params": PARAMS, "delta": PARAMS}),
    "stored": (fp.stored, {"optimizer": OPTIMIZER, "storage": {}}),
    "load": (fp.load, {"path": "nowhere"}),
    "read_rollouts": (fp.read_rollouts, {"path": "nowhere.jsonl"}),
    "load_checkpoint": (fp.load_checkpoint, {"folder": "nowhere"}),
    "adamw": (fp.adamw, {"lr": 1e-3}),
}

#: Arguments that a table of kinds tells apart, and those that every verb checks by itself.
CASES = [(verb, name) for verb, (_, given) in VERBS.items() for name in given if name not in (*DRAWN, "lrs", "min_ess")]


def is_right(name: str, value: Any) -> bool:
    """Return whether a value is of the kind that a name has, or a file that is only not there."""
    return name in KINDS and KINDS[name].holds(value)


@pytest.mark.parametrize(("verb", "name"), CASES, ids=lambda x: x)
def test_a_wrong_argument_is_an_error_of_ours(verb: str, name: str) -> None:
    call, given = VERBS[verb]
    for what, value in WRONG.items():
        if is_right(name, value) or value is inspect.signature(call).parameters[name].default:
            continue
        with pytest.raises(FuncprobeError) as caught:
            call(**{**given, name: value})
        if name in KINDS and hasattr(call, "__wrapped__"):
            assert str(caught.value).startswith(f"{name} is "), what


def test_swapped_arguments_are_named() -> None:
    with pytest.raises(InputError, match=r"update is a Rollouts; expected an Update, such as Update\.from_step"):
        fp.probe(E, UPDATE)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"policy is a dict; expected a Policy, such as from_module\(module\)\[0\]"):
        fp.score(PARAMS, POLICY, E)  # type: ignore[arg-type]


def test_a_default_is_never_refused() -> None:
    assert checked(lambda lr=None: lr)(lr=None) is None  # type: ignore[misc]
