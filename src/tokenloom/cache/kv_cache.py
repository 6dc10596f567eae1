"""The tensors that hold keys and values, and how large they may be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class KVCache:
    """Keys and values of all layers, in slots.

    `keys[layer]` and `values[layer]` are `[num_blocks * block_size, Hk, D]`. A slot is claimed through
    `BlockPool`; its memory is touched when it is first written. `rows[layer]` is the same memory as plain
    rows of Hk * D numbers, all slots' keys and then all slots' values: training keeps activations in blocks.

    With `dtype` int8 a number is q * scale, with `key_scales[layer]` and `value_scales[layer]`, float32
    `[num_slots, Hk]`, one per token and head: a quarter of float32's memory and traffic. Otherwise both lists
    are empty.
    """

    native: Any = None
    """What the native kernels made of it."""

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        shape = (num_layers, 2, num_blocks * block_size, num_kv_heads, head_dim)
        self._data = torch.empty(shape, dtype=dtype, device=device)
        self.keys: list[Tensor] = [layer[0] for layer in self._data]
        self.values: list[Tensor] = [layer[1] for layer in self._data]
        self.rows: list[Tensor] = [layer.view(2 * num_blocks * block_size, -1) for layer in self._data]
        self.num_slots = num_blocks * block_size
        self.quantized = dtype == torch.int8
        self._scales = torch.empty(shape[:4] if self.quantized else 0, device=device)
        self.key_scales: list[Tensor] = [layer[0] for layer in self._scales]
        self.value_scales: list[Tensor] = [layer[1] for layer in self._scales]
        self._scratch: KVCache | None = None

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v `[T, Hk, D]` at slots `[T]`."""
        if self.quantized:
            k, k_scales = quantize_heads(k)
            v, v_scales = quantize_heads(v)
            self.key_scales[layer].index_copy_(0, slots, k_scales)
            self.value_scales[layer].index_copy_(0, slots, v_scales)
        self.keys[layer].index_copy_(0, slots, k)
        self.values[layer].index_copy_(0, slots, v)

    def copy_block(self, source: int, target: int) -> None:
        """Copy the content of one block to another in every layer."""
        to, of = (slice(b * self.block_size, (b + 1) * self.block_size) for b in (target, source))
        self._data[:, :, to] = self._data[:, :, of]
        if self.quantized:
            self._scales[:, :, to] = self._scales[:, :, of]

    def copy_slots(self, sources: Tensor, targets: Tensor) -> None:
        """Copy tokens between slots `[n]` in every layer; all are read before any is written."""
        self._data[:, :, targets] = self._data[:, :, sources]
        if self.quantized:
            self._scales[:, :, targets] = self._scales[:, :, sources]

    # -- blocks as bytes: what leaves the pool, and comes back as it was -------------------------------------

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers."""
        return self.num_bytes // self.num_blocks

    def save_block(self, block: int, out: Tensor) -> None:
        """Copy a block of all layers to out, uint8 `[block_bytes]` on the host."""
        for part, place in self._parts(block, out):
            place.copy_(part)

    def load_block(self, block: int, data: Tensor) -> None:
        """Let a block be what `save_block` made data `[block_bytes]` of."""
        for part, place in self._parts(block, data):
            part.copy_(place)

    def _parts(self, block: int, data: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What a block is made of, and where each part lies in `data`, as its type and shape."""
        slots, begin = slice(block * self.block_size, (block + 1) * self.block_size), 0
        for whole in (self._data, self._scales):
            if whole.numel():
                part = whole[:, :, slots]
                end = begin + part.numel() * part.element_size()
                yield part, data[begin:end].view(part.dtype).view(part.shape)
                begin = end

    # -- cells: one token's keys or values of one head, wherever they lie ------------------------------------

    def cells(self, layer: int, slots: Tensor) -> Tensor:
        """The cells that hold the keys of slots in one layer, int64: `[Hk, n]` for slots `[n]`, or like slots
        that differ by kv head, `[Hk, n]`, or by query head, `[Hq, n]`.

        A cell is a row of the whole cache seen as `[L * 2 * num_slots * Hk, D]`. Its values lie
        `num_slots * Hk` cells further on.
        """
        heads = self.keys[0].shape[1]
        rows = len(slots) if slots.dim() == 2 else heads
        first = torch.arange(rows, device=slots.device).div_(rows // heads, rounding_mode="floor")
        return torch.add(first[:, None] + 2 * layer * self.num_slots * heads, slots, alpha=heads)

    def read_cells(self, cells: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values at cells `[...]`, each `[..., D]`."""
        return self._read(cells, dtype), self._read(cells + self._behind, dtype)

    def _read(self, cells: Tensor, dtype: torch.dtype) -> Tensor:
        rows = self._data.view(-1, self._data.shape[-1])[cells].to(dtype)
        return rows * self._scales.view(-1)[cells][..., None].to(dtype) if self.quantized else rows

    def copy_cells(self, source: Tensor, target: Tensor) -> None:
        """Copy keys and values between cells `[n]`; all are read before any is written."""
        for flat in (self._data.view(-1, self._data.shape[-1]), self._scales.view(-1)):
            if flat.numel():
                keys, values = flat[source], flat[source + self._behind]
                flat[target] = keys
                flat[target + self._behind] = values

    def write_values(self, cells: Tensor, values: Tensor) -> None:
        """Store values `[n, D]` at cells `[n]`, whose keys stay."""
        self._write(cells + self._behind, values)

    def write_keys(self, cells: Tensor, keys: Tensor) -> None:
        """Store keys `[n, D]` at cells `[n]`, whose values stay."""
        self._write(cells, keys)

    def _write(self, cells: Tensor, rows: Tensor) -> None:
        if self.quantized:
            rows, scales = quantize_heads(rows)
            self._scales.view(-1)[cells] = scales
        self._data.view(-1, self._data.shape[-1])[cells] = rows.to(self._data.dtype)

    @property
    def _behind(self) -> int:
        return self.num_slots * self._data.shape[3]

    # -- pages: a block's keys, or values, of one layer, as bytes --------------------------------------------

    @property
    def pages(self) -> Tensor:
        """The same memory as pages, uint8 `[L * 2 * num_blocks, page_bytes]`: all blocks' keys of the first
        layer, their values, those of the second layer, and so on."""
        return self._data.view(2 * len(self.keys) * self.num_blocks, -1).view(torch.uint8)

    @property
    def page_bytes(self) -> int:
        return self.block_size * self.rows[0].shape[1] * self._data.element_size()

    @property
    def pages_per_block(self) -> int:
        return 2 * len(self.keys)

    def scratch(self, tokens: int) -> KVCache:
        """One layer's room for at least `tokens` tokens beside the cache, where anyone may write anything."""
        if self._scratch is None or self._scratch.num_slots < tokens:
            _, heads, head_dim = self.keys[0].shape
            self._scratch = KVCache(
                1,
                heads,
                head_dim,
                num_blocks=-(-tokens * 5 // 4 // self.block_size) + 1,
                block_size=self.block_size,
                dtype=self.keys[0].dtype,
                device=self.keys[0].device,
            )
        return self._scratch

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self._data, self._scales))


def quantize_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """x `[T, Hk, D]` to int8 and one scale per token and head, float32 `[T, Hk]`."""
    most = x.abs().amax(-1)
    usable = (most > 1e-30) & most.isfinite()
    inverse = torch.where(usable, 127 / most, torch.zeros_like(most))
    q = torch.where(usable[..., None], x * inverse[..., None], torch.zeros_like(x)).round_()
    return q.to(torch.int8), (most / 127).float()


def bytes_per_token(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """KV bytes of one token over all layers."""
    scale_bytes = 4 if dtype == torch.int8 else 0
    return 2 * num_layers * num_kv_heads * (head_dim * dtype.itemsize + scale_bytes)


def default_pool_bytes(device: torch.device, wanted: int) -> int:
    """`wanted` bytes where the machine has twice that to spare, else half of what it has.

    A CUDA device serves the model alone and gives nine tenths of its free memory.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * 0.9)
    return min(wanted, _available_bytes() // 2)


def _available_bytes() -> int:
    """Memory that can be had without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as meminfo:
            fields = dict(line.split(":", 1) for line in meminfo)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
