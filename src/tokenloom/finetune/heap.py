"""The C library's heaps."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Let the system have what is free in them: glibc keeps it after many small tensors."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
