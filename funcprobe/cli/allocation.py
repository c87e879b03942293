"""How the C library of a command keeps freed memory: for the next microbatch, in place of a page fault a page.

A pass over a microbatch allocates and frees the same tensors as the one before. With its defaults glibc gives much of
that back to the system, which clears every page before it hands it out again: system time, and the cache emptied.
"""

from __future__ import annotations

import os
from collections.abc import Callable

MIB = 2**20

#: Blocks from this size on are mapped on their own and go back when freed: as far as glibc's threshold grows by itself.
MAP_FROM = 32 * MIB

#: Freed memory that stays at the end of the heap. Both go together: setting either stops glibc from adapting the other,
#: and with blocks mapped from the default of 128 KiB there would be more faults than without.
KEEP = 256 * MIB

#: The names of these in <malloc.h>, as numbers.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Let glibc keep the memory that this process frees, and return whether it does.

    It does not under another C library, nor where the environment sets up the allocator (`MALLOC_…`, or `glibc.malloc`
    in `GLIBC_TUNABLES`, or a library in `LD_PRELOAD`): that wins.
    """
    if _is_set_up() or not _is_glibc():
        return False
    mallopt = _mallopt()
    return bool(mallopt(_M_MMAP_THRESHOLD, MAP_FROM) and mallopt(_M_TRIM_THRESHOLD, KEEP))


def _is_set_up() -> bool:
    named = any(name.startswith("MALLOC_") for name in os.environ)
    return named or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or bool(os.environ.get("LD_PRELOAD"))


def _is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):  # Windows has no confstr, other systems not this name
        return False


def _mallopt() -> Callable[[int, int], int]:
    import ctypes

    mallopt: Callable[[int, int], int] = ctypes.CDLL(None).mallopt
    return mallopt
