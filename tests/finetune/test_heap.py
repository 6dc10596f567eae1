"""What a checkpoint took goes back to the system."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
import torch

from tokenloom.finetune.heap import give_back

GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


@pytest.mark.skipif(not GLIBC, reason="another C library")
def test_what_many_small_tensors_took_goes_back() -> None:
    tensors = [torch.ones(9216) for _ in range(4000)]
    last = torch.ones(9216)  # holds the end of the heap
    del tensors
    before = resident_bytes()
    give_back()
    assert before - resident_bytes() > 100e6
    assert last.sum() == 9216
