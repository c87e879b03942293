"""Checkpoints: Hugging Face folders, adapters, optimizer states by name, and live training loops."""

from funcprobe.checkpoints.folder import Checkpoint, load_checkpoint, load_optimizer
from funcprobe.checkpoints.live import from_training
from funcprobe.checkpoints.optimizer_state import map_ids_to_names
from funcprobe.checkpoints.saving import save_checkpoint

__all__ = [
    "Checkpoint",
    "from_training",
    "load_checkpoint",
    "load_optimizer",
    "map_ids_to_names",
    "save_checkpoint",
]
