"""Any `nn.Module` that returns next-token logits, as a pure policy and the tree of its trainable leaves.

The module itself is never run and never touched: what runs is a structural copy that shares its tensors, in eval mode,
through `torch.func.functional_call`. A Hugging Face causal language model is split at its head into *features*
(the backbone's last hidden states) and *readout* (whatever the model does from there to logits: a tied head, LoRA on
the head, logit scaling or soft-capping), so that logits over the whole vocabulary need never exist for all positions.
"""

from __future__ import annotations

import copy
import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from funcprobe.errors import InputError
from funcprobe.types import Params

log = logging.getLogger(__name__)

Features = Callable[[Params, Tensor, Tensor], Tensor]
Readout = Callable[[Params, Tensor], Tensor]
Decode = Callable[[Params, Tensor, Tensor, Any], tuple[Tensor, Any]]


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
    plain_attention: Callable[[], AbstractContextManager[None]] = field(default=nullcontext, repr=False)
    #: a context in which attention is torch's own `scaled_dot_product_attention`, whatever the model was set to


def from_module(module: nn.Module, *, device: str | torch.device | None = None) -> tuple[Policy, Params]:
    """Return the policy that `module` is, and its trainable leaves keyed by `named_parameters()` names.

    The leaves are detached and share storage with the module: clone them before training goes on, if they are to stay.
    `module` maps ids `[B, L]` (and `attention_mask`, where its forward has such an argument) to logits `[B, L, V]` or
    to an object with `.logits`. With `device`, a copy is moved there and the original stays where it is.

    Raises:
        InputError: If the module has no trainable leaf or returns no logits of the right shape.
    """
    if device is not None and not _is_on(module, torch.device(device)):
        module = copy.deepcopy(module).to(device)
    shared = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    skeleton = _ready(copy.deepcopy(module, shared))  # same tensors, its own flags and hooks
    params = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    if not params:
        raise InputError(
            f"{type(module).__name__} has no parameter that requires a gradient; call requires_grad_(True) on the "
            "leaves that the update is to move."
        )
    policy = _split_at_head(skeleton, params) or _whole(skeleton, params)
    return policy, params


def _whole(module: nn.Module, params: Params) -> Policy:
    """Run the module as it is: its logits are the features and the readout is the identity.

    Raises:
        InputError: If it returns no logits of shape [B, L, V].
    """
    bound = _Bound(module, _leaves(module))
    accepted = inspect.signature(module.forward).parameters
    options = {"use_cache": False} if "use_cache" in accepted else {}

    def features(params: Params, ids: Tensor, mask: Tensor) -> Tensor:
        out = bound(params, ids, **options, **({"attention_mask": mask} if "attention_mask" in accepted else {}))
        return getattr(out, "logits", out)

    device = next(iter(params.values())).device
    ids = torch.zeros((1, 2), dtype=torch.int64, device=device)
    with torch.no_grad():
        logits = features(params, ids, torch.ones_like(ids, dtype=torch.bool))
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != (1, 2):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(
            f"{type(module).__name__} returned {found} for ids of shape (1, 2); expected logits [B, L, V] or an object "
            "with such `.logits`."
        )
    return Policy(features, lambda params, h: h, tuple(params), logits.shape[-1], device)


