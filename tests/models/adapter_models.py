"""Random adapters of every kind, and the logits of a batch whose rows run through them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tokenloom.batch import BatchBuilder, SegmentKind
from tokenloom.cache.kv_cache import KVCache
from tokenloom.kernels import get_kernels
from tokenloom.models.adapters import Adapter, AdapterConfig, BottleneckConfig, Dims, Ia3Config, LoraConfig
from tokenloom.models.decoder import Decoder
from tokenloom.models.loader import open_model
from tokenloom.models.weight_loader import WeightLoader

BLOCK = 4
CPU = torch.device("cpu")

CONFIGS: dict[str, AdapterConfig] = {
    "lora": LoraConfig(r=3, alpha=5.0),
    "lora ranks": LoraConfig(
        r=4,
        alpha=6.0,
        ranks={"q_proj": 2, "1.q_proj": 5, "0.down_proj": 1},
        alphas={"v_proj": 3.0, "1.v_proj": 7.5, "up_proj": 1.0},
        rslora=True,
    ),
    "lora subset": LoraConfig(r=2, alpha=2.0, targets=("v_proj", "down_proj"), layers=frozenset({1})),
    "lora by layer": LoraConfig(r=2, alpha=3.0, targets=("0.q_proj", "1.k_proj", "gate_proj", "1.o_proj")),
    "ia3": Ia3Config(),
    "ia3 inputs": Ia3Config(
        targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        feedforward=("q_proj", "1.v_proj", "up_proj", "gate_proj", "down_proj"),
    ),
    "bottleneck": BottleneckConfig(size=5, targets=("o_proj", "down_proj"), scale=0.5, activation="gelu"),
    "bottleneck by layer": BottleneckConfig(size=3, targets=("1.o_proj", "down_proj"), activation="silu"),
    "bottleneck relu": BottleneckConfig(size=7),
}


def random_adapter(config: AdapterConfig, dims: Dims, seed: int = 0) -> Adapter:
    """Every parameter is normal with deviation 0.3, around 1 for IA³."""
    adapter = Adapter(config, dims, torch.float64, CPU)
    noise = torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(seed)).double()
    adapter.flat.copy_(0.3 * noise + (config.kind == "ia3"))
    return adapter


@dataclass
class Sequence:
    """Tokens of one sequence and what they run through."""

    ids: list[int]
    adapter: Adapter | None = None


class Runner:
    """A tiny model; every sequence gets its own blocks, whatever else is in the batch."""

    def __init__(self, folder: Path, backend: str) -> None:
        files = open_model(str(folder))
        self.config = files.config
        self.decoder = Decoder(
            self.config, WeightLoader(files.weights, torch.float64, CPU), get_kernels(backend)
        )

    def logits(self, sequences: list[Sequence], chunks: int = 1) -> list[Tensor]:
        """Logits of all rows, `[len(ids), vocab_size]` per sequence; each is run in that many chunks."""
        config = self.config
        heads, width = config.num_kv_heads, config.head_dim
        kv = KVCache(
            config.num_layers,
            heads,
            width,
            num_blocks=64,
            block_size=BLOCK,
            dtype=torch.float64,
            device=CPU,
        )
        rows: list[list[Tensor]] = [[] for _ in sequences]
        done = [0] * len(sequences)
        for chunk in range(chunks):
            builder, lengths = BatchBuilder(CPU), []
            for i, sequence in enumerate(sequences):
                end = len(sequence.ids) if chunk == chunks - 1 else done[i] + len(sequence.ids) // chunks
                start = builder.add(
                    SegmentKind.PREFILL,
                    sequence.ids[done[i] : end],
                    list(range(16 * i, 16 * i + 16)),
                    kv_start=done[i],
                    block_size=BLOCK,
                    contiguous=True,
                    logits="all",
                )
                if sequence.adapter is not None:
                    builder.through(sequence.adapter.layers, start)
                lengths.append(end - done[i])
                done[i] = end
            logits = self.decoder.logits(self.decoder.forward(builder.build(), kv))
            for part, piece in zip(rows, logits.split(lengths), strict=True):
                part.append(piece)
        return [torch.cat(part) for part in rows]


def random_ids(length: int, seed: int = 1) -> list[int]:
    return torch.randint(0, 200, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
