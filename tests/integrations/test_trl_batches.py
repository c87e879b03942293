"""What compute_loss gets, as rollouts: held against a real trainer's loss on inputs that a short run cannot make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import funcprobe as fp
from funcprobe.errors import FuncprobeWarning, InputError
from funcprobe.integrations.trl import objective_from_config, rollouts_from_trl
from tests.cases.third_party import third_party
from tests.cases.trl_runs import VOCABULARY, Run, arguments, distance, qwen2, train, trainables

NAN = float("nan")


def inputs(seed: int = 0, *, rows: int = 6, prompt: int = 4, completion: int = 7, **more: Tensor) -> dict[str, Any]:
    """Return a micro-batch as TRL pads it: prompts on the left, completions on the right."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, prompt + 1, (rows,), generator=g)
    spoken = torch.randint(2, completion + 1, (rows,), generator=g)
    lengths[0], spoken[1] = prompt, completion
    prompt_mask = (torch.arange(prompt) >= prompt - lengths[:, None]).long()
    completion_mask = (torch.arange(completion) < spoken[:, None]).long()
    return {
        "prompt_ids": (torch.arange(prompt) + 3) * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(3, VOCABULARY, (rows, completion), generator=g) * completion_mask,
        "completion_mask": completion_mask,
        "advantages": torch.randn(rows, generator=g),
        "num_items_in_batch": completion_mask.sum(),
        **more,
    }


def noise(seed: int, *shape: int, scale: float = 0.3) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def holes(batch: dict[str, Any]) -> Tensor:
    """Return a tool mask: a tool wrote the first token of one row, and inner ones of others."""
    mask = torch.ones_like(batch["completion_mask"])
    mask[1, 0] = mask[1, 3] = mask[2, 1] = 0
    return mask


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Return trainers that have been through a step, by their loss."""
    folder = tmp_path_factory.mktemp("trl")
    with third_party():
        from trl import GRPOConfig, GRPOTrainer

        settings: dict[str, dict[str, Any]] = {
            "dapo": {"loss_type": "dapo"},
            "grpo": {"loss_type": "grpo", "beta": 0.1},
            "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
            "cispo": {"loss_type": "cispo", "epsilon_high": 2.0},
        }
        made = {}
        for name, options in settings.items():
            config = GRPOConfig(**arguments(folder / name, max_steps=1, **options))
            made[name] = train(GRPOTrainer, config, qwen2(folder / "base"), None, (0,))
    return made


def theirs(run: Run, batch: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and the gradient that the trainer takes on these inputs."""
    names, parameters = zip(*trainables(run.trainer.model), strict=True)
    run.trainer.use_vllm = "importance_sampling_ratio" in batch  # what TRL asks before it reads that field
    with third_party():
        loss = run.trainer.compute_loss(run.trainer.model, batch)
        gradient = torch.autograd.grad(loss, parameters)
    return float(loss.detach()), dict(zip(names, gradient, strict=True))


