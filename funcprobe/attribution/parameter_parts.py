"""The contribution `⟨∇F_n, Δθ_n⟩` of every parameter leaf to δF₁, and the kind of leaf that its name tells of."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from funcprobe import tree
from funcprobe.optimizers.unreached import with_zeros
from funcprobe.types import Gradients, Leaves, Params


class LeafPart(NamedTuple):
    """One parameter leaf's contribution."""

    name: str
    contribution: float  #: ⟨∇F_n, Δθ_n⟩
    gradient: float  #: of it, what the gradient on U did: ⟨u_n, g_n⟩
    momentum: float  #: of it, what the optimizer's state did; 0 in the jacobian form
    decay: float  #: of it, what weight decay did; 0 in the jacobian form
    norm: float  #: ‖Δθ_n‖₂
    size: int  #: entries

    @property
    def rest(self) -> float:
        """The contribution that is none of these: 0 to rounding in the additive form."""
        return self.contribution - self.gradient - self.momentum - self.decay


class LeafName(NamedTuple):
    """The parts of a leaf's name: its layer and its kind."""

    module: str  #: the module that it belongs to; for LoRA the adapted one
    layer: int | None  #: the number of its block; None outside of blocks
    kind: str  #: attention, mlp, norm, embedding, head or other
    adapter: str  #: "A", "B", "embedding A", ... or "magnitude" for a LoRA leaf; "" for a plain one


#: Kinds by the words that a module path holds, in the order in which they are looked for: a norm inside attention is a
#: norm, and a router inside an MLP part of it.
_KINDS = (
    ("norm", re.compile(r"(^|[._])(\w*norm\w*|ln|ln_\w+|ln\d)($|[.])")),
    ("attention", re.compile(r"(^|[._])(\w*attn\w*|\w*attention\w*|[qkvo]_proj|qkv\w*)($|[.])")),
    ("mlp", re.compile(r"(^|[._])(\w*mlp\w*|feed_forward|ffn|\w*expert\w*|\w*moe|fc\d?|(gate|up|down)_proj)($|[.])")),
    ("head", re.compile(r"(^|[.])(lm_head|head|embed_out|output_layer|score)($|[.])")),
    ("embedding", re.compile(r"(^|[._])(\w*embed\w*|wte|wpe)($|[.])")),
)
_LORA = re.compile(r"\.(lora_embedding_|lora_magnitude_vector|lora_)([AB]?)(?:[.].*)?$")
#: What peft puts between a module and its own leaf: copies of it under an adapter's name, and retrained tokens.
_INSIDE = re.compile(
    r"\.(modules_to_save\.[^.]+|original_module|base_layer|token_adapter\.trainable_tokens_delta)(?=\.)"
)
_WRAPPERS = re.compile(r"^(base_model\.model\.|module\.|_orig_mod\.)+")


def read_name(name: str) -> LeafName:
    """Return the layer and the kind in a leaf's name, for the naming of transformers, peft and plain modules.

    Example:
        >>> read_name("base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight")
        LeafName(module='model.layers.3.self_attn.q_proj', layer=3, kind='attention', adapter='A')
        >>> read_name("transformer.h.0.ln_1.bias")
        LeafName(module='transformer.h.0.ln_1', layer=0, kind='norm', adapter='')
    """
    path, adapter = _WRAPPERS.sub("", name), ""
    if found := _LORA.search(path):
        path = path[: found.start()]
        adapter = {"lora_embedding_": "embedding ", "lora_magnitude_vector": "magnitude"}.get(found[1], "") + found[2]
        module = path
    else:
        path = _INSIDE.sub("", path)
        module = path.rpartition(".")[0]
    number = re.search(r"\.(\d+)(?=\.|$)", f".{module}")
    kind = next((kind for kind, words in _KINDS if words.search(module)), "other")
    return LeafName(module, int(number[1]) if number else None, kind, adapter)


def leaf_parts(
    covector: Params,
    delta: Leaves,
    gradient: Gradients,
    direction: Leaves,
    offsets: Mapping[str, Mapping[str, float]],
) -> tuple[LeafPart, ...]:
    """Return every leaf's contribution: ∇F against Δθ, and ∇F carried back through the step against the gradient."""
    whole, drawn = _dots(covector, delta), _dots(with_zeros(gradient, covector), direction)
    norms = tree.leaf_norms(delta)
    none: dict[str, float] = dict.fromkeys(delta, 0.0)
    momentum, decay = offsets.get("momentum", none), offsets.get("weight decay", none)
    sizes = {name: tree.size({name: c}) for name, c in covector.items()}
    return tuple(LeafPart(n, whole[n], drawn[n], momentum[n], decay[n], norms[n], sizes[n]) for n in covector)


def rolled_up(parts: Iterable[LeafPart], by: Callable[[LeafName], str | None]) -> dict[str, LeafPart]:
    """Return rows of leaves by label, in order of appearance; a label of None leaves a leaf out.

    Contributions and sizes are sums, the norm is that of the leaves as one vector.
    """
    found: dict[str, LeafPart] = {}
    for part in parts:
        label = by(read_name(part.name))
        if label is None:
            continue
        row = found.get(label, LeafPart(label, 0.0, 0.0, 0.0, 0.0, 0.0, 0))
        found[label] = LeafPart(
            label,
            row.contribution + part.contribution,
            row.gradient + part.gradient,
            row.momentum + part.momentum,
            row.decay + part.decay,
            math.hypot(row.norm, part.norm),
            row.size + part.size,
        )
    return found


def layer_label(name: LeafName) -> str:
    """Return the row of a leaf in a table of layers: the number of its block, or its kind outside of blocks."""
    if name.layer is not None:
        return f"layer {name.layer}"
    if name.kind == "norm":
        return "embedding norm" if "embed" in name.module else "final norm"
    return name.kind


def kind_label(name: LeafName) -> str:
    """Return the row of a leaf in a table of kinds; LoRA factors are told apart."""
    return f"{name.kind} (LoRA {name.adapter})" if name.adapter else name.kind


def pair_label(name: LeafName) -> str | None:
    """Return the row of a leaf in a table of LoRA pairs: the adapted module; None for a plain leaf."""
    return name.module if name.adapter else None


#: Tables of parameters by name, and the row of a leaf in each.
PARAMETER_TABLES: dict[str, Callable[[LeafName], str | None]] = {
    "layers": layer_label,
    "kinds": kind_label,
    "modules": lambda name: name.module,
    "pairs": pair_label,
}


def _dots(a: Params, b: Leaves) -> dict[str, float]:
    tree.same_keys(a, b)
    return {name: float(tree.dot({name: x}, {name: b[name]})) for name, x in a.items()}
