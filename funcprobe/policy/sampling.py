"""Draw rollouts from a policy: `group_size` completions a prompt, each token from softmax(logits / temperature).

All randomness is one array of uniforms, row i and position t of it deciding token t of completion i by the inverse
cumulative distribution. So a seed gives the same completions whatever the batch size and whichever way of decoding, up
to tokens whose cumulative probability lies within rounding of the uniform.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from funcprobe.arguments import checked
from funcprobe.data.rollouts import rollouts_from_lists
from funcprobe.errors import InputError, NumericsError, listed
from funcprobe.policy.checks import COARSEST_FLOAT32, ROUNDING_UNITS
from funcprobe.policy.growing import GrowingRows, start
from funcprobe.policy.module import Policy
from funcprobe.policy.rewards import Reward, load_reward, rewards_of
from funcprobe.policy.scoring import score
from funcprobe.types import Params, Progress, Rollouts

__all__ = ["Reward", "load_reward", "sample"]


@checked
def sample(
    policy: Policy,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    generator: torch.Generator,
    max_new_tokens: int,
    eos_id: int | Sequence[int] | None,
    temperature: float = 1.0,
    group_size: int = 1,
    reward: Reward | None = None,
    tokenizer: Any = None,
    batch_size: int = 64,
    progress: Progress | None = None,
    step: int | None = None,
) -> Rollouts:
    """Return rollouts of the policy, `group_size` rows a prompt, in the order of the prompts.

    A completion ends with the first `eos_id`, which belongs to it, or after `max_new_tokens`. `sampling_logps`
    `[B, T]` are the log-probabilities of the tokens, `log softmax(z / temperature)` in float64, nats. Equal prompts
    are one group. A policy that can decode by a key-value cache does so, over left-padded prompts, as long as what it
    draws has the log-probabilities that scoring gives; otherwise the whole row is run again for every token. Only
    `generator` is drawn from, `8 · B · max_new_tokens` bytes of it at once.

    Args:
        policy: What is drawn from.
        params: Its trainable leaves.
        prompts: Token ids of every prompt, without padding.
        generator: The only source of randomness; the draws depend on its device, not on the policy's.
        max_new_tokens: The longest completion, the end token included.
        eos_id: The token that ends a completion, or several, any of which does (`Checkpoint.eos_ids`); None, or none
            of them, lets every completion run to its full length.
        temperature: What logits are divided by, for every row.
        group_size: Completions drawn for each prompt.
        reward: `reward(prompts=..., completions=...)` -> one number a row, called once, with keywords as in TRL.
        tokenizer: Where given, the reward sees decoded text without special tokens; otherwise lists of ids.
        batch_size: How many rows are decoded together; it changes memory and speed alone.
        progress: Called after every batch of rows.
        step: The training step that the rows are marked with.

    Raises:
        InputError: If an argument is out of range, a prompt is empty or too long for the model, or the reward function
            does not return one finite number a row.
        NumericsError: If the policy's probabilities are not finite; the message names the prompt.
    """
    _check(policy, prompts, max_new_tokens, temperature, group_size, batch_size)
    ends = torch.tensor(_end_ids(policy, eos_id), dtype=torch.int64, device=policy.device)
    rows = [list(prompt) for prompt in prompts for _ in range(group_size)]
    uniforms = torch.rand(
        (len(rows), max_new_tokens), generator=generator, dtype=torch.float64, device=generator.device
    )
    drawn: dict[int, _Drawn] = {}
    for batch in _batches(rows, batch_size):
        of_batch = [rows[i] for i in batch]
        given = uniforms[batch].to(policy.device), temperature, ends
        with torch.no_grad():
            found = _draw(policy, params, start(policy, params, of_batch, max_new_tokens), *given)
            if policy.decode is not None and not _as_scored(policy, params, of_batch, found, temperature):
                policy = _without_cache(policy)
                found = _draw(policy, params, start(policy, params, of_batch, max_new_tokens), *given)
        drawn |= zip(batch, found, strict=True)
        if progress is not None:
            progress("sampling", len(drawn), len(rows))
    _check_finite(drawn, group_size)
    completions = [drawn[i].tokens for i in range(len(rows))]
    return rollouts_from_lists(
        rows,
        completions,
        temperature=temperature,
        rewards=None if reward is None else rewards_of(reward, rows, completions, tokenizer),
        sampling_logps=[drawn[i].logps for i in range(len(rows))],
        step=step,
        vocab_size=policy.vocab_size,
    )


class _Drawn(NamedTuple):
    """One completion."""

    tokens: list[int]
    logps: list[float]


def _draw(
    policy: Policy, params: Params, rows: GrowingRows, uniforms: Tensor, temperature: float, ends: Tensor
) -> list[_Drawn]:
    """Draw one completion for every row, a column at a time, until all have ended with one of `ends` [k]."""
    tokens, logps = [], []
    ended = torch.zeros(len(uniforms), dtype=torch.bool, device=uniforms.device)
    lengths = torch.zeros(len(uniforms), dtype=torch.int64, device=uniforms.device)
    for uniform in uniforms.unbind(1):
        token, logp = _choose(policy.readout(params, rows.last_hidden()), uniform, temperature)
        tokens.append(token)
        logps.append(logp)
        lengths += ~ended
        ended |= torch.isin(token, ends)
        if bool(ended.all()):
            break
        rows.append(token)  # an ended row goes on beside the others; what it draws is cut off below
    columns = zip(torch.stack(tokens, 1).tolist(), torch.stack(logps, 1).tolist(), lengths.tolist(), strict=True)
    return [_Drawn(token[:length], logp[:length]) for token, logp, length in columns]


def _as_scored(
    policy: Policy, params: Params, prompts: list[list[int]], drawn: list[_Drawn], temperature: float
) -> bool:
    """Return whether two rows drawn by a cache, the longest and the most padded, have the logps that scoring gives.

    A copy's decoding is tried on a few tokens when it is made, which is before a cache forgets what left its window.
    """
    rows = range(len(prompts))
    longest = max(rows, key=lambda i: len(prompts[i]) + len(drawn[i].tokens))
    few = sorted({longest, min(rows, key=lambda i: len(prompts[i]))})
    of_few = [prompts[i] for i in few], [drawn[i].tokens for i in few]
    scored = score(policy, params, rollouts_from_lists(*of_few, temperature=temperature)).logp
    own = pad_sequence([torch.tensor(drawn[i].logps, dtype=torch.float64) for i in few], batch_first=True)
    off, largest = float((own.to(scored.device) - scored).abs().max()), float(scored.abs().max())
    eps = max(torch.finfo(p.dtype).eps for p in params.values())
    # NaN is not what scoring gives; where it is, whole rows have it too, and the prompt is named
    return off <= max(COARSEST_FLOAT32, ROUNDING_UNITS * eps) * (1 + largest)


def _without_cache(policy: Policy) -> Policy:
    """Return the policy without its cached decoding, having said so."""
    if policy.checks is not None:
        policy.checks.found(
            "decoding",
            f"a cached step of {policy.checks.module} does not say what scoring says, so rows are decoded whole",
        )
    return replace(policy, decode=None)


def _choose(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return a token [n] drawn by inverse cumulative distribution, and its log-probability in float64.

    The first entry whose cumulative probability is *above* u · total: never one of probability 0, and always one of
    them, because u <= 1 − 2⁻⁵³ keeps the product below the total. A row that is not finite comes back with NaN.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scaled = wide / torch.full((), temperature, dtype=wide.dtype, device=wide.device)  # as scores are scaled
    log_probs = torch.log_softmax(scaled.double(), dim=-1)
    cumulative = log_probs.exp().cumsum(-1)
    total = cumulative[:, -1]
    token = torch.searchsorted(cumulative, (uniform * total).unsqueeze(-1), right=True).squeeze(-1)
    token = token.clamp(max=logits.shape[-1] - 1)  # NaN sorts behind everything
    logp = log_probs.gather(-1, token.unsqueeze(-1)).squeeze(-1)
    return token, torch.where(torch.isfinite(total), logp, torch.nan)


def _batches(rows: list[list[int]], batch_size: int) -> list[list[int]]:
    """Return row indices, prompts of similar length together, so that padding is small."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _check(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    group_size: int,
    batch_size: int,
) -> None:
    if policy.is_sharded:
        raise InputError("Rows are not sampled from parts of leaves; sample with the policy of whole ones.")
    for name, count in {"max_new_tokens": max_new_tokens, "group_size": group_size, "batch_size": batch_size}.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InputError(f"{name} is {count!r}; expected a whole number of at least 1.")
    if not (math.isfinite(temperature) and temperature > 0):
        raise InputError(f"The temperature is {temperature}; expected a number above 0 (1 is the policy itself).")
    if not isinstance(prompts, Sequence) or isinstance(prompts, str | bytes):
        raise InputError(f"prompts is {type(prompts).__name__}; expected a list with the token ids of every prompt.")
    if len(prompts) == 0:
        raise InputError("There are no prompts to sample from; give at least one.")
    for number, prompt in enumerate(prompts):
        _check_prompt(policy, number, prompt, max_new_tokens)


