"""Memory in large pages, for what is read from end to end for every token.

With pages of 4 KiB a tenth of that time goes into looking up addresses, in a virtual machine at least. Linux
gives large pages on request to private memory that is mapped in whole multiples of them; a model's weights,
of which most are smaller, therefore lie side by side.
"""

from __future__ import annotations

import contextlib
import mmap
import threading

import torch
from torch import Tensor

PAGE = 2**21
ARENA = 16 * PAGE
LINE = 64

_lock = threading.Lock()
_free = torch.empty(0, dtype=torch.uint8)


def room(size: int) -> Tensor:
    """Zeros, uint8 `[size]`, from a multiple of 64 bytes on; in large pages where there are any."""
    global _free
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=torch.uint8)
    with _lock:
        if size > len(_free):
            _free = _mapped(max(ARENA, -(-size // PAGE) * PAGE))
        taken, _free = _free[:size], _free[-(-size // LINE) * LINE :]
    return taken


def _mapped(size: int) -> Tensor:
    """Private memory from a multiple of PAGE on; the system has it back after the last tensor in it."""
    memory = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    skip = -whole.data_ptr() % PAGE
    return whole[skip : skip + size]