def ours(run: Run, batch: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    plain = qwen2(Path(run.trainer.args.output_dir).parent / "base")
    plain.load_state_dict(run.trainer.model.state_dict())
    policy, params = fp.from_module(plain)
    step = fp.make_step(policy, objective_from_config(run.trainer.args, batch), fp.sgd(1.0))
    gradient, info = step.gradient(params, rollouts_from_trl(batch, temperature=run.trainer.args.temperature))
    return info["loss"], gradient


def by_token() -> Tensor:
    return noise(5, 6, 7, scale=1.0)


EXTRAS: dict[str, Any] = {
    "tool tokens": lambda b: {"tool_mask": holes(b), "num_items_in_batch": (b["completion_mask"] * holes(b)).sum()},
    "advantages of tokens": lambda b: {"advantages": by_token()},
    "advantages of tokens, tool tokens": lambda b: {"advantages": by_token(), "tool_mask": holes(b)},
    "a sampler's ratio of the sequence": lambda b: {"importance_sampling_ratio": noise(6, 6, 1).exp()},
    "a sampler's ratio of every token": lambda b: {"importance_sampling_ratio": noise(6, 6, 7).exp()},
    "a masked ratio, advantages of tokens": lambda b: {
        "importance_sampling_ratio": torch.tensor([0.0, 1.0, 1.1, 0.0, 0.7, 1.0])[:, None],
        "advantages": by_token(),
    },
}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("loss", ["dapo", "grpo", "gspo", "cispo"])
def test_the_gradient_is_that_of_the_trainers_loss(runs: dict[str, Run], loss: str, extra: str) -> None:
    run = runs[loss]
    batch = inputs(old_per_token_logps=noise(7, 6, 7) - 3, ref_per_token_logps=noise(8, 6, 7) - 3)
    _, plain = theirs(run, batch)
    batch |= EXTRAS[extra](batch)
    wanted, gradient = theirs(run, batch)
    found, mine = ours(run, batch)
    # float32 sums of a few dozen terms, in another order; 2e-6 at most was seen
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    assert distance(mine, gradient) < 1e-5
    assert distance(plain, gradient) > 1e-2, "the fields must matter"


def test_fields_and_rows_are_where_trl_has_them() -> None:
    logps = {name: noise(k, 6, 7) - 3 for k, name in enumerate(("old_per_token_logps", "ref_per_token_logps"))}
    batch = inputs(**logps, sampling_per_token_logps=noise(3, 6, 7) - 3)
    batch["tool_mask"] = holes(batch)
    found = rollouts_from_trl(batch, temperature=0.7, vocab_size=VOCABULARY)
    chosen = (batch["completion_mask"] * batch["tool_mask"]).bool()
    assert torch.equal(found.completion_mask, chosen)
    assert found.temperature.tolist() == [0.7] * 6
    for row in range(6):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
        said = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
        assert found.ids[row][found.attention_mask[row]].tolist() == prompt + said
        assert int(found.prompt_lengths[row]) == len(prompt)
    for theirs_name, mine in (
        ("old_per_token_logps", found.old_logps),
        ("ref_per_token_logps", found.ref_logps),
        ("sampling_per_token_logps", found.sampling_logps),
    ):
        assert mine is not None
        assert torch.equal(mine, torch.where(chosen, batch[theirs_name].double(), 0.0))
    same = [[a == b for b in batch["prompt_mask"].sum(1).tolist()] for a in batch["prompt_mask"].sum(1).tolist()]
    assert (found.group_ids[:, None] == found.group_ids).tolist() == same  # prompts here differ by their length


def test_micro_batches_of_any_width_are_one_batch() -> None:
    first, second = inputs(1, prompt=3, completion=5), inputs(2, rows=4, prompt=5, completion=8)
    joined = rollouts_from_trl([first, second], temperature=1.0)
    apart = [rollouts_from_trl(batch, temperature=1.0) for batch in (first, second)]
    for name, rows in (("ids", (0, 0)), ("completion_mask", (0, 0)), ("advantages", (0, 0))):
        whole = getattr(joined, name)
        for part, start in zip(apart, (0, 6), strict=True):
            mine = getattr(part, name)
            piece = whole[start : start + len(mine)]
            assert torch.equal(piece[:, : mine.shape[1]] if piece.ndim == 2 else piece, mine), (name, rows)
    wide = {**second, "advantages": second["advantages"][:, None] * torch.arange(1, 9)}
    assert rollouts_from_trl([first, wide], temperature=1.0).advantages.shape == joined.completion_mask.shape


def test_advantages_of_a_row_stay_those_of_the_row() -> None:
    batch = inputs()
    column = {**batch, "advantages": batch["advantages"][:, None]}
    spread = {**batch, "advantages": batch["advantages"][:, None].expand(6, 7).clone()}
    spread["advantages"][~batch["completion_mask"].bool()] = NAN  # nobody looks at padding
    for given in (batch, column, spread):
        assert torch.equal(rollouts_from_trl(given, temperature=1.0).advantages, batch["advantages"].double())


def test_tokens_that_the_sampler_did_not_score() -> None:
    sampling, old = noise(3, 6, 7) - 3, noise(4, 6, 7) - 3
    sampling[1, 2] = sampling[5, 0] = NAN
    batch = inputs(sampling_per_token_logps=sampling)
    with pytest.warns(FuncprobeWarning, match=r"no log-probability for 2 of \d+ tokens .* sampling_logps are left out"):
        assert rollouts_from_trl(batch, temperature=1.0).sampling_logps is None
    found = rollouts_from_trl({**batch, "old_per_token_logps": old}, temperature=1.0)
    assert found.sampling_logps is not None
    assert found.sampling_logps[1, 2] == old[1, 2].double()
    assert found.sampling_logps[1, 3] == sampling[1, 3].double()


def test_the_sum_of_rloo_is_spread_over_the_tokens_of_the_policy() -> None:
    batch = inputs(old_logps=torch.tensor([-1.0, -7.0, -3.0, -4.0, -5.0, -6.0]))
    batch["tool_mask"] = holes(batch)
    found = rollouts_from_trl(batch, temperature=1.0)
    assert found.old_logps is not None
    assert found.old_logps.sum(1).tolist() == pytest.approx([-1.0, -7.0, -3.0, -4.0, -5.0, -6.0], rel=1e-12)
    assert not bool(found.old_logps[~found.completion_mask].any())


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in inputs().items() if key != name}


WRONG: list[tuple[Any, str]] = [
    ([], "There is no micro-batch"),
    ([[1, 2]], "Micro-batch 0 is a list; expected the inputs of compute_loss"),
    ([inputs(), without("prompt_mask")], r"Micro-batch 1 has no prompt_mask"),
    ({**inputs(), "pixel_values": torch.zeros(1)}, r"Micro-batch 0 holds images \(pixel_values\)"),
    ([inputs(old_per_token_logps=noise(1, 6, 7) - 3), inputs()], "'old_per_token_logps' is missing in micro-batch 1"),
    ([inputs(), inputs(tool_mask=torch.ones(6, 7).long())], "'tool_mask' is missing in micro-batch 0"),
    ({**inputs(), "advantages": torch.full((6,), NAN)}, "Row 0: advantages is nan"),
    ({**inputs(), "advantages": torch.full((6, 7), NAN)}, "Row 0: advantages is nan"),
]


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_what_is_no_batch(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rollouts_from_trl(given, temperature=1.0)


def test_nothing_given_is_changed() -> None:
    batch = inputs(sampling_per_token_logps=noise(3, 6, 7) - 3, old_per_token_logps=noise(4, 6, 7) - 3)
    before = {name: value.clone() for name, value in batch.items()}
    rollouts_from_trl([batch, batch], temperature=1.0)
    assert all(torch.equal(batch[name], before[name]) for name in before)
