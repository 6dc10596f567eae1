"""What a forward pass keeps for its backward pass, in blocks of the KV pool (FlexLLM, graph pruning)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from tokenloom.cache.block_pool import BlockPool
from tokenloom.cache.block_table import BlockTable
from tokenloom.cache.kv_cache import KVCache
from tokenloom.models.config import ModelConfig

Retain = Literal["lean", "fast", "ckpt"]

SITES: dict[Retain, tuple[str, ...]] = {
    "ckpt": ("input",),
    "lean": ("input", "residual", "query"),
    "fast": ("input", "query", "attended", "log_sums", "gate_up"),
}
"""Tap sites that are kept per layer. Keys and values are kept besides, as the KV cache; all else (norms,
attention weights, SiLU products, LoRA's middle) is computed again, window by window. The residual after
attention is the input and one small product away from what attention gave; attention itself is not."""


def site_widths(config: ModelConfig, retain: Retain) -> dict[str, int]:
    """Numbers per token and layer of each kept site."""
    d = config.hidden_size
    widths = {
        "input": d,
        "residual": d,
        "query": config.num_heads * config.head_dim,
        "attended": config.num_heads * config.head_dim,
        "log_sums": config.num_heads,
        "gate_up": 2 * config.intermediate_size,
    }
    return {site: widths[site] for site in SITES[retain]}


def slots_per_token(config: ModelConfig, retain: Retain) -> float:
    """KV slots that one training token takes, its own included."""
    unit = config.num_kv_heads * config.head_dim
    return 1 + sum(-(-width // unit) for width in site_widths(config, retain).values()) / 2


def blocks_needed(config: ModelConfig, num_rows: int, retain: Retain, block_size: int) -> int:
    """Blocks that the activations of so many rows take, keys and values not included."""
    return math.ceil(num_rows * (slots_per_token(config, retain) - 1) / block_size)


class Retained:
    """Activations of T rows in every layer, in blocks claimed from the pool.

    A slot holds two units of Hk * D numbers, its key's and its value's place. A site's rows lie one after
    another, each in as many units as it needs; with consecutive blocks reading is a view.

    Args:
        after: the block after which to look for free ones.

    Raises:
        OutOfBlocks: the pool has too few; nothing is held then.
    """

    def __init__(
        self,
        config: ModelConfig,
        kv: KVCache,
        pool: BlockPool,
        num_rows: int,
        retain: Retain,
        after: int | None = None,
    ) -> None:
        self.kv = kv
        self.num_rows = num_rows
        self._unit = config.num_kv_heads * config.head_dim
        self._widths = site_widths(config, retain)
        self._start: dict[str, int] = {}
        units = 0
        for site, width in self._widths.items():
            self._start[site] = units
            units += num_rows * -(-width // self._unit)
        num_slots = -(-units // 2)
        self.table = BlockTable(pool)
        try:
            self.table.grow(num_slots, after=after)
        except BaseException:
            self.table.clear()
            raise
        blocks = torch.tensor(self.table.blocks)
        slots = (blocks[:, None] * pool.block_size + torch.arange(pool.block_size)).flatten()[:num_slots]
        # Units fill the keys' places of all slots first, then the values'.
        self._address = torch.cat((slots, slots + kv.num_blocks * kv.block_size))
        self._address_here = self._address.to(kv.keys[0].device)

    @property
    def sites(self) -> frozenset[str]:
        return frozenset(self._widths)

    def _units(self, site: str, begin: int, end: int) -> tuple[int, int, int]:
        per_row = -(-self._widths[site] // self._unit)
        return self._start[site] + begin * per_row, self._start[site] + end * per_row, per_row

    def write(self, layer: int, site: str, begin: int, value: Tensor) -> None:
        """Keep value `[n, width]` as rows `begin .. begin + n`."""
        first, last, per_row = self._units(site, begin, begin + len(value))
        missing = per_row * self._unit - value.shape[1]
        if missing:
            value = torch.nn.functional.pad(value, (0, missing))
        value = value.reshape(last - first, self._unit)
        run = self._run(first, last)
        if run is None:
            self.kv.rows[layer].index_copy_(0, self._address_here[first:last], value)
        else:
            self.kv.rows[layer][run].copy_(value)

    def read(self, layer: int, site: str, begin: int, end: int) -> Tensor:
        """Rows `begin .. end`, `[end - begin, width]`; a view where it can be."""
        first, last, per_row = self._units(site, begin, end)
        run = self._run(first, last)
        rows = self.kv.rows[layer]
        units = rows.index_select(0, self._address_here[first:last]) if run is None else rows[run]
        return units.view(end - begin, per_row * self._unit)[:, : self._widths[site]]

    def units(self, site: str, begin: int, end: int) -> Tensor:
        """Where rows `begin .. end` of a site lie in `KVCache.rows`, int64 `[end - begin, units per row]`."""
        first, last, per_row = self._units(site, begin, end)
        return self._address_here[first:last].view(-1, per_row)

    def _run(self, first: int, last: int) -> slice | None:
        """The units as one slice of the cache's rows, if they are consecutive."""
        start, stop = int(self._address[first]), int(self._address[last - 1]) + 1
        consecutive = self.table.contiguous and stop - start == last - first
        return slice(start, stop) if consecutive else None

    def release(self) -> None:
        self.table.clear()