def _split_at_head(module: nn.Module, params: Params) -> Policy | None:
    """Split a Hugging Face causal model into backbone and head; None where there is nothing to split."""
    lm = next((m for m in module.modules() if _is_causal_lm(m)), None)
    if lm is None:
        return None
    prefix: str = lm.base_model_prefix  # type: ignore[assignment]
    leaves = _leaves(module)
    backbone = _Bound(getattr(lm, prefix), leaves)
    head_module = copy.copy(lm)
    head_module._modules = {**lm._modules, prefix: _Given()}
    head = _Bound(head_module, leaves)

    def features(params: Params, ids: Tensor, mask: Tensor) -> Tensor:
        # Rows are right-padded and attention is causal: no real token ever sees a padded one, so no mask is needed
        # and the fused kernels stay available.
        return backbone(params, input_ids=ids, use_cache=False).last_hidden_state

    def readout(params: Params, hidden: Tensor) -> Tensor:
        return head(params, inputs_embeds=hidden.unsqueeze(0), use_cache=False).logits.squeeze(0)

    def decode(params: Params, ids: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        arguments = {"attention_mask": mask.long(), "position_ids": positions, "past_key_values": cache}
        out = backbone(params, input_ids=ids, use_cache=True, **arguments)
        return out.last_hidden_state[:, -1], out.past_key_values

    config = lm.config.get_text_config()  # type: ignore[operator,union-attr]
    device = next(iter(params.values())).device
    policy = Policy(
        features=features,
        readout=readout,
        names=tuple(params),
        vocab_size=lm.get_output_embeddings().weight.shape[0],  # type: ignore[operator]
        device=device,
        readout_names=tuple(dict.fromkeys(head.aliases.values())),
        decode=decode,
        max_length=getattr(config, "max_position_embeddings", None),
        plain_attention=_plain_attention(module),
    )
    return policy if _agrees(policy, module, params) else None


def _agrees(policy: Policy, module: nn.Module, params: Params) -> bool:
    """Check the split against the undivided model on three tokens; a model that disagrees is run whole."""
    ids = torch.arange(3, device=policy.device).remainder(policy.vocab_size).unsqueeze(0)
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        whole = _whole(module, params).features(params, ids, mask)[0]
        split = policy.readout(params, policy.features(params, ids, mask)[0])
    # a misplaced scale or cap is off by far more than low-precision rounding of logits of order one; NaN is nobody's
    # disagreement, and scoring names the sequence it comes from
    tolerance = max(1e-5, 32 * torch.finfo(whole.dtype).eps) * (1 + float(whole.abs().max()))
    agrees = whole.shape == split.shape and not bool(((whole - split).abs() > tolerance).any())
    if not agrees:
        log.warning("%s does not split at its head; it is run whole, with logits in memory", type(module).__name__)
    return agrees


def _plain_attention(skeleton: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """Return the context in which a copy's attention is torch's own, instead of flex or a flash-attention package's."""
    configs = {id(c): c for m in skeleton.modules() if (c := getattr(m, "config", None)) is not None}
    found = [c for c in configs.values() if getattr(c, "_attn_implementation", None) not in (None, "eager", "sdpa")]

    own = [config._attn_implementation for config in found]
    lock, inside = threading.Lock(), [0]

    def switch(by: int, names: Sequence[str]) -> None:
        with lock:  # the first one in switches, and the last one out switches back
            inside[0] += by
            if inside[0] == max(by, 0):
                for config, name in zip(found, names, strict=True):
                    config._attn_implementation = name

    @contextmanager
    def plain() -> Iterator[None]:
        switch(1, ["sdpa"] * len(found))
        try:
            yield
        finally:
            switch(-1, own)

    return plain if found else nullcontext


class _Bound:
    """A submodule as a function of the policy's leaves, whatever their names are inside it (tied ones included)."""

    def __init__(self, module: nn.Module, leaves: dict[int, str]) -> None:
        self.module = module
        named = module.named_parameters(remove_duplicate=False)
        self.aliases = {local: leaves[id(p)] for local, p in named if id(p) in leaves}

    def __call__(self, params: Params, *args: Any, **kwargs: Any) -> Any:
        local = {name: params[canonical] for name, canonical in self.aliases.items()}
        return functional_call(self.module, local, args, kwargs, tie_weights=False)


class _Given(nn.Module):
    """Stands in for a backbone whose output is already known: hands `inputs_embeds` on as the last hidden states."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> _GivenOutput:
        return _GivenOutput(inputs_embeds)


class _GivenOutput(tuple[Tensor]):
    """A backbone output that holds hidden states alone: every other field of any model's output is None."""

    def __new__(cls, hidden: Tensor) -> _GivenOutput:
        return super().__new__(cls, (hidden,))

    def __getattr__(self, name: str) -> Tensor | None:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[0] if name == "last_hidden_state" else None


def _is_causal_lm(module: nn.Module) -> bool:
    # asked of the class: adapters forward unknown attributes to the model they wrap
    prefix = getattr(type(module), "base_model_prefix", "")
    head = getattr(type(module), "get_output_embeddings", None)
    return prefix in module._modules and head is not None and head(module) is not None


def _ready(skeleton: nn.Module) -> nn.Module:
    """Return the copy in eval mode, without the hook that checkpointing puts on embeddings.

    That hook calls `requires_grad_` on activations, which function transforms refuse and nothing here needs; in eval
    mode transformers does not checkpoint.
    """
    for part in skeleton.modules():
        for key, hook in list(part._forward_hooks.items()):
            if getattr(hook, "__name__", "").startswith("make_inputs_require_grad"):
                del part._forward_hooks[key]
    return skeleton.eval()


def _leaves(module: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in module.named_parameters() if p.requires_grad}


def _is_on(module: nn.Module, device: torch.device) -> bool:
    found = next((p.device for p in module.parameters()), device)
    return found.type == device.type and device.index in (None, found.index)  # "cuda" is wherever on cuda it already is