def _end_ids(policy: Policy, eos_id: int | Sequence[int] | None) -> list[int]:
    """Return the tokens that end a completion.

    Raises:
        InputError: If one is no token id of the policy.
    """
    eos_id = eos_id.tolist() if isinstance(eos_id, Tensor) else eos_id
    several = [] if eos_id is None else list(eos_id) if isinstance(eos_id, Iterable) else [eos_id]
    for found in several:
        if isinstance(found, bool) or not hasattr(found, "__index__") or not 0 <= found < policy.vocab_size:
            many = ", several of them" if isinstance(eos_id, Iterable) else ""
            raise InputError(f"eos_id is {found!r}; expected a token id below {policy.vocab_size}{many}, or None.")
    return [operator.index(found) for found in several]


def _check_prompt(policy: Policy, number: int, prompt: Sequence[int], max_new_tokens: int) -> None:
    try:
        _ = [operator.index(token) for token in prompt]
    except (TypeError, RuntimeError) as error:
        raise InputError(f"Prompt {number} is no list of token ids ({error}); expected integers.") from error
    if len(prompt) == 0:
        raise InputError(
            f"Prompt {number} is empty (prompts are counted from 0); every prompt needs at least one token, and the "
            "start-of-sequence token will do."
        )
    if wrong := [token for token in prompt if not 0 <= token < policy.vocab_size]:
        raise InputError(
            f"Prompt {number} holds token id {wrong[0]}, outside the vocabulary of {policy.vocab_size} entries; was it "
            "made with another tokenizer?"
        )
    if policy.max_length is not None and len(prompt) + max_new_tokens > policy.max_length:
        raise InputError(
            f"Prompt {number} has {len(prompt)} tokens, which with {max_new_tokens} new ones exceeds the "
            f"{policy.max_length} positions of the model; shorten the prompt or max_new_tokens."
        )


def _check_finite(drawn: dict[int, _Drawn], group_size: int) -> None:
    bad = sorted({row // group_size for row, one in drawn.items() if any(math.isnan(x) for x in one.logps)})
    if bad:
        raise NumericsError(
            f"The policy's probabilities are not finite for prompt {listed(bad)} (counted from 0); check the weights, "
            "or load the model in a wider dtype."
        )
