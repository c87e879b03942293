"""A causal language model cut at its head: backbone to hidden states, and whatever it does from there to logits.

The head is the model itself with a stand-in where its backbone was, so that a tied head, LoRA on the head, logit
scaling and soft-capping stay what they are. What cannot be cut this way is run whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from funcprobe.policy.binding import Bound, Skeleton
from funcprobe.policy.running import arguments_of, logits_of
from funcprobe.types import Params

Features = Callable[[Params, Tensor, Tensor], Tensor]
Readout = Callable[[Params, Tensor], Tensor]
Decode = Callable[[Params, Tensor, Tensor, Any], tuple[Tensor, Any]]


class Parts(NamedTuple):
    """A model as functions of its leaves."""

    features: Features  #: (params, ids [B, L], mask [B, L]) -> [B, L, D]
    readout: Readout  #: (params, [n, D]) -> logits [n, V]
    readout_names: tuple[str, ...] = ()  #: the trainable leaves that the readout reads
    decode: Decode | None = None  #: (params, new ids, mask, cache) -> (features [B, D], cache)
    body: Bound | None = None  #: the module that the features run, where one call of theirs is one of it


def whole(skeleton: Skeleton) -> Parts:
    """Run the module as it is: its logits are the features and the readout is the identity."""
    bound, arguments = Bound(skeleton, skeleton.module), arguments_of(skeleton.module)

    def features(params: Params, ids: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = logits_of(bound(params, ids, **arguments(mask)))
        return found

    return Parts(features, lambda params, h: h, body=bound)


def splits(skeleton: Skeleton) -> Iterator[Parts]:
    """Yield the ways to cut a module at its head, likeliest first; whether one agrees with the module is for checks."""
    lm = next((m for m in skeleton.module.modules() if _has_head(m)), None)
    if lm is None:
        return
    for path in _backbones(lm):
        yield _split(skeleton, lm, path)


def causal_config(module: nn.Module) -> Any:
    """Return the text configuration of the language model inside a module, or None."""
    for part in module.modules():
        config = getattr(part, "config", None)
        if hasattr(config, "get_text_config"):
            return config.get_text_config()  # type: ignore[union-attr]
    return None


def _split(skeleton: Skeleton, lm: nn.Module, path: str) -> Parts:
    inner = lm.get_submodule(path)
    backbone, head = Bound(skeleton, inner), Bound(skeleton, _with(lm, path, _Given(inner)))

    def features(params: Params, ids: Tensor, mask: Tensor) -> Tensor:
        # Rows are right-padded and attention is causal: no real token ever sees a padded one, so no mask is needed
        # and the fused kernels stay available.
        found: Tensor = backbone(params, input_ids=ids, use_cache=False).last_hidden_state
        return found

    def readout(params: Params, hidden: Tensor) -> Tensor:
        found: Tensor = head(params, inputs_embeds=hidden.unsqueeze(0), use_cache=False).logits.squeeze(0)
        return found

    def decode(params: Params, ids: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        arguments = {"attention_mask": mask.long(), "position_ids": positions, "past_key_values": cache}
        out = backbone(params, input_ids=ids, use_cache=True, **arguments)
        return out.last_hidden_state[:, -1], out.past_key_values

    return Parts(features, readout, tuple(dict.fromkeys(head.aliases.values())), decode, backbone)


def _backbones(lm: nn.Module) -> Iterator[str]:
    """Yield names of submodules that may precede the head: by its class's own word, by `get_decoder`, by size."""
    head = lm.get_output_embeddings()  # type: ignore[operator]
    names = {id(part): name for name, part in lm.named_modules()}
    own = str(getattr(type(lm), "base_model_prefix", ""))
    children = [(sum(p.numel() for p in child.parameters()), name) for name, child in lm.named_children()]
    found = [own] if own in lm._modules else []
    found += [names.get(id(lm.get_decoder()), "")] if hasattr(type(lm), "get_decoder") else []  # type: ignore[operator]
    found += [name for _, name in sorted(children, reverse=True)]
    yield from (n for n in dict.fromkeys(found) if n and not any(m is head for m in lm.get_submodule(n).modules()))


def _has_head(module: nn.Module) -> bool:
    # asked of the class: adapters forward unknown attributes to the model they wrap
    head = getattr(type(module), "get_output_embeddings", None)
    return head is not None and hasattr(module, "config") and isinstance(head(module), nn.Module)


def _with(lm: nn.Module, path: str, given: nn.Module) -> nn.Module:
    """Return the model with `given` in the place of a submodule; the modules on the way are copied, one object each."""
    first, dot, rest = path.partition(".")
    made = copy.copy(lm)
    child = _with(lm._modules[first], rest, given) if dot else given  # type: ignore[arg-type]
    made.__dict__ = {**lm.__dict__, "_modules": {**lm._modules, first: child}}
    return made


class _Given(nn.Module):
    """Stands in for a backbone whose output is already known: hands `inputs_embeds` on as the last hidden states.

    A head may read numbers and settings of the backbone. One that reads its tensors or modules is not cut there: it
    would read them as they were when the copy was made.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.__dict__["stands_for"] = (backbone,)  # a tuple, or it would be a submodule

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.__dict__["stands_for"][0], name)
        if isinstance(found, (Tensor, nn.Module)):
            raise AttributeError(f"the head reads '{name}' of the backbone")
        return found

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
