"""What is measured: a randomly initialised Qwen2, rollouts of random tokens, and the passes over them.

Costs depend on shapes and not on values, so nothing is trained and nothing is downloaded. Every pass is a function of
a `Workload` without arguments of its own, so that timings, memory and FLOPs are taken of the very same code.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import funcprobe as fp
from funcprobe import engine
from funcprobe.analysis.probe import probe
from funcprobe.data.rollouts import microbatches, take, to_device
from funcprobe.engine import attention, kernels
from funcprobe.policy.module import Policy
from funcprobe.types import Objective, Params, Rollouts, TokenScores

TEMPERATURE = 0.8
PROMPT = 16


@dataclass(frozen=True)
class Size:
    """The shape of a model and of a batch."""

    hidden: int
    layers: int
    vocabulary: int
    length: int  #: prompt and completion together, tokens
    sequences: int
    microbatch: int  #: sequences


#: Large enough that arithmetic and activations dominate, small enough for the device. 15.6 M and 268 M parameters.
SIZES = {
    "cpu": Size(hidden=512, layers=4, vocabulary=8192, length=256, sequences=8, microbatch=2),
    "cuda": Size(hidden=1024, layers=16, vocabulary=32768, length=512, sequences=32, microbatch=8),
}


def for_time(device: str, quick: bool = False) -> Size:
    """Return the size at which passes are timed and their FLOPs counted."""
    return replace(SIZES[device], length=128, sequences=4) if quick else SIZES[device]


def for_memory(device: str, quick: bool = False) -> Size:
    """Return the size of the memory comparison: sequences of 512 tokens (256 when quick), two microbatches."""
    size = SIZES[device]
    return replace(size, length=256 if quick else 512, sequences=2 * size.microbatch)


def wide(device: str, quick: bool = False) -> Size:
    """Return the size with the vocabulary of Qwen2.5: a small body under 151,936 logits a token."""
    sequences = 2 if quick else 4
    return Size(hidden=256, layers=2, vocabulary=151_936, length=512, sequences=sequences, microbatch=sequences)


class Workload(NamedTuple):
    """A policy, its module, and one prepared batch."""

    size: Size
    module: nn.Module
    policy: Policy
    params: Params
    rollouts: Rollouts  #: prepared by `objective`
    objective: Objective
    device: torch.device


def build(size: Size, device: str, dtype: torch.dtype = torch.float32) -> Workload:
    """Return the workload of that size on that device: the same numbers every time."""
    module = _qwen2(size).to(device, dtype)
    policy, params = fp.from_module(module)
    objective = fp.dr_grpo()
    rollouts = to_device(objective.prepare(_random_rollouts(size, seed=1)), device)
    return Workload(size, module, policy, params, rollouts, objective, torch.device(device))


def batch_of(work: Workload, size: Size) -> Workload:
    """Return the same model with a batch of another size."""
    rollouts = to_device(work.objective.prepare(_random_rollouts(size, seed=1)), work.device)
    return work._replace(size=size, rollouts=rollouts)


def scoring(work: Workload) -> Any:
    """Score the batch without a graph, attention in the math kernel: the pass that forward mode is compared with."""
    with engine.math_attention():
        return engine.scores(work.policy, work.params, work.rollouts, microbatch=work.size.microbatch)


def forward_mode(work: Workload) -> Any:
    """Take scores and tangents along the parameters themselves (any direction costs the same and this one is free)."""
    return engine.directional(work.policy, work.params, work.params, work.rollouts, microbatch=work.size.microbatch)


def forward_math(work: Workload) -> Any:
    """Do the same with attention in the math kernel, a block of queries at a time."""
    own, attention.attend = attention.attend, lambda *_, **__: None  # type: ignore[assignment]
    try:
        return forward_mode(work)
    finally:
        attention.attend = own


def forward_uncut(work: Workload) -> Any:
    """Do that with attention in one piece."""
    budget, kernels.ATTENTION_BUDGET = kernels.ATTENTION_BUDGET, 2**62
    try:
        return forward_math(work)
    finally:
        kernels.ATTENTION_BUDGET = budget


def second_order(work: Workload) -> Any:
    """Take scores, tangents and curvatures by nested forward mode."""
    return engine.directional(
        work.policy, work.params, work.params, work.rollouts, order=2, microbatch=work.size.microbatch
    )


def reverse_mode(work: Workload) -> Any:
    """Take the gradient of a separable objective with the engine."""
    return engine.gradient(
        work.objective,
        work.policy,
        work.params,
        work.rollouts,
        separable=work.objective.separable,
        microbatch=work.size.microbatch,
    )


def plain_backward(work: Workload) -> Any:
    """Take the same gradient as a training loop does: module, log_softmax, objective, `.backward()`."""
    for rows in microbatches(work.rollouts, work.size.microbatch):
        part = take(work.rollouts, rows)
        completion = part.completion_mask.shape[1]
        logits = work.module(input_ids=part.ids, use_cache=False, logits_to_keep=completion + 1).logits[:, :-1]
        loss, _ = work.objective(_plain_scores(logits, part), part)
        loss.backward()
    gradient = {name: p.grad for name, p in work.module.named_parameters()}
    work.module.zero_grad(set_to_none=True)
    return gradient


def materialised(work: Workload) -> Any:
    """Score the batch by making all logits and their log_softmax: the least that a plain implementation keeps."""
    with torch.no_grad():
        logits = work.module(input_ids=work.rollouts.ids, use_cache=False).logits[:, PROMPT - 1 : -1]
        log_probs = torch.log_softmax(logits, dim=-1)
        return log_probs.gather(-1, work.rollouts.ids[:, PROMPT:, None]).squeeze(-1)


@torch.no_grad()
def trl_scoring(work: Workload) -> Any:
    """Score the batch as TRL's trainer does: its own log-probabilities and entropies of the completion's logits."""
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    found = []
    for rows in microbatches(work.rollouts, work.size.microbatch):
        part = take(work.rollouts, rows)
        keep = part.completion_mask.shape[1] + 1
        given = {"attention_mask": part.attention_mask, "use_cache": False, "logits_to_keep": keep}
        logits = work.module(input_ids=part.ids, **given).logits[:, :-1] / TEMPERATURE
        found.append((selective_log_softmax(logits, part.ids[:, 1 - keep :]), entropy_from_logits(logits)))
    return TokenScores(*(torch.cat(each) for each in zip(*found, strict=True)))


def chunked(work: Workload) -> Any:
    """Score the batch with the engine, under the default attention kernel, in one microbatch."""
    return engine.scores(work.policy, work.params, work.rollouts, microbatch=work.size.microbatch)


def whole_probe(work: Workload, lr: float) -> Any:
    """Run one probe with E drawn apart from U, half as large; AdamW from a fresh state."""
    optimizer = fp.adamw(lr=lr)
    step = fp.make_step(work.policy, work.objective, optimizer, microbatch=work.size.microbatch)
    state = optimizer.init(work.params)
    held_out = evaluation(work)
    cut = work.size.microbatch
    # a path costs what float32 makes it cost; the budget of one probe is without
    return probe(
        fp.Update.from_step(step, work.params, state, work.rollouts), held_out, microbatch=cut, method="difference"
    )


def evaluation(work: Workload) -> Rollouts:
    """Return rollouts to evaluate on: other tokens than U's, half as many sequences."""
    size = replace(work.size, sequences=max(2, work.size.sequences // 2))
    return to_device(_random_rollouts(size, seed=2), work.device)


#: The passes by name: what a child process is asked for.
PASSES: dict[str, Callable[[Workload], Any]] = {
    f.__name__: f
    for f in (
        scoring,
        forward_mode,
        forward_math,
        forward_uncut,
        second_order,
        reverse_mode,
        plain_backward,
        materialised,
        trl_scoring,
        chunked,
    )
}


def _plain_scores(logits: Tensor, part: Rollouts) -> TokenScores:
    """Return what the objective reads: log-probabilities with a graph, entropies (which it only reports) without."""
    log_probs = torch.log_softmax(logits.float() / TEMPERATURE, dim=-1)
    logp = log_probs.gather(-1, part.ids[:, PROMPT:, None]).squeeze(-1)
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(-1)
    return TokenScores(logp.double(), entropy.double())


def _qwen2(size: Size) -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 11 // 4,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=max(1, size.hidden // 256),
        max_position_embeddings=max(1024, size.length),
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config).eval()
    model.set_attn_implementation("sdpa")
    return model


def _random_rollouts(size: Size, seed: int) -> Rollouts:
    draw = random.Random(seed)
    rows = [[draw.randrange(size.vocabulary) for _ in range(size.length)] for _ in range(size.sequences)]
    return fp.rollouts_from_lists(
        [rows[i - i % 2][:PROMPT] for i in range(len(rows))],
        [row[PROMPT:] for row in rows],
        temperature=TEMPERATURE,
        rewards=[draw.gauss(0, 1) for _ in rows],
        group_ids=[i // 2 for i in range(len(rows))],
        vocab_size=size.vocabulary,
    )
