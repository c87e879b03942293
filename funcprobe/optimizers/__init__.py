"""Optimizers: pure `init` and `apply` pairs, bit-identical to those of torch.optim."""

from funcprobe.optimizers.factories import adam, adamw, from_torch, sgd
from funcprobe.optimizers.stored import stored

__all__ = ["adam", "adamw", "from_torch", "sgd", "stored"]
