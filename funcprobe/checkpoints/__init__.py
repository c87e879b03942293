"""Checkpoints: Hugging Face folders, adapters, optimizer states by name, and live training loops."""

from funcprobe.checkpoints.between import between
from funcprobe.checkpoints.checkpoint import Checkpoint
from funcprobe.checkpoints.folder import load_checkpoint
from funcprobe.checkpoints.live import LivePair, from_training
from funcprobe.checkpoints.optimizer_state import map_ids_to_names
from funcprobe.checkpoints.saved_optimizer import load_optimizer
from funcprobe.checkpoints.saving import save_checkpoint

__all__ = [
    "Checkpoint",
    "LivePair",
    "between",
    "from_training",
    "load_checkpoint",
    "load_optimizer",
    "map_ids_to_names",
    "save_checkpoint",
]
