"""Whether two sweeps are one: a digest of everything that their numbers come from, the same in every process."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from funcprobe import tree
from funcprobe.errors import FuncprobeWarning
from funcprobe.measurement.measurement import Measurement
from funcprobe.measurement.update import Update
from funcprobe.optimizers.unreached import reached
from funcprobe.parallel.world import world
from funcprobe.types import Observable, Rollouts, Statistic, TokenScores

#: Entries of a leaf that are read in order, evenly spread; of all of them it is the sum of the bits that counts.
SAMPLED_ENTRIES = 4096

#: The learning rate, and the rows of a vocabulary, on which settings are told apart by what they do.
TRIED_LR, TRIED_ROWS = 1e-3, 4

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def identity_of(update: Update, measurement: Measurement) -> str:
    """Return a digest of all that a sweep's points depend on, but for the learning rate and frozen weights.

    It holds from one process to the next, so no address in memory is in it. Observables, objective and optimizer count
    by their settings, as `repr` prints them, and by their values on made-up scores: two functions of one name are told
    apart by these. How batches are cut does not count: it changes no number but by rounding.
    """
    digest = hashlib.sha256()
    evaluation = measurement.passes.evaluation
    options = dataclasses.replace(measurement.options, microbatch=None)
    assert update.rule is not None  # a sweep needs a gradient
    rule = [update.rule.optimizer, update.rule.max_grad_norm]
    objective = [] if update.step is None else [update.step.objective]
    states = {
        f"{name}.{key}": value for name, state in (update.opt_state or {}).items() for key, value in state.items()
    }
    for part in (
        *_of_tree(update.params),
        *_of_tree(states),
        *_of_batch(evaluation),
        *(_of_tree(reached(update.gradient().gradient)) if update.batch is None else _of_batch(update.batch)),
        *_of_settings([measurement.observables, options, *objective, *rule]),
        *_of_behaviour(update, evaluation, measurement.observables),
    ):
        digest.update(part)
    if not update.policy.is_sharded:
        return digest.hexdigest()
    return hashlib.sha256("".join(world().all_of(digest.hexdigest())).encode()).hexdigest()  # of every process's parts


def _of_tree(leaves: Mapping[str, Tensor]) -> Iterator[bytes]:
    """Yield name, shape and dtype of every leaf, an even sample of its entries, and the sum of all their bits."""
    for name, leaf in leaves.items():
        flat = leaf.detach().reshape(-1)
        yield f"{name} {tuple(leaf.shape)} {leaf.dtype}".encode()
        yield _bytes(flat[:: max(1, len(flat) // SAMPLED_ENTRIES)])
        # whole numbers: exact in any order, and made where the leaf is
        yield _bytes(flat.contiguous().view(_BITS[leaf.element_size()]).sum(dtype=torch.int64))


def _of_batch(batch: Rollouts) -> Iterator[bytes]:
    for field, values in batch._asdict().items():
        yield field.encode() if values is None else f"{field} {tuple(values.shape)}".encode() + _bytes(values)


def _of_settings(settings: Iterable[object]) -> Iterator[bytes]:
    """Yield the printed form of each setting, without addresses in memory."""
    for setting in settings:
        yield re.sub(r" at 0x[0-9a-fA-F]+", "", repr(setting)).encode()


def _of_behaviour(update: Update, evaluation: Rollouts, observables: Mapping[str, Observable]) -> Iterator[bytes]:
    """Yield values of observables and objective on made-up scores, and of the optimizer on the gradient θ."""
    size = update.policy.vocab_size
    for name, o in observables.items():
        scores, anchor = (_made_up(evaluation, o.stats, size, seed) for seed in (1, 2))
        yield f"{name} {o.name} {o.unit} {float(o(scores, anchor, evaluation)):.9g}".encode()
    if update.step is not None and update.batch is not None:
        objective = update.step.objective
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FuncprobeWarning)  # issued again when the gradient is taken
            prepared = objective.prepare(update.batch)
            loss, _ = objective(_made_up(prepared, objective.stats, size, 3), prepared)
        yield f"{float(loss):.9g}".encode()
    assert update.rule is not None
    taken = update.rule.lazily(update.params, update.opt_state or {}, update.params, lr=TRIED_LR)
    yield f"{float(tree.norm(taken.delta)):.9g} {float(tree.norm(taken.after)):.9g}".encode()


def _made_up(rollouts: Rollouts, stats: Mapping[str, Statistic], vocab_size: int, seed: int) -> TokenScores:
    """Return scores of the batch's shape, drawn at random, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    mask = rollouts.completion_mask

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(mask.device)

    logp, entropy = -drawn(*mask.shape) * mask, drawn(*mask.shape) * mask
    log_probs = drawn(TRIED_ROWS, vocab_size).log_softmax(-1)
    token = torch.arange(TRIED_ROWS, device=mask.device) % vocab_size
    extra = {name: stat(log_probs, token).double().mean() * drawn(*mask.shape) * mask for name, stat in stats.items()}
    return TokenScores(logp, entropy, extra)


def _bytes(values: Tensor) -> bytes:
    flat = values.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
