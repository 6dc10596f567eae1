"""A second tier of KV blocks: what the pool gives away is kept in host memory or on a disk for a while."""

from __future__ import annotations

import errno
import logging
from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from tokenloom.cache.kv_cache import KVCache
from tokenloom.cache.tier_store import BlockStore, CorruptBlock, DiskStore, HostStore
from tokenloom.config import CacheSettings, ConfigError, home

logger = logging.getLogger("tokenloom.cache")

READ_AHEAD_BYTES = 64 * 2**20
"""Most bytes of blocks that lie in memory, read from the disk for requests that wait."""


class Tier:
    """Cold blocks by their digests, the least recently used of which make room.

    A block that comes back is copied: the tier keeps its own until it is the oldest, so that the same block
    goes down once. For one thread; `read_ahead` has its own.

    Where the store cannot be written or read any more, the tier warns, forgets all and stays off: a miss
    costs computing, never an answer.
    """

    def __init__(self, kv: KVCache, store: BlockStore) -> None:
        self.kv = kv
        self.store: BlockStore | None = store
        self.num_slots = store.num_slots
        self.hits = 0
        """Blocks that came back."""
        self.demotions = 0
        """Blocks that went down."""
        self.corrupt = 0
        """Blocks that did not come back as they went."""
        self._slots: OrderedDict[bytes, int] = OrderedDict()  # oldest first
        self._free = list(range(store.num_slots - 1, -1, -1))
        self._ahead: dict[bytes, Future[Tensor]] = {}
        self._reader: ThreadPoolExecutor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes that blocks take up here."""
        return len(self._slots) * self.kv.block_bytes

    @property
    def read_ahead_blocks(self) -> int:
        """How many blocks `read_ahead` takes; 0 where reading is copying."""
        if self.store is None or not self.store.slow:
            return 0
        return max(1, READ_AHEAD_BYTES // self.kv.block_bytes)

    def holds(self, digest: bytes) -> bool:
        return digest in self._slots

    def touch(self, digest: bytes) -> bool:
        """Whether a block with that content is here; it is then the last to make room."""
        if digest not in self._slots:
            return False
        self._slots.move_to_end(digest)
        return True

    def demote(self, block: int, digest: bytes) -> None:
        """Keep a copy of a block that the pool gives away."""
        if self.store is None or self.touch(digest):
            return
        if not self._free:
            self._drop(next(iter(self._slots)))
        slot = self._free.pop()
        self._slots[digest] = slot
        try:
            self.kv.save_block(block, self.store.place(slot))
            self.store.commit(slot)
        except OSError as error:
            self._switch_off(error)
        else:
            self.demotions += 1

    def load(self, digest: bytes, block: int) -> bool:
        """Copy what has that digest to a block; False: it is not here, or not as it was."""
        if digest not in self._slots or self.store is None:
            return False
        ahead = self._ahead.pop(digest, None)
        try:
            data = self.store.read(self._slots[digest]) if ahead is None else ahead.result()
        except CorruptBlock as error:
            logger.warning("cache.tier: %s: it will be computed again", error)
            self.corrupt += 1
            self._drop(digest)
            return False
        except OSError as error:
            self._switch_off(error)
            return False
        self.kv.load_block(block, data)
        self.touch(digest)
        self.hits += 1
        return True

    def read_ahead(self, digests: Collection[bytes]) -> None:
        """Read these blocks into memory, beside whatever else goes on; others that were read are let go.

        At most `read_ahead_blocks`; requests that wait will `load` them.
        """
        for digest in self._ahead.keys() - set(digests):
            self._settle(digest)
        if self.store is None:
            return
        for digest in digests:
            if digest in self._slots and digest not in self._ahead:
                if self._reader is None:
                    self._reader = ThreadPoolExecutor(1, thread_name_prefix="tokenloom-tier")
                self._ahead[digest] = self._reader.submit(self.store.read, self._slots[digest])

    def forget(self, digest: bytes) -> None:
        """Drop a block if it is here."""
        if digest in self._slots:
            self._drop(digest)

    def clear(self) -> None:
        """Forget everything."""
        for digest in list(self._slots):
            self._drop(digest)

    def close(self) -> None:
        """Forget everything and give back the store's memory or file."""
        self.clear()
        if self._reader is not None:
            self._reader.shutdown()
        if self.store is not None:
            self.store.close()
            self.store = None

    def _drop(self, digest: bytes) -> None:
        self._settle(digest)
        self._free.append(self._slots.pop(digest))

    def _settle(self, digest: bytes) -> None:
        """End what is being read ahead: its slot may be written next."""
        ahead = self._ahead.pop(digest, None)
        if ahead is not None and not ahead.cancel():
            ahead.exception()

    def _switch_off(self, error: OSError) -> None:
        logger.warning("cache.tier is off from now on: %s", error)
        self.close()

    def check(self) -> None:
        """Raise AssertionError unless every slot is free or holds one block (for tests and debugging)."""
        used = list(self._slots.values())
        assert sorted(used + self._free) == list(range(self.num_slots)), "a slot is lost or held twice"
        assert set(self._ahead) <= set(self._slots), "a block that is gone is being read"


def open_tier(settings: CacheSettings, kv: KVCache) -> Tier | None:
    """The tier that `cache.tier` asks for; None: none, or the disk has no space for it (with a warning).

    Raises:
        ConfigError: `cache.tier_bytes` holds no block, or nothing can be written at `cache.tier_path`.
    """
    if settings.tier == "none":
        return None
    num_slots = settings.tier_bytes // kv.block_bytes
    if num_slots < 1:
        raise ConfigError(
            f"setting cache.tier_bytes: {settings.tier_bytes} bytes hold no block of {kv.block_size} tokens "
            f"({kv.block_bytes} bytes)"
        )
    pinned = kv.keys[0].is_cuda
    if settings.tier == "host":
        return Tier(kv, HostStore(num_slots, kv.block_bytes, pinned=pinned))
    folder = settings.tier_path or str(home() / "tier")
    try:
        return Tier(kv, DiskStore(folder, num_slots, kv.block_bytes, pinned=pinned))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            logger.warning(
                "cache.tier is off: %s has no space for %d bytes", folder, num_slots * kv.block_bytes
            )
            return None
        raise ConfigError(f"setting cache.tier_path: {folder}: {error.strerror}") from error
