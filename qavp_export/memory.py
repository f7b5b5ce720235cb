"""Returns memory to the system."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys


def release_memory() -> None:
    """Frees what only reference cycles hold, and gives freed memory back to the system.

    A Hugging Face model refers to itself. Of what it frees, glibc keeps tensors below 32 MB for itself: 1 GB of a
    CLIP-L tower was seen to stay.
    """
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Gives memory that was freed back to the system, which glibc would keep for itself."""
    if sys.platform == "linux":
        # Other C libraries have no such function, and keep less.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
