"""Train the demo's policy with funcprobe's own pure step: supervised steps first, then on-policy GRPO steps.

A supervised step is REINFORCE with advantage 1 on given answers, so both stages are one function of rollouts. The
answers have slips in them: the policy learns the task with an entropy that is really there, and RL then takes it away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from funcprobe import engine
from funcprobe.cli.demo_task import SYMBOLS, answer, build_tokenizer, draw_prompts, reward
from funcprobe.data.rollouts import rollouts_from_lists
from funcprobe.errors import missing_extra
from funcprobe.objectives.losses import grpo, reinforce
from funcprobe.optimizers.closed_form import PureOptimizer
from funcprobe.optimizers.factories import adamw
from funcprobe.policy.module import Policy, from_module
from funcprobe.policy.sampling import sample
from funcprobe.training.step import make_step
from funcprobe.types import OptState, Params, Progress, Rollouts

#: The clip norm of every training step: the default of transformers and TRL.
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class DemoSize:
    """How large the demo is: model, training and rollouts. The default takes about ten seconds."""

    hidden_size: int = 64  #: width of the model
    layers: int = 2  #: decoder layers
    heads: int = 4  #: attention heads; half as many key-value heads
    shortest: int = 4  #: digits of the shortest prompt
    longest: int = 6  #: digits of the longest prompt, and the width of the field
    supervised_steps: int = 250  #: steps on given answers
    supervised_batch: int = 64  #: answers a step
    supervised_lr: float = 8e-3  #: peak learning rate of those steps
    slip_rate: float = 0.1  #: share of wrong additions in the answers that are shown
    rl_steps: int = 20  #: GRPO steps, each on rollouts of the current policy
    rl_run: int = 30  #: steps of the whole run, at whose end a linear schedule reaches 0
    rl_lr: float = 3e-4  #: learning rate of the first of those steps
    group_size: int = 8  #: completions a prompt
    batch_prompts: int = 16  #: prompts of one GRPO step, and of the batch U
    evaluation_prompts: int = 64  #: prompts of the evaluation batch E


class Trained(NamedTuple):
    """The trained policy, and the results of the two stages of its training."""

    module: nn.Module  #: the Hugging Face model as it was initialised; gives configuration and frozen state
    policy: Policy  #: that model as pure functions
    params: Params  #: the trained leaves
    optimizer: PureOptimizer  #: AdamW of the GRPO stage, at the learning rate of the step that would come next
    opt_state: OptState  #: its moments after the last step
    tokenizer: Any  #: of `demo_task`
    history: dict[str, dict[str, float]]  #: stage -> reward, share of exact answers, entropy in nats per token


def train(size: DemoSize, seed: int, generator: torch.Generator, progress: Progress | None = None) -> Trained:
    """Return a policy initialised from `seed` and trained on data drawn from `generator`; no other randomness enters.

    Raises:
        MissingExtraError: If transformers is not installed.
    """
    module, tokenizer = build_model(size, seed), build_tokenizer()
    policy, params = from_module(module)
    history = {"untrained": _measure(size, policy, params, tokenizer, generator)}
    params = _supervised(size, policy, params, tokenizer, generator, progress)
    history["supervised"] = _measure(size, policy, params, tokenizer, generator)
    params, opt_state = _reinforced(size, policy, params, tokenizer, generator, progress)
    history["reinforced"] = _measure(size, policy, params, tokenizer, generator)
    return Trained(module, policy, params, _optimizer(size, size.rl_steps), opt_state, tokenizer, history)


def build_model(size: DemoSize, seed: int) -> nn.Module:
    """Return a Qwen2 model with random weights of that seed; the global random state is as before.

    Raises:
        MissingExtraError: If transformers is not installed.
    """
    try:
        from transformers import Qwen2Config, Qwen2ForCausalLM
    except ImportError as error:
        missing = missing_extra("transformers", "hf", "the demo's model")
        raise missing from error
    config = Qwen2Config(
        vocab_size=len(SYMBOLS),
        hidden_size=size.hidden_size,
        intermediate_size=2 * size.hidden_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=max(1, size.heads // 2),
        max_position_embeddings=64,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SYMBOLS.index("<eos>"),
        pad_token_id=SYMBOLS.index("<pad>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def draw_rollouts(
    size: DemoSize,
    policy: Policy,
    params: Params,
    tokenizer: Any,
    prompts: list[str],
    generator: torch.Generator,
    step: int | None = None,
    progress: Progress | None = None,
) -> Rollouts:
    """Return the policy's rollouts on those prompts with the task's rewards, a group of completions a prompt."""
    return sample(
        policy,
        params,
        [tokenizer.encode(prompt) for prompt in prompts],
        generator=generator,
        max_new_tokens=size.longest + 2,  # one more than the longest answer and its end token
        eos_id=tokenizer.eos_token_id,
        group_size=size.group_size,
        reward=reward,
        tokenizer=tokenizer,
        batch_size=512,
        progress=progress,
        step=step,
    )


def _supervised(
    size: DemoSize,
    policy: Policy,
    params: Params,
    tokenizer: Any,
    generator: torch.Generator,
    progress: Progress | None,
) -> Params:
    """Return the leaves after steps on given answers, at a learning rate that warms up and then falls to a tenth."""
    objective = reinforce(baseline="none", scale_rewards="none", aggregation="token_mean")
    optimizer = adamw(size.supervised_lr, weight_decay=0.0)
    step, opt_state = make_step(policy, objective, optimizer, MAX_GRAD_NORM), optimizer.init(params)
    for number in range(1, size.supervised_steps + 1):
        batch = _given_answers(size, tokenizer, generator)
        lr = size.supervised_lr * min(1.0, number / 20) * (1 - 0.9 * number / size.supervised_steps)
        params, _, opt_state, *_ = step(params, opt_state, batch, lr=lr)
        _report(progress, "supervised steps", number, size.supervised_steps)
    return params


def _reinforced(
    size: DemoSize,
    policy: Policy,
    params: Params,
    tokenizer: Any,
    generator: torch.Generator,
    progress: Progress | None,
) -> tuple[Params, OptState]:
    """Return leaves and moments after GRPO steps, each on fresh rollouts of the policy of that moment."""
    opt_state = _optimizer(size, 0).init(params)
    for number in range(size.rl_steps):
        prompts = draw_prompts(size.batch_prompts, size.shortest, size.longest, generator)
        batch = draw_rollouts(size, policy, params, tokenizer, prompts, generator)
        step = make_step(policy, grpo(), _optimizer(size, number), MAX_GRAD_NORM)
        params, _, opt_state, *_ = step(params, opt_state, batch)
        _report(progress, "GRPO steps", number + 1, size.rl_steps)
    return params, opt_state


def _optimizer(size: DemoSize, done: int) -> PureOptimizer:
    """Return the optimizer of the GRPO step that comes after `done` steps."""
    return adamw(size.rl_lr * (1 - done / size.rl_run), weight_decay=0.0)


def _given_answers(size: DemoSize, tokenizer: Any, generator: torch.Generator) -> Rollouts:
    prompts = draw_prompts(size.supervised_batch, size.shortest, size.longest, generator)
    wrong = torch.rand((len(prompts), size.longest), generator=generator) < size.slip_rate
    slips = torch.where(wrong, torch.randint(1, 10, wrong.shape, generator=generator), 0).tolist()
    shown = [answer(prompt, slip) for prompt, slip in zip(prompts, slips, strict=True)]
    completions = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in shown]
    return rollouts_from_lists([tokenizer.encode(p) for p in prompts], completions, temperature=1.0, rewards=1.0)


def _measure(
    size: DemoSize, policy: Policy, params: Params, tokenizer: Any, generator: torch.Generator
) -> dict[str, float]:
    prompts = draw_prompts(size.evaluation_prompts, size.shortest, size.longest, generator)
    drawn = draw_rollouts(size, policy, params, tokenizer, prompts, generator)
    assert drawn.rewards is not None
    entropy = engine.scores(policy, params, drawn).entropy.sum() / drawn.completion_mask.sum()
    found = {"reward": drawn.rewards.mean(), "exact": (drawn.rewards == 1).double().mean(), "entropy": entropy}
    return {name: float(value) for name, value in found.items()}


def _report(progress: Progress | None, what: str, done: int, total: int) -> None:
    if progress is not None:
        progress(what, done, total)
