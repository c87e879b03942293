"""Any `nn.Module` that returns next-token logits, as a pure policy and the tree of its trainable leaves.

What runs is a structural copy that shares the module's tensors, in eval mode, through `torch.func.functional_call`. The
copy proves itself on a few tokens (see `checks`): the module is run for that on three short rows, and left as it was.
A Hugging Face causal language model is split at its head into *features* (the backbone's last hidden states) and
*readout* (whatever the model does from there to logits), so that logits over the whole vocabulary need never exist for
all positions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import nn

from funcprobe.arguments import checked
from funcprobe.errors import InputError
from funcprobe.policy.binding import Bound, Skeleton
from funcprobe.policy.checks import Checks, Rejected, Trial, alone, decoding, gap, prove
from funcprobe.policy.copying import own_forwards, structural_copy, without_training_hooks
from funcprobe.policy.refusals import ids_below, positions_of, refuse_what_cannot_be_copied, rows_share_frequencies
from funcprobe.policy.running import Watch, arguments_of, generators_kept, observed
from funcprobe.policy.split import Decode, Features, Parts, Readout, splits, whole
from funcprobe.policy.substitutes import Substitutes, substitutes
from funcprobe.policy.training_only import training_terms
from funcprobe.types import Params

log = logging.getLogger(__name__)

#: What the logits of the same tokens before another one may differ by, in units of eps · (1 + the largest logit).
CAUSAL_UNITS = 8.0


@dataclass(frozen=True)
class Policy:
    """A causal language model as pure functions of its trainable leaves; frozen weights and buffers are closed over."""

    features: Features  #: (params, ids [B, L], mask [B, L]) -> [B, L, D]; rows are right-padded
    readout: Readout  #: (params, [n, D]) -> logits [n, V], before the temperature
    names: tuple[str, ...]  #: the trainable leaves, in `named_parameters()` order
    vocab_size: int  #: V
    device: torch.device  #: where the leaves are
    readout_names: tuple[str, ...] = ()  #: the trainable leaves that the readout reads
    decode: Decode | None = field(
        default=None, repr=False
    )  #: (params, new ids, mask, cache) -> (features [B, D], cache)
    max_length: int | None = None  #: the longest sequence that the model has positions for
    substitutes: Substitutes = field(default_factory=Substitutes, repr=False)
    #: the kernels that have forward derivatives, where the model was set to others
    checks: Checks | None = field(default=None, repr=False, compare=False)
    #: what the copy of a module proved; None for a policy that is no copy
    body: Bound | None = field(default=None, repr=False, compare=False)
    #: the module that `features` runs; None where there is none, or every row is a call of it
    gather: Callable[[Params], Params] | None = field(default=None, repr=False, compare=False)
    #: (parts of leaves) -> whole ones, of a policy whose leaves are parts; `features` gathers its own

    @property
    def is_sharded(self) -> bool:
        """Whether the leaves are parts, so that every process has to run as many passes as the others."""
        return self.gather is not None

    def readout_leaves(self, params: Params) -> Params:
        """Return the leaves that the readout reads, whole."""
        own = {name: params[name] for name in self.readout_names}
        return own if self.gather is None or not own else self.gather(own)

    @property
    def plain_kernels(self) -> Callable[[], AbstractContextManager[None]]:
        """The context in which attention and experts run in kernels that have forward derivatives."""
        return self.substitutes.context


@checked
def from_module(module: nn.Module, *, device: str | torch.device | None = None) -> tuple[Policy, Params]:
    """Return the policy that `module` is, and its trainable leaves keyed by `named_parameters()` names.

    The leaves are detached and share storage with the module: clone them before training goes on, if they are to stay.
    `module` maps ids `[B, L]` (and `attention_mask`, where its forward has such an argument) to logits `[B, L, V]` or
    to an object with `.logits`. With `device`, a copy is moved there and the original stays where it is.

    A forward that was set on an instance (TRL's fused head, accelerate's mixed precision) is left out where the class's
    own says the same; autocast that it brings is kept. `policy.checks` says what was found.

    Raises:
        InputError: If the module has no trainable leaf, returns no logits of the right shape or is not causal; or if a
            copy of it is not the module: it writes to its parameters, draws random numbers, or is bound to the
            original.
    """
    if device is not None and not _is_on(module, torch.device(device)):
        parameters = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in module.parameters()}
        module = structural_copy(module, parameters).to(device)
    refuse_what_cannot_be_copied(module, device)
    params = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    if not params:
        raise InputError(
            f"{type(module).__name__} has no parameter that requires a gradient; call requires_grad_(True) on the "
            "leaves that the update is to move."
        )
    if next(iter(params.values())).device.type == "meta":
        return _shape_alone(module, params), params
    with generators_kept(module):
        return _copied(module, params), params


def _copied(module: nn.Module, params: Params) -> Policy:
    """Return the first way to run a copy that agrees with the module.

    Raises:
        InputError: If there is none.
    """
    trial, why = _trial(module), ""
    for instance_forwards in (False, True)[: 1 + any(True for _ in own_forwards(module))]:
        checks = Checks(type(module).__name__, detaches=trial.seen.watch.detaches)
        skeleton = _skeleton(module, trial, checks, instance_forwards)
        for parts in (*splits(skeleton), whole(skeleton)):
            try:
                found = prove(parts, params, trial, checks)
            except Rejected as rejected:
                why = str(rejected)
                continue
            _tell(module, trial, checks, instance_forwards)
            return _policy(skeleton, found, params, trial, checks)
    raise InputError(
        f"A copy of {type(module).__name__} is not the module: {why}. Something on it refers to the original (a "
        "closure, a forward or a hook that was set on an instance), or it is not a function of ids and parameters; "
        "pass the module without that."
    )


def _trial(module: nn.Module) -> Trial:
    """Return a short and a longer row of small ids, and the module's own outputs on them.

    Raises:
        InputError: If it cannot be run on them, is not causal, or draws random numbers.
    """
    limit, device = ids_below(module), next(module.parameters()).device
    positions = positions_of(module)
    lengths = (2, 4) if positions is None or positions >= 4 else (1, 2)
    rows = [1 + torch.arange(length, device=device).remainder(limit - 1) for length in lengths]  # id 0 is often padding
    other = torch.cat([rows[1][:-1], rows[1][-1:] % (limit - 1) + 1])  # the longer one with another last token
    seen = observed(module, [*rows, other])
    *logits, of_other = seen.logits
    trial = Trial((rows[0], rows[1]), seen._replace(logits=logits))
    # other tokens after them change no logits: the same kernels on the same shapes, but for groups of experts
    rounding = CAUSAL_UNITS * seen.watch.eps * (1 + trial.largest)
    causal = gap(logits[1][:-1], of_other[:-1]) <= rounding
    if not (causal and gap(logits[0], logits[1][: len(rows[0])]) <= trial.tolerance):
        _refuse_unless_same(module, trial)
        raise InputError(
            f"A token of {type(module).__name__} sees what comes after it: the logits of a row change with what is "
            "appended to it, and a policy is a causal language model (for an encoder set is_decoder=True)."
        )
    return trial


def _refuse_unless_same(module: nn.Module, trial: Trial) -> None:
    """Check that a module says the same twice.

    Raises:
        InputError: If it does not.
    """
    if not trial.gap(observed(module, trial.rows, seed=1).logits) <= trial.tolerance:
        raise InputError(
            f"{type(module).__name__} draws random numbers in eval mode: two passes over the same rows differ, and a "
            "policy is a function of ids and parameters; make what is random depend on self.training."
        )


def _skeleton(module: nn.Module, trial: Trial, checks: Checks, instance_forwards: bool) -> Skeleton:
    """Return the copy that runs, with buffers of its own where forward writes to them."""
    written = {id(module.get_buffer(name)): module.get_buffer(name).clone() for name in trial.seen.written}
    made = without_training_hooks(structural_copy(module, written, instance_forwards=instance_forwards))
    leaves = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    skeleton = Skeleton(made, leaves, next(module.parameters()).device)
    frequencies = rows_share_frequencies(made)
    skeleton.remember({*_named_alike(made, trial.seen.changed), *frequencies})
    low = trial.seen.watch.autocast
    if low is not None and not _autocasts(skeleton, trial):
        skeleton.autocast = low
        checks.found(
            "autocast", f"the module runs under autocast in {str(low).removeprefix('torch.')}, and so does its copy"
        )
    return skeleton


def _autocasts(skeleton: Skeleton, trial: Trial) -> bool:
    """Return whether the copy runs under autocast by itself."""
    row = trial.rows[0].unsqueeze(0)
    with torch.enable_grad(), Watch() as watch:
        bound = Bound(skeleton, skeleton.module)
        leaves = {name: p.detach().requires_grad_() for name, p in trial.seen.leaves.items()}
        bound(leaves, row, **arguments_of(skeleton.module)(torch.ones_like(row, dtype=torch.bool)))
    return watch.autocast is not None


def _policy(skeleton: Skeleton, parts: Parts, params: Params, trial: Trial, checks: Checks) -> Policy:
    """Return the policy of parts that were proved; decoding by a cache only where it agrees with scoring."""
    frequencies = rows_share_frequencies(skeleton.module)
    if frequencies:
        checks.found(
            "rows",
            f"the rotary frequencies of '{sorted(frequencies)[0]}' follow the longest row of a batch, so every row is "
            "run alone",
        )
        parts = parts._replace(features=alone(parts.features), decode=None, body=None)
    if parts.decode is not None:
        off = decoding(parts.decode, parts, params, trial)
        agrees = off <= trial.tolerance
        checks.results["decoding says what scoring says"] = f"to {off:.1e}" if agrees else "no: rows are decoded whole"
        if not agrees:
            checks.found(
                "decoding",
                f"a cached step of {checks.module} does not say what scoring says, so rows are decoded whole",
            )
            parts = parts._replace(decode=None)
    checks.training = training_terms(skeleton.module, skeleton=skeleton)
    named = [f"{term.name} {term.value:g}" for term in checks.training]
    checks.results["what training adds"] = ", ".join(named) if named else "nothing"
    if not parts.readout_names and parts.decode is None and any(True for _ in splits(skeleton)):
        log.warning("%s does not split at its head; it is run whole, with logits in memory", checks.module)
    return Policy(
        features=parts.features,
        readout=parts.readout,
        names=tuple(params),
        vocab_size=trial.seen.logits[0].shape[-1],
        device=skeleton.device,
        readout_names=parts.readout_names,
        decode=parts.decode,
        max_length=positions_of(skeleton.module),
        substitutes=substitutes(skeleton.module),
        checks=checks,
        body=parts.body,
    )


def _tell(module: nn.Module, trial: Trial, checks: Checks, instance_forwards: bool) -> None:
    """Issue the notes and warnings on the module that came up on the way."""
    owners = [name or type(module).__name__ for name, _ in own_forwards(module)]
    if owners and not instance_forwards:
        checks.results["forward set on an instance"] = f"left out ({len(owners)}); the class's says the same"
    elif owners:
        checks.results["forward set on an instance"] = f"kept ({len(owners)}), bound to the copy"
        checks.found("forward", f"the forward that was set on '{owners[0]}' is not its class's, and is kept")
    written = sorted(trial.seen.written)
    checks.results["forward writes"] = (
        f"to {len(written)} buffers, of which the copy has its own" if written else "nothing"
    )
    if written:
        checks.found(
            "state",
            f"forward writes to the buffer '{written[0]}' ({len(written)} such); the copy has its own, and begins "
            "every pass as the module is now",
        )


def _shape_alone(module: nn.Module, params: Params) -> Policy:
    """Return the policy of a module on the meta device, which has shapes and no numbers to prove anything by."""
    skeleton = Skeleton(
        without_training_hooks(structural_copy(module, instance_forwards=False)),
        {id(p): name for name, p in module.named_parameters() if p.requires_grad},
        next(iter(params.values())).device,
    )
    parts = next(splits(skeleton), whole(skeleton))
    ids = torch.zeros((1, 2), dtype=torch.int64, device=skeleton.device)
    with torch.no_grad():
        hidden = parts.features(params, ids, torch.ones_like(ids, dtype=torch.bool))
        width = parts.readout(params, hidden[0]).shape[-1]
    return Policy(
        parts.features, parts.readout, tuple(params), width, skeleton.device, parts.readout_names, parts.decode
    )


def _named_alike(copied: nn.Module, names: set[str]) -> Iterator[str]:
    known = {name for name, _ in copied.named_modules()}
    yield from (name for name in names if name in known)


def _is_on(module: nn.Module, device: torch.device) -> bool:
    found = next((p.device for p in module.parameters()), device)
    return found.type == device.type and device.index in (None, found.index)  # "cuda" is wherever on cuda it already is
