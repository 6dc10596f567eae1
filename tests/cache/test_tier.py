"""The second tier gives back the bytes that it got, within its bounds, or says that it has none."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tokenloom.cache.block_pool import BlockPool, OutOfBlocks
from tokenloom.cache.block_table import BlockTable, block_digest, root_digest
from tokenloom.cache.kv_cache import KVCache
from tokenloom.cache.tier import Tier, open_tier
from tokenloom.cache.tier_store import BlockStore, DiskStore, HostStore
from tokenloom.config import CacheSettings, ConfigError, load_settings

BLOCK, BLOCKS = 4, 6


def cache(dtype: torch.dtype = torch.float32, blocks: int = BLOCKS) -> KVCache:
    return KVCache(2, 3, 8, num_blocks=blocks, block_size=BLOCK, dtype=dtype, device=torch.device("cpu"))


def fill(kv: KVCache, block: int, seed: int) -> None:
    torch.manual_seed(seed)
    slots = torch.arange(block * BLOCK, (block + 1) * BLOCK)
    dtype = torch.float32 if kv.quantized else kv.keys[0].dtype
    for layer in range(2):
        kv.write(layer, slots, *torch.randn(2, BLOCK, 3, 8, dtype=dtype))


def content(kv: KVCache, block: int) -> bytes:
    data = torch.empty(kv.block_bytes, dtype=torch.uint8)
    kv.save_block(block, data)
    return data.numpy().tobytes()


def store(kind: str, folder: Path, slots: int, kv: KVCache) -> BlockStore:
    if kind == "host":
        return HostStore(slots, kv.block_bytes, pinned=False)
    return DiskStore(str(folder), slots, kv.block_bytes, pinned=False)


@pytest.mark.parametrize("kind", ["host", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_block_comes_back_bit_by_bit_scales_included(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    kv = cache(dtype)
    tier = Tier(kv, store(kind, tmp_path, 3, kv))
    for block in range(3):
        fill(kv, block, seed=block)
        tier.demote(block, bytes([block]))
    before = [content(kv, block) for block in range(BLOCKS)]
    assert len(set(before[:3])) == 3 and len(before[0]) == kv.block_bytes == kv.num_bytes // BLOCKS
    for block in range(3):
        assert tier.load(bytes([block]), 5 - block)
    assert [content(kv, block) for block in range(BLOCKS)] == before[:3] + before[2::-1]


def test_the_block_that_was_used_longest_ago_makes_room() -> None:
    kv = cache()
    tier = Tier(kv, HostStore(2, kv.block_bytes, pinned=False))
    tier.demote(0, b"0")
    tier.demote(1, b"1")
    assert tier.load(b"0", 4)
    tier.demote(2, b"2")
    assert [tier.holds(d) for d in (b"0", b"1", b"2")] == [True, False, True]
    assert tier.num_bytes == 2 * kv.block_bytes
    tier.check()


def test_what_is_here_already_does_not_go_down_again() -> None:
    kv = cache()
    tier = Tier(kv, HostStore(2, kv.block_bytes, pinned=False))
    tier.demote(0, b"0")
    tier.demote(0, b"0")
    assert tier.demotions == 1 and tier.num_bytes == kv.block_bytes


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("harm", ["flipped", "cut"])
def test_a_block_that_was_harmed_on_the_disk_is_not_taken(
    tmp_path: Path, harm: str, ahead: bool, caplog: pytest.LogCaptureFixture
) -> None:
    kv = cache()
    disk = DiskStore(str(tmp_path), 2, kv.block_bytes, pinned=False)
    tier = Tier(kv, disk)
    for block in range(2):
        fill(kv, block, seed=block)
        tier.demote(block, bytes([block]))
    slot, file = tier._slots[bytes([1])], disk._file.fileno()
    if harm == "flipped":
        byte = os.pread(file, 1, slot * kv.block_bytes + 17)[0]
        os.pwrite(file, bytes([byte ^ 1]), slot * kv.block_bytes + 17)
    else:
        os.ftruncate(file, slot * kv.block_bytes + 9)
    if ahead:
        tier.read_ahead([bytes([1])])
    before = content(kv, 4)
    assert not tier.load(bytes([1]), 4) and content(kv, 4) == before
    assert not tier.holds(bytes([1])) and tier.corrupt == 1 and "computed again" in caplog.text
    assert tier.load(bytes([0]), 4) and content(kv, 4) == content(kv, 0)
    tier.check()


@pytest.mark.parametrize("failing", ["pwrite", "preadv"])
def test_a_disk_that_fails_ends_the_tier_with_a_warning(
    tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kv = cache()
    tier = Tier(kv, DiskStore(str(tmp_path), 2, kv.block_bytes, pinned=False))
    tier.demote(0, b"0")

    def fail(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, failing, fail)
    if failing == "pwrite":
        tier.demote(1, b"1")
    else:
        assert not tier.load(b"0", 3)
    assert "cache.tier is off from now on" in caplog.text and "No space left" in caplog.text
    monkeypatch.undo()
    tier.demote(2, b"2")
    tier.read_ahead([b"0", b"2"])
    assert not tier.holds(b"0") and not tier.load(b"2", 3) and tier.num_bytes == 0
    tier.check()


def test_the_file_has_its_size_at_once_and_no_name(tmp_path: Path) -> None:
    kv = cache()
    disk = DiskStore(str(tmp_path), 5, kv.block_bytes, pinned=False)
    assert os.fstat(disk._file.fileno()).st_size == 5 * kv.block_bytes
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_space_leaves_the_tier_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    kv, asked = cache(), CacheSettings(tier="disk", tier_path=str(tmp_path), tier_bytes=10**6)
    with caplog.at_level(logging.WARNING):
        assert open_tier(asked, kv) is None
    assert "has no space" in caplog.text and str(tmp_path) in caplog.text


def test_a_path_that_cannot_be_written_is_an_error_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    asked = CacheSettings(tier="disk", tier_path=str(tmp_path / "file"), tier_bytes=10**6)
    with pytest.raises(ConfigError, match=r"cache\.tier_path: .*file: "):
        open_tier(asked, cache())


def test_a_tier_without_room_for_a_block_is_an_error_with_its_key() -> None:
    with pytest.raises(ConfigError, match=r"cache\.tier_bytes: 100 bytes hold no block of 4 tokens"):
        open_tier(CacheSettings(tier="host", tier_bytes=100), cache())


def test_a_tier_without_a_prefix_cache_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cache\.tier: .*cache\.prefix_caching is off"):
        load_settings({"cache.tier": "host", "cache.prefix_caching": False})


def test_what_is_read_ahead_is_what_the_file_holds_even_when_its_slot_goes_to_another(
    tmp_path: Path,
) -> None:
    kv = cache()
    tier = Tier(kv, DiskStore(str(tmp_path), 2, kv.block_bytes, pinned=False))
    for block in range(4):
        fill(kv, block, seed=block)
    tier.demote(0, b"0")
    tier.demote(1, b"1")
    for block in (2, 3, 0, 1) * 5:
        held = [d for d in (b"0", b"1", b"2", b"3") if tier.holds(d)]
        tier.read_ahead(held)
        tier.demote(block, str(block).encode())
        for digest in held:
            if tier.load(digest, 5):
                assert content(kv, 5) == content(kv, int(digest))
        tier.check()
    assert tier.corrupt == 0


def test_what_nobody_waits_for_any_more_is_let_go(tmp_path: Path) -> None:
    kv = cache()
    tier = Tier(kv, DiskStore(str(tmp_path), 3, kv.block_bytes, pinned=False))
    tier.demote(0, b"0")
    tier.demote(1, b"1")
    tier.read_ahead([b"0", b"1"])
    tier.read_ahead([b"1"])
    assert set(tier._ahead) == {b"1"}
    tier.close()
    assert not tier._ahead and not tier.holds(b"1")


class TieredPool(RuleBasedStateMachine):
    """Sequences start, grow, are preempted, come back and end over a pool of few blocks and a smaller tier.

    A token's keys are the token and its place, so that a block says whose it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kv = cache(blocks=8)
        self.pool = BlockPool(8, BLOCK)
        self.tier = self.pool.tier = Tier(self.kv, HostStore(5, self.kv.block_bytes, pinned=False))
        self.running: list[tuple[BlockTable, list[int]]] = []
        self.waiting: list[list[int]] = []

    def _digests(self, tokens: list[int]) -> list[bytes]:
        digest, out = root_digest("test"), []
        for i in range(0, len(tokens) - BLOCK + 1, BLOCK):
            digest = block_digest(digest, tokens[i : i + BLOCK])
            out.append(digest)
        return out

    def _append(self, table: BlockTable, tokens: list[int], index: int) -> None:
        table.grow(index + 1)
        value = float(100 * index + tokens[index])
        self.kv.write(0, torch.tensor([table.slot(index)]), *torch.full((2, 1, 3, 8), value))
        if (index + 1) % BLOCK == 0:
            digest = self._digests(tokens[: index + 1])[-1]
            self.pool.publish(table.blocks[index // BLOCK], digest)

    def _start(self, tokens: list[int]) -> None:
        table = BlockTable(self.pool)
        for digest in self._digests(tokens):
            block = self.pool.lookup(digest)
            if block is None:
                block = self.pool.restore(digest, table.blocks[-1] if table.blocks else None)
            if block is None:
                break
            table.adopt(block)
        try:
            for index in range(len(table.blocks) * BLOCK, len(tokens)):
                self._append(table, tokens, index)
        except OutOfBlocks:
            table.clear()
            self.waiting.append(tokens)
        else:
            self.running.append((table, tokens))

    @rule(kind=st.integers(0, 2), count=st.integers(1, 20))
    def arrive(self, kind: int, count: int) -> None:
        self._start([kind] * count)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99), token=st.integers(0, 2))
    def decode(self, which: int, token: int) -> None:
        table, tokens = self.running[which % len(self.running)]
        if len(tokens) % BLOCK == 0 or not self.pool.is_published(table.blocks[-1]):
            try:
                self._append(table, [*tokens, token], len(tokens))
            except OutOfBlocks:
                return
            tokens.append(token)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99))
    def preempt(self, which: int) -> None:
        table, tokens = self.running.pop(which % len(self.running))
        table.clear()
        self.waiting.append(tokens)

    @precondition(lambda self: self.waiting)
    @rule(which=st.integers(0, 99))
    def resume(self, which: int) -> None:
        self._start(self.waiting.pop(which % len(self.waiting)))

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99))
    def end(self, which: int) -> None:
        self.running.pop(which % len(self.running))[0].clear()

    @invariant()
    def accounts_are_right(self) -> None:
        self.pool.check()
        held = [b for table, _ in self.running for b in table.blocks]
        assert all(self.pool.refs(b) == held.count(b) for b in range(8))
        assert self.tier.num_bytes <= 5 * self.kv.block_bytes

    @invariant()
    def every_sequence_reads_its_own_tokens(self) -> None:
        for table, tokens in self.running:
            slots = torch.tensor([table.slot(i) for i in range(len(tokens))])
            wanted = torch.tensor([float(100 * i + token) for i, token in enumerate(tokens)])
            assert torch.equal(self.kv.keys[0][slots, 1, 3], wanted)
            assert torch.equal(self.kv.values[0][slots, 2, 0], wanted)


TieredPool.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestTieredPool = TieredPool.TestCase
