"""Tiny quantised models whose layers run in one native call, and by operators."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiny_models import build_tiny
from tokenloom.batch import Batch, BatchBuilder, SegmentKind
from tokenloom.cache.kv_cache import KVCache
from tokenloom.kernels import get_kernels, native
from tokenloom.models.decoder import Decoder
from tokenloom.models.loader import open_model
from tokenloom.models.weight_loader import Quantize, WeightLoader

CPU = torch.device("cpu")
BLOCK = 4
ISAS = native.isas() if native is not None else []
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "multi-head": ("llama", {"num_key_value_heads": 4}),
    "one kv head": ("llama", {"num_key_value_heads": 1}),
    "sliding window": ("mistral", {}),
    "qkv bias": ("qwen2", {}),
    "qk norm": ("qwen3", {}),
    "wide heads": ("llama", {"head_dim": 32}),
}
IDS = torch.randint(0, 200, (40,), generator=torch.Generator().manual_seed(1)).tolist()


@dataclass
class Runner:
    decoder: Decoder

    def cache(self, dtype: torch.dtype = torch.float32, num_blocks: int = 64) -> KVCache:
        config = self.decoder.config
        sizes = (config.num_layers, config.num_kv_heads, config.head_dim)
        return KVCache(*sizes, num_blocks=num_blocks, block_size=BLOCK, dtype=dtype, device=CPU)

    def forward(self, batch: Batch, kv: KVCache) -> Tensor:
        return self.decoder.logits(self.decoder.forward(batch, kv))

    def logits(self, chunks: list[int], kv_dtype: torch.dtype = torch.float32) -> Tensor:
        """Of IDS, `[40, V]`, so many tokens at a time."""
        kv, at, rows = self.cache(kv_dtype), 0, []
        for length in chunks:
            rows.append(self.forward(batch_of([(IDS[at : at + length], at, list(range(3, 14)))]), kv))
            at += length
        return torch.cat(rows)

    def op_by_op(self) -> Runner:
        self.decoder.fused = None
        return self


def batch_of(parts: list[tuple[list[int], int, list[int]]]) -> Batch:
    """parts: tokens, how many came before them, and blocks of each sequence."""
    builder = BatchBuilder(CPU)
    for tokens, past, blocks in parts:
        builder.add(
            SegmentKind.PREFILL,
            tokens,
            blocks,
            kv_start=past,
            block_size=BLOCK,
            contiguous=False,
            logits="all",
        )
    return builder.build()


def build_runner(
    folder: Path,
    family: str = "llama",
    quantize: Quantize = "q8",
    backend: str = "cpu",
    source: Path | None = None,
) -> Runner:
    """The tiny model of a family, or of a file."""
    if source is None:
        architecture, overrides = FAMILIES[family]
        source, _ = build_tiny(folder, architecture, torch.float32, **overrides)
    files = open_model(str(source))
    load = WeightLoader(files.weights, torch.float32, CPU, quantize)
    return Runner(Decoder(files.config, load, get_kernels(backend)))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Up to an activation here and there that is rounded the other way."""
    rows = (actual - expected).abs().amax(-1) / expected.std()
    assert rows.sort().values[3] < 1e-5  # not one that only reads itself
    assert rows.max() < 0.15
