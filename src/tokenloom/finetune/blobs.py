"""Bytes of files on disk: there whole or not at all, whenever the machine stops.

A blob is written under a temporary name in its own folder, synced, renamed, and the folder synced; only then
is its row committed. What a crash leaves between these steps has no row and is removed at the next start.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenloom.durable import sync
from tokenloom.finetune.database import new_id
from tokenloom.finetune.errors import FileTooLargeError, StorageFullError

_TEMPORARY = ".part"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Quota:
    """Room for all files together, those on their way included: many uploads at once are held to it, too.

    Args:
        limit_bytes: of all of them.
        stored: bytes of the files that are there.
    """

    def __init__(self, limit_bytes: int, stored: Callable[[], int]) -> None:
        self._limit_bytes = limit_bytes
        self._stored = stored
        self._lock = threading.Lock()
        self._on_their_way = 0

    def take(self, num_bytes: int) -> None:
        """Bytes of a file on its way. Raises StorageFullError if there is no room for them."""
        with self._lock:
            taken = self._stored() + self._on_their_way
            if taken >= self._limit_bytes or taken + num_bytes > self._limit_bytes:
                raise StorageFullError("the quota for files is used up; delete some files first")
            self._on_their_way += num_bytes

    def give_back(self, num_bytes: int) -> None:
        """They are gone, or stored."""
        with self._lock:
            self._on_their_way -= num_bytes


class Blob:
    """A file on its way to disk. Use as a context manager: what was not kept is gone at the end.

    Attributes:
        id: the id that the file will have.
        size_bytes, sha256: of what has been written.
    """

    def __init__(self, folder: Path, *, max_bytes: int, quota: Quota | None) -> None:
        self.id = new_id("file-")
        self.path = folder / self.id
        self.size_bytes = 0
        self._max_bytes = max_bytes
        self._quota = quota
        self._taken_bytes = 0
        self._hash = hashlib.sha256()
        self._temporary = folder / (self.id + _TEMPORARY)
        self._kept = False
        with _no_room_is_explained():
            self._file = self._temporary.open("xb")

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: bytes) -> None:
        """Append bytes. Raises FileTooLargeError or StorageFullError."""
        self.size_bytes += len(data)
        if self.size_bytes > self._max_bytes:
            raise FileTooLargeError(
                f"the file is larger than {self._max_bytes} bytes", param="file", code="file_too_large"
            )
        if self._quota is not None:
            self._quota.take(len(data))
            self._taken_bytes += len(data)
        self._hash.update(data)
        with _no_room_is_explained():
            self._file.write(data)

    def seal(self) -> None:
        """Bring all bytes to disk under the final name. Raises StorageFullError."""
        with _no_room_is_explained():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self.path)
            sync(self.path.parent)

    def keep(self) -> None:
        """The row is committed: the blob stays."""
        self._kept = True
        self._give_back()

    def discard(self) -> None:
        """Remove the bytes, unless they are kept."""
        if not self._kept:
            with contextlib.suppress(OSError):  # closing may try to write once more
                self._file.close()
            self._temporary.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
            self._give_back()

    def _give_back(self) -> None:
        if self._quota is not None:
            self._quota.give_back(self._taken_bytes)
            self._taken_bytes = 0

    def __enter__(self) -> Blob:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()


def remove_orphans(folder: Path, known: set[str]) -> list[str]:
    """Delete what no row tells of; returns the names."""
    orphans = sorted(entry.name for entry in folder.iterdir() if entry.name not in known)
    for name in orphans:
        (folder / name).unlink()
    return orphans


@contextlib.contextmanager
def _no_room_is_explained() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise StorageFullError("the disk that holds the files is full") from error
        raise
