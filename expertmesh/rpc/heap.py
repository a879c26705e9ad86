"""How a serving process keeps its memory: what is freed between two calls is not given back to the system at once.

By default glibc maps large blocks anew for every pass and gives the end of its heap back after it, so that every pass
pays page faults for the same memory; and Python looks through all that was loaded at start again and again.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BYTES = 2**25  # at the end of the heap
MAPPED_BYTES = 2**24  # a block from this size on is mapped by itself, and given back when it is freed
YOUNG_OBJECTS = 10_000  # allocations between two collections, 700 by default


def keep_freed() -> None:
    """Has the allocator keep what is freed, within bounds; does nothing where it is not glibc's."""
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(_MMAP_THRESHOLD, MAPPED_BYTES)


def leave_loaded_alone() -> None:
    """Takes what has been loaded so far out of garbage collection, and has the rest looked through less often.

    What loading has freed, such as weights as they lay in files, is given back to the system.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])
    malloc_trim = _glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _glibc(name: str) -> Any:
    """A function of glibc's allocator, or None where there is another."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
