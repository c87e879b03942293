"""A configuration becomes the loss that it stands for, or one sentence says what it is that has no expression."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from funcprobe.errors import FuncprobeWarning, InputError
from funcprobe.integrations.trl import objective_from_config
from funcprobe.objectives.accumulated import Accumulated
from funcprobe.objectives.policy_gradient import PolicyGradient
from tests.cases.third_party import third_party
from tests.cases.trl_runs import arguments


def config(**options: Any) -> Any:
    """Return a real GRPOConfig."""
    with third_party():
        from trl import GRPOConfig

        return GRPOConfig(**arguments("unused", **options))


def batch(tokens: int = 12, items: int | None = None) -> dict[str, Any]:
    mask = (torch.arange(8).view(2, 4) < tokens).long()
    return {
        "prompt_ids": torch.ones(2, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(2, 1, dtype=torch.int64),
        "completion_ids": torch.ones(2, 4, dtype=torch.int64),
        "completion_mask": mask,
        "advantages": torch.ones(2),
        "num_items_in_batch": torch.tensor(int(mask.sum()) if items is None else items),
    }


@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "luspo"])
def test_the_epsilons_are_trls_for_every_loss(loss: str) -> None:
    found = objective_from_config(config(loss_type=loss))
    assert isinstance(found, PolicyGradient)
    assert (found.name, found.epsilon, found.epsilon_high) == (loss, 0.2, 0.2)
    assert found.surrogate == ("capped" if loss == "cispo" else "clip")
    high = objective_from_config(config(loss_type=loss, epsilon=0.1, epsilon_high=0.28))
    assert (high.epsilon, high.epsilon_high) == (0.1, 0.28)


def test_the_options_of_a_loss() -> None:
    found = objective_from_config(
        config(loss_type="dr_grpo", beta=0.3, delta=2.0, use_bias_correction_kl=False, scale_rewards=True)
    )
    assert (found.beta, found.delta, found.use_bias_correction_kl) == (0.3, 2.0, False)
    assert (found.scale_rewards, found.max_completion_length) == ("group", 8)
    assert objective_from_config(config(scale_rewards=False)).scale_rewards == "none"
    assert objective_from_config(config(scale_rewards="batch")).scale_rewards == "batch"
    assert objective_from_config(config(loss_type="cispo", delta=2.0)).delta is None  # TRL does not read it there
    sequence = objective_from_config(config(loss_type="grpo", importance_sampling_level="sequence"))
    assert (sequence.name, sequence.ratio) == ("gspo", "sequence_mean")


def test_rloo_is_told_from_its_configuration() -> None:
    with third_party():
        from trl import RLOOConfig

        found = objective_from_config(RLOOConfig(**arguments("unused", epsilon=0.1)))
    assert (found.name, found.ratio, found.epsilon, found.epsilon_high) == ("rloo", "sequence_sum", 0.1, 0.1)
    assert (found.baseline, found.scale_rewards) == ("leave_one_out", "none")


def test_a_batch_of_tokens_is_divided_by_the_items_of_its_generation() -> None:
    two = {"gradient_accumulation_steps": 2}
    for loss in ("dapo", "cispo"):
        assert objective_from_config(config(loss_type=loss), batch(6)).normaliser == 6
        assert objective_from_config(config(loss_type=loss, steps_per_generation=4), batch(6, 20)).normaliser == 5
        assert objective_from_config(config(loss_type=loss, **two), [batch(6, 10), batch(4, 10)]).normaliser == 10
        apart = objective_from_config(config(loss_type=loss, steps_per_generation=1, **two), [batch(6), batch(4)])
        assert isinstance(apart, Accumulated)
        assert (apart.rows, apart.divisors) == ((2, 2), (12, 8))
    assert objective_from_config(config(loss_type="bnpo"), batch(6)).normaliser == 6
    by_itself = objective_from_config(config(loss_type="bnpo", **two), [batch(6), batch(3)])
    assert isinstance(by_itself, Accumulated)
    assert by_itself.divisors == (12, 6)
    for loss in ("grpo", "dr_grpo", "luspo"):
        assert objective_from_config(config(loss_type=loss, **two), [batch(6), batch(3)]).normaliser is None
    assert objective_from_config(config(), batch(0)).normaliser == 1  # all truncated: TRL divides by 1


def test_processes_cancel_in_a_divisor_of_all_tokens() -> None:
    fields = {"loss_type": "dapo", "epsilon": 0.2, "beta": 0.0, "world_size": 2, "gradient_accumulation_steps": 1}
    every = [batch(6, 10), batch(4, 10)]  # one micro-batch of either process
    assert objective_from_config(SimpleNamespace(**fields), every).normaliser == 10
    found = objective_from_config(SimpleNamespace(**{**fields, "loss_type": "bnpo"}), every)
    assert isinstance(found, Accumulated)
    assert found.divisors == (12, 8)


def test_an_older_configuration_lacks_what_it_does_not_do() -> None:
    found = objective_from_config(SimpleNamespace(loss_type="bnpo", epsilon=0.2, beta=0.1))
    assert (found.use_bias_correction_kl, found.ratio, found.delta) == (False, "token", None)


NOT_EXPRESSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"loss_type": "sapo"}, "loss_type 'sapo' is not expressible; the losses that are: grpo, bnpo, dr_grpo, dapo"),
    ({"loss_type": "vespo"}, "loss_type 'vespo' is not expressible"),
    ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold, which drops sequences .* is not expressible"),
    ({"use_adaptive_entropy": True}, "use_adaptive_entropy, whose coefficient the trainer keeps, is not expressible"),
    ({"entropy_coef": 0.1, "loss_type": "grpo"}, "entropy_coef is expressible where"),
    ({"entropy_coef": 0.1, "top_entropy_quantile": 0.5}, "entropy_coef is expressible where"),
]


@pytest.mark.parametrize(("options", "message"), NOT_EXPRESSIBLE)
@pytest.mark.parametrize("given", [None, batch()], ids=["alone", "with its batch"])
def test_what_has_no_expression(options: dict[str, Any], message: str, given: Any) -> None:
    with pytest.raises(InputError, match=message + r".*The trainer's own gradient is right for it.*step\.apply"):
        objective_from_config(config(**options), given)


NEEDS_INPUTS: list[dict[str, Any]] = [
    {"steps_per_generation": 2},
    {"loss_type": "cispo", "gradient_accumulation_steps": 2, "steps_per_generation": 1},
    {"loss_type": "bnpo", "gradient_accumulation_steps": 2},
    {"loss_type": "grpo", "top_entropy_quantile": 0.5, "gradient_accumulation_steps": 2},
]


@pytest.mark.parametrize("options", NEEDS_INPUTS)
def test_a_batch_of_more_than_the_step_is_asked_for(options: dict[str, Any]) -> None:
    with pytest.raises(
        InputError, match=r"averages over other tokens .* give the micro-batches of the step as `inputs`"
    ):
        objective_from_config(config(**options))


def test_micro_batches_are_those_of_one_step() -> None:
    with pytest.raises(InputError, match="There are 2 micro-batches, and a step of this run has 1; give those of one"):
        objective_from_config(config(), [batch(), batch()])
    with pytest.warns(
        FuncprobeWarning, match="There are 1 micro-batches, and a step of this run has 2: they are taken"
    ):
        found = objective_from_config(config(gradient_accumulation_steps=2), batch(6, 10))
    assert found.normaliser == 5
    lacking = {name: x for name, x in batch().items() if name != "num_items_in_batch"}
    with pytest.raises(InputError, match="no num_items_in_batch"):
        objective_from_config(config(), lacking)
    assert objective_from_config(config(loss_type="grpo"), lacking).normaliser is None


def test_what_is_no_configuration() -> None:
    with pytest.raises(InputError, match="The configuration, a SimpleNamespace, has no field 'loss_type'"):
        objective_from_config(SimpleNamespace(epsilon=0.2))
    with pytest.raises(InputError, match="has no field 'beta'"):
        objective_from_config(SimpleNamespace(loss_type="grpo", epsilon=0.2))
    with pytest.raises(InputError, match="importance_sampling_level is 'word'; expected 'token' or 'sequence'"):
        objective_from_config(SimpleNamespace(loss_type="grpo", importance_sampling_level="word"))
