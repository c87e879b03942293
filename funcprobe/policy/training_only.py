"""Terms that a training run adds to a model's forward pass or to its loss, and that a step on its copy does not have.

| kind | in a run | found as |
|---|---|---|
| dropout | random zeros, in train mode | dropout modules with p > 0; attributes of modules named after dropout |
| noise | random factors or additions, in train mode | attributes such as `jitter_noise`, `neftune_noise_alpha` |
| router loss | coefficient · the load-balancing loss of a mixture | `router_aux_loss_coef` of the configuration |
| left padding | positions that count it, a state that runs through it | a padded row scored beside the row alone |

Probabilities count whether or not the module is in train mode at this moment: a module between two steps is often in
eval mode, one loaded from a folder always is, and either trains in train mode. What is not wanted has probability 0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from funcprobe.errors import listed
from funcprobe.policy.binding import Skeleton
from funcprobe.policy.copying import structural_copy, without_training_hooks
from funcprobe.policy.running import arguments_of, logits_of
from funcprobe.types import Rollouts

Kind = Literal["dropout", "noise", "router loss", "left padding"]

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
#: Parts of attribute names under which modules keep a probability or a scale that acts in train mode alone.
NAMED_AFTER: Mapping[Kind, tuple[str, ...]] = {"dropout": ("drop",), "noise": ("jitter", "neftune_noise")}
#: Tokens of the row that is scored with and without padding, and columns of padding.
ROW, PADDING = 5, 3
#: Roundings of the model's dtype, relative to its largest logit, that a shift of all positions may make.
ROUNDINGS = 1e3


class TrainingTerm(NamedTuple):
    """One thing that a training run has and the step does not."""

    kind: Kind
    name: str  #: the field's name of it: an attribute, a module, a configuration's field
    value: float  #: probability, scale or coefficient; for left padding, nats
    modules: tuple[str, ...]  #: where it acts, by qualified name; for a router loss, the routers
    sentence: str  #: what a reader should know


def training_terms(
    module: nn.Module, *, router_aux_loss_coef: float | None = None, skeleton: Skeleton | None = None
) -> tuple[TrainingTerm, ...]:
    """Return the terms that training `module` adds and a step on its copy lacks; nothing where the two agree.

    The module is read and a copy of its structure is run once on five tokens, with and without padding; the module, its
    mode and the generators stay as they are. `router_aux_loss_coef` is the run's own, where its configuration has one:
    0 takes the router loss away. `skeleton` is such a copy, where there is one already.
    """
    if skeleton is None:
        copied = without_training_hooks(structural_copy(module, instance_forwards=False))
        skeleton = Skeleton(copied, {}, next(module.parameters()).device)
    return (*_random(module), *_router_losses(module, router_aux_loss_coef), *_left_padding(skeleton))


def training_cautions(terms: tuple[TrainingTerm, ...], rollouts: Rollouts | None = None) -> tuple[str, ...]:
    """Return the sentences that matter for a step on these rollouts.

    Left padding matters where prompts differ in length, because a trainer pads them to the longest one.
    """
    padded = rollouts is not None and len(set(rollouts.prompt_lengths.tolist())) > 1
    return tuple(term.sentence for term in terms if term.kind != "left padding" or padded)


def _random(module: nn.Module) -> Iterator[TrainingTerm]:
    """Yield dropout and noise, one term for every name and value."""
    places: dict[tuple[Kind, str, float], list[str]] = defaultdict(list)
    for where, part in module.named_modules():
        for kind, name, value in _held(where, part):
            places[kind, name, value].append(where or type(part).__name__)
    for (kind, name, value), where in places.items():
        what = "Dropout" if kind == "dropout" else "Noise"
        yield TrainingTerm(
            kind,
            name,
            value,
            tuple(where),
            f"{what} acts in training and not in the step: {name} is {value:g} in {listed(where, 3)}. The step is that "
            "of the model without it.",
        )


def _held(where: str, part: nn.Module) -> Iterator[tuple[Kind, str, float]]:
    """Yield (kind, name, value) of the tensors and settings that a module itself keeps."""
    if isinstance(part, DROPOUTS):
        if part.p > 0:
            yield "dropout", next((n for n in reversed(where.split(".")) if "drop" in n), type(part).__name__), part.p
        return
    for name, held in vars(part).items():
        for kind, marks in NAMED_AFTER.items():
            if any(mark in name.lower() for mark in marks):
                for value in held.values() if isinstance(held, Mapping) else (held,):  # peft keeps one an adapter
                    if isinstance(value, float) and value > 0:
                        yield kind, name, value


def _router_losses(module: nn.Module, coefficient: float | None) -> Iterator[TrainingTerm]:
    configs = {id(c): c for part in module.modules() if (c := _text_config(part)) is not None}
    for config in configs.values():
        value = getattr(config, "router_aux_loss_coef", 0.0) if coefficient is None else coefficient
        if not hasattr(config, "output_router_logits") or not value:
            continue
        routers = tuple(name for name, part in module.named_modules() if "router" in type(part).__name__.lower())
        request = "asks for it" if config.output_router_logits else "has the coefficient"
        yield TrainingTerm(
            "router loss",
            "router_aux_loss_coef",
            float(value),
            routers,
            f"The router's load-balancing loss is not in the step: the configuration {request}, and TRL (from 1.7 on) "
            f"adds {value:g} times it, whatever output_router_logits says; router_aux_loss_coef=0 leaves it out.",
        )


def _text_config(part: nn.Module) -> Any:
    config = vars(part).get("config")
    get = getattr(config, "get_text_config", None)
    return config if get is None else get()


def _left_padding(skeleton: Skeleton) -> Iterator[TrainingTerm]:
    """Yield a term where a padded row is scored otherwise than the row alone, by more than rounding.

    Where a table of positions is looked up, the entries are compared bit for bit: that shows at any precision.

    Raises:
        torch.OutOfMemoryError: As it came.
    """
    if "attention_mask" not in arguments_of(skeleton.module)(torch.ones(1)):
        return  # such a module cannot be trained on padded rows at all
    try:
        alone, padded = (_scored(skeleton, padding) for padding in (0, PADDING))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a model that cannot take a padded row runs into: it is not trained on one
        return
    shifted = tuple(name for name, x in alone.looked_up.items() if not _same(x, padded.looked_up.get(name)))
    gap = float((alone.logp - padded.logp).abs().max())
    if shifted or gap > ROUNDINGS * alone.eps * (1 + alone.largest):
        by = f" ({listed(shifted, 3)} counts the padding)" if shifted else ""
        yield TrainingTerm(
            "left padding",
            "attention_mask",
            gap,
            shifted,
            f"The model scores a row otherwise when padding stands to its left{by}: by {gap:.2g} nats on a short row. "
            "A trainer that pads prompts to the longest one, as TRL does, trains on those scores, and the step on the "
            "rows themselves.",
        )


class _Scored(NamedTuple):
    logp: Tensor  #: [ROW, V] nats
    looked_up: dict[str, Tensor]  #: [ROW, D] of every table, by module name
    largest: float  #: the largest absolute logit
    eps: float  #: of the logits' dtype


def _scored(skeleton: Skeleton, padding: int) -> _Scored:
    """Run a short row behind `padding` columns of padding, and return the scores of its own tokens."""
    module, device = skeleton.module, skeleton.device
    vocabulary = min((m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)), default=ROW)
    row = torch.arange(ROW, device=device).remainder(vocabulary)
    ids = torch.cat([row.new_zeros(padding), row])[None]
    mask = (torch.arange(ROW + padding, device=device) >= padding)[None].long()
    looked_up: dict[str, Tensor] = {}
    handles = [
        part.register_forward_hook(lambda _, __, out, name=name: looked_up.update({name: _last(out)}))
        for name, part in module.named_modules()
        if isinstance(part, nn.Embedding) or "positional" in type(part).__name__.lower()
    ]
    try:
        with torch.no_grad(), skeleton.running():
            logits = logits_of(module(ids, **arguments_of(module)(mask)))[0, -ROW:]
    finally:
        for handle in handles:
            handle.remove()
    eps = torch.finfo(logits.dtype).eps
    return _Scored(logits.float().log_softmax(-1), looked_up, float(logits.abs().max()), eps)


def _last(output: Any) -> Tensor:
    """Return a table's entries for the row's own tokens `[ROW, D]`, or nothing of them where it has another shape."""
    return output.reshape(-1, output.shape[-1])[-ROW:] if isinstance(output, Tensor) else torch.zeros(0)


def _same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and torch.equal(a, b)
