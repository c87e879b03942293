"""Our step on a live trl.GRPOTrainer is its step: the parameters, the loss and the gradient norm that it logs."""

from __future__ import annotations

import copy
import dataclasses
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import funcprobe as fp
from funcprobe import ProbeResult
from funcprobe.errors import FuncprobeWarning
from funcprobe.integrations.trl import objective_from_config, rollouts_from_trl
from funcprobe.policy.training_only import training_cautions, training_terms
from tests.cases import models
from tests.cases.routing import mixture
from tests.cases.third_party import third_party
from tests.cases.trees import assert_same
from tests.cases.trl_runs import (
    SETTINGS,
    VOCABULARY,
    arguments,
    distance,
    leaves,
    our_step,
    prompts,
    qwen2,
    train,
    trainables,
)

# Parameters of size .3 are stored to 1.5e-8 and move by about 1e-3: the difference of two stored ones is good to 2e-5
# at worst and, in the norm over entries of all sizes, to a fifth of that; 2e-6 to 5e-6 was seen.
SAME_STEP = 1e-5
# Sums of some thousand float32 products, in another order.
SAME_NUMBER = 1e-5


def grpo(
    folder: Path,
    look: Any = our_step,
    at: tuple[int, ...] = (2,),
    *,
    model: Any = None,
    lora: Any = None,
    texts: Any = None,
    **options: Any,
) -> Any:
    with third_party():
        from trl import GRPOConfig, GRPOTrainer

        config = GRPOConfig(**arguments(folder / "run", **options))
        model = qwen2(folder / "base") if model is None else model
        return train(GRPOTrainer, config, model, look, at, texts=texts, peft_config=lora)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trl")


def assert_same_step(run: Any) -> None:
    for number, seen in run.steps.items():
        ours: fp.StepResult = seen.ours
        clipped = fp.tree.scale(ours.info["clip_coefficient"], ours.gradient)
        assert distance(clipped, seen.gradient) < SAME_STEP, number
        assert distance(fp.tree.sub(ours.params, seen.before), seen.delta) < SAME_STEP, number
        assert ours.info["grad_norm"] == pytest.approx(seen.log["grad_norm"], rel=SAME_NUMBER), number
        assert ours.info["loss"] == pytest.approx(seen.log["loss"], rel=SAME_NUMBER, abs=SAME_NUMBER), number


@pytest.mark.parametrize("setting", SETTINGS)
def test_our_step_is_the_trainers(folder: Path, setting: str) -> None:
    at = (0, 1, 2) if setting == "defaults" else (2,)
    assert_same_step(grpo(folder, at=at, **SETTINGS[setting]))


def test_the_settings_are_what_they_say(folder: Path) -> None:
    off_policy = grpo(folder, at=(2,), num_iterations=3).steps[2]
    assert off_policy.ours.info["clip_fraction"] > 0.05
    truncated = grpo(folder, None, **SETTINGS["grpo without the truncated"])
    for seen in truncated.steps.values():
        empty = [int((half["completion_mask"].sum(1) == 0).sum()) for half in seen.inputs]
        assert 0 < sum(empty) < 16
    halves = grpo(folder, None, at=(2,), gradient_accumulation_steps=2).steps[2].inputs
    assert len({int(half["completion_mask"].sum()) for half in halves}) == 2


@pytest.mark.parametrize("dropout", [0.0])
def test_our_step_is_the_trainers_under_lora(folder: Path, dropout: float) -> None:
    with third_party():
        from peft import LoraConfig

        lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=dropout)
    run = grpo(folder, lora=lora, beta=0.1)
    assert any("lora_A" in name for name in run.steps[2].before)
    assert_same_step(run)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_iterations": 3}, {"gradient_accumulation_steps": 2, "normalize_advantages": True}],
    ids=["defaults", "off-policy", "accumulated"],
)
def test_our_step_is_that_of_rloo(folder: Path, options: dict[str, Any]) -> None:
    with third_party():
        from trl import RLOOConfig, RLOOTrainer

        config = RLOOConfig(**arguments(folder / "run", **options))
        run = train(RLOOTrainer, config, qwen2(folder / "base"), our_step, (2,))
    assert "old_logps" in run.steps[2].inputs[0]
    assert_same_step(run)


