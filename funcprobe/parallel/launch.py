"""The start and the end of a process that torchrun has started beside others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed as dist

from funcprobe.errors import ConfigError
from funcprobe.parallel.environment import is_launched
from funcprobe.parallel.world import World, world

#: Seconds that a process waits for another one: writing figures, or a slow card, must fit in.
PATIENCE = 300.0


@contextmanager
def launched() -> Iterator[World]:
    """Return a context in which the processes that torchrun started are one world; a group that exists is kept.

    Raises:
        ConfigError: If they do not find one another.
    """
    if not is_launched() or dist.is_initialized():
        yield world()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        # without a name torch takes gloo for what lies in memory and nccl for what lies on cards
        dist.init_process_group(timeout=timedelta(seconds=PATIENCE))
    except (RuntimeError, ValueError, dist.DistError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f"The processes that torchrun started do not find one another ({first}); check MASTER_ADDR, MASTER_PORT, "
            "RANK and WORLD_SIZE."
        ) from error
    try:
        yield world()
    finally:
        dist.destroy_process_group()
