"""Where the blocks of the second tier lie: in host memory, or in a file of fixed size."""

from __future__ import annotations

import os
import tempfile
import zlib
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


class CorruptBlock(Exception):
    """What was read is not what was written."""


class BlockStore(Protocol):
    """`num_slots` places for a block's bytes, uint8 `[block_bytes]`."""

    num_slots: int
    slow: bool
    """Whether reading is worth doing ahead, in a thread of its own."""

    def place(self, slot: int) -> Tensor:
        """Where to put the bytes that `commit(slot)` then stores."""

    def commit(self, slot: int) -> None:
        """Raises OSError."""

    def read(self, slot: int) -> Tensor:
        """The bytes; they may change with the next `place`.

        Raises:
            CorruptBlock, OSError.
        """

    def close(self) -> None: ...


class HostStore:
    """Memory of the host. Its pages are touched when they are first written.

    Args:
        pinned: lock it in memory, so that a GPU copies to and from it directly.
    """

    slow = False

    def __init__(self, num_slots: int, block_bytes: int, *, pinned: bool) -> None:
        self.num_slots = num_slots
        self._data = torch.empty(num_slots, block_bytes, dtype=torch.uint8, pin_memory=pinned)

    def place(self, slot: int) -> Tensor:
        return self._data[slot]

    def commit(self, slot: int) -> None:
        """They are where they belong."""

    def read(self, slot: int) -> Tensor:
        return self._data[slot]

    def close(self) -> None:
        self._data = torch.empty(0, 0, dtype=torch.uint8)


class DiskStore:
    """A file without a name in `folder`, its space taken at once: when the process ends, nothing is left.

    Writes end in the system's page cache, which carries them to the disk. What is read must have the checksum
    of what was written.

    Raises:
        OSError: the file cannot be made, or there is no space for it.
    """

    slow = True

    def __init__(self, folder: str, num_slots: int, block_bytes: int, *, pinned: bool) -> None:
        self.num_slots = num_slots
        self._block_bytes, self._pinned = block_bytes, pinned
        self._sums = [0] * num_slots
        self._staged = self._buffer()
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder, prefix="tokenloom-tier-", buffering=0)  # noqa: SIM115
        try:
            _take_space(self._file.fileno(), num_slots * block_bytes)
        except OSError:
            self._file.close()
            raise

    def _buffer(self) -> Tensor:
        return torch.empty(self._block_bytes, dtype=torch.uint8, pin_memory=self._pinned)

    def place(self, slot: int) -> Tensor:
        return self._staged

    def commit(self, slot: int) -> None:
        data = self._staged.numpy().data
        self._sums[slot] = zlib.crc32(data)
        at = slot * self._block_bytes
        while data:
            written = os.pwrite(self._file.fileno(), data, at)
            data, at = data[written:], at + written

    def read(self, slot: int) -> Tensor:
        buffer = self._buffer()
        data = buffer.numpy().data
        length = os.preadv(self._file.fileno(), [data], slot * self._block_bytes)
        if length != self._block_bytes:
            raise CorruptBlock(f"a block on disk has {length} bytes of {self._block_bytes}")
        if zlib.crc32(data) != self._sums[slot]:
            raise CorruptBlock("a block on disk is not what was written")
        return buffer

    def close(self) -> None:
        self._file.close()


def _take_space(file: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:  # macOS: the space is taken as it is written
        os.truncate(file, size)