def looked_at(trainer: Any, model: nn.Module, optimizer: Any, inputs: list[dict[str, Any]]) -> ProbeResult:
    """Probe the live pair: sample E, take the step, measure; and ask what the run adds to it."""
    training_terms(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = probed(fp.from_training(model, optimizer), trainer, inputs)
    dropout = any("lora_dropout is 0.1" in str(warning.message) for warning in caught)
    assert dropout == any("lora_" in name for name, _ in model.named_parameters())
    assert len([warning for warning in caught if issubclass(warning.category, FuncprobeWarning)]) == dropout
    return found


def probed(pair: fp.Checkpoint, trainer: Any, inputs: list[dict[str, Any]]) -> ProbeResult:
    options = {"temperature": trainer.args.temperature, "max_new_tokens": 8, "eos_id": 1, "group_size": 4}
    given = [trainer.processing_class(text)["input_ids"] for text in prompts()[:3]]
    g = torch.Generator().manual_seed(0)
    evaluation = fp.sample(pair.policy, pair.params, given, generator=g, **options)
    objective = objective_from_config(trainer.args, inputs)
    step = fp.make_step(pair.policy, objective, pair.optimizer, max_grad_norm=trainer.args.max_grad_norm)
    batch = rollouts_from_trl(inputs, temperature=trainer.args.temperature)
    return fp.probe(fp.Update.from_step(step, pair.params, pair.opt_state, batch), evaluation)


def test_a_probe_of_the_live_model_is_that_of_a_plain_copy(folder: Path) -> None:
    def look(trainer: Any, model: nn.Module, optimizer: Any, inputs: list[dict[str, Any]]) -> Any:
        assert "forward" in vars(model), "TRL sets its fused head on the instance"
        assert model.is_gradient_checkpointing
        live = fp.from_training(model, optimizer)
        plain = copy.deepcopy(model)
        del plain.forward
        policy, params = fp.from_module(plain.eval())
        alone = dataclasses.replace(live, policy=policy, params=params)
        return probed(live, trainer, inputs), probed(alone, trainer, inputs)

    live, alone = grpo(folder, look, at=(2,), gradient_accumulation_steps=2).steps[2].ours
    assert abs(live.change) > 1e-4
    assert live.change == alone.change
    assert live.first_order == alone.first_order
    assert abs(live.first_order / live.change - 1) < 0.5


def left_behind(run: Any) -> dict[str, Any]:
    """Return everything that a look at a run could have changed."""
    state = run.trainer.optimizer.state
    timed = ("time", "runtime", "per_second")
    return {
        "parameters": leaves(run.trainer.model),
        "moments": {n: dict(state[p]) for n, p in trainables(run.trainer.model)},
        "generators": (torch.random.get_rng_state(), np.random.get_state(), random.getstate()),  # noqa: NPY002
        "log": [{k: v for k, v in e.items() if not any(t in k for t in timed)} for e in run.trainer.state.log_history],
        "modes": [(name, part.training) for name, part in run.trainer.model.named_modules()],
    }


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "LoRA with dropout"])
def test_a_probe_leaves_the_run_as_it_was(folder: Path, adapter: bool) -> None:
    with third_party():
        from peft import LoraConfig

    def run(look: Any) -> Any:
        lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1)
        return left_behind(grpo(folder, look, at=(0, 2), num_iterations=2, lora=lora if adapter else None))

    assert_same(run(looked_at), run(None))


def test_a_mixture_is_trained_on_its_routers_loss_as_well(folder: Path) -> None:
    def look(*given: Any) -> Any:
        with pytest.warns(FuncprobeWarning, match=r"load-balancing loss is not in the step: .* adds 0\.1 times it"):
            ours = our_step(*given)
        return ours, training_terms(given[1], router_aux_loss_coef=given[0].args.router_aux_loss_coef)

    gaps, told = {}, {}
    for coefficient in (None, 0.0):
        seen = grpo(
            folder,
            look,
            at=(1,),
            model=mixture("qwen3_moe", vocab_size=VOCABULARY, eos_token_id=1, router_aux_loss_coef=0.1),
            router_aux_loss_coef=coefficient,
        ).steps[1]
        ours, told[coefficient] = seen.ours
        gaps[coefficient] = distance(fp.tree.scale(ours.info["clip_coefficient"], ours.gradient), seen.gradient)
    assert gaps[0.0] < SAME_STEP
    assert gaps[None] > 100 * SAME_STEP
    assert told[0.0] == ()
    assert [(term.kind, term.value) for term in told[None]] == [("router loss", 0.1)]


def test_positions_that_count_the_padding_are_told(folder: Path) -> None:
    def gpt2() -> nn.Module:
        special = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
        return models.gpt2(torch.float32, VOCABULARY, seed=0, n_head=4, **special)

    def look(*given: Any) -> Any:
        batch = rollouts_from_trl(given[3], temperature=1.0)
        return our_step(*given), training_cautions(training_terms(given[1]), batch)

    for texts, differ in ((prompts(), True), (prompts((3,)), False)):
        seen = grpo(folder, look, at=(1,), model=gpt2(), texts=texts).steps[1]
        ours, told = seen.ours
        gap = distance(fp.tree.scale(ours.info["clip_coefficient"], ours.gradient), seen.gradient)
        assert gap > 0.01 if differ else gap < SAME_STEP
        assert len(told) == differ
        assert all("transformer.wpe counts the padding" in sentence for sentence in told)
