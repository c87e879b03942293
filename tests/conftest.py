"""Settings that every suite shares: laws are about values, not about how busy the machine is."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
settings.register_profile("laws", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("laws")
torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
