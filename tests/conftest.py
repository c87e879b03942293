"""Settings that every suite shares: laws are about values, not about how busy the machine is."""

from __future__ import annotations

import os

# The models are tiny: threads would only wait for each other. OpenMP and MKL read this when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", os.environ["OMP_NUM_THREADS"])

import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
settings.register_profile("laws", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("laws")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
