"""Which frequency chunks of a head rank tokens like the whole head (FASA, arXiv 2602.03152: Section 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tokenloom.cache.cached_tokens import CachedTokens
from tokenloom.cache.policy import KVPolicy
from tokenloom.engine.engine import Engine
from tokenloom.methods.calibration import observe, passages, shape_of, store

CHUNKINGS = ("pair", "adjacent")
SIZES = (64, 256, 1024)
"""K, of how many top tokens agreement is measured. A head's best chunks hardly differ between neighbours."""


def chunk_dims(head_dim: int, chunking: str) -> Tensor:
    """The two dimensions of every chunk, `[D / 2, 2]`.

    pair: those that RoPE turns together, (j, j + D/2). adjacent: (2j, 2j + 1), as in the released code, which
    under half-split RoPE are halves of two pairs.
    """
    half = torch.arange(head_dim // 2)
    if chunking == "pair":
        return torch.stack((half, half + head_dim // 2), 1)
    return torch.stack((2 * half, 2 * half + 1), 1)


def chunk_logits(q: Tensor, keys: Tensor, chunking: str) -> Tensor:
    """What each chunk adds to q . k: q `[Hq, D]`, keys `[n, Hk, D]` -> `[Hq, D / 2, n]`."""
    first, second = chunk_dims(q.shape[1], chunking).to(q.device).unbind(1)
    by_head = keys.permute(1, 2, 0).repeat_interleave(len(q) // keys.shape[1], 0)  # [Hq, D, n]
    products = by_head.mul_(q[..., None])
    return products[:, first].add_(products[:, second])


def agreement(q: Tensor, keys: Tensor, chunking: str, sizes: Sequence[int]) -> Tensor:
    """CA: the share of the head's top K tokens that are among a chunk's own top K, `[sizes, Hq, D / 2]`."""
    by_chunk = chunk_logits(q, keys, chunking)
    whole = by_chunk.sum(1)
    # What the K-th largest is: sorting values alone is a tenth of the work of finding the tokens.
    least = [torch.from_numpy(np.sort(x.cpu().numpy(), -1)).to(q.device) for x in (by_chunk, whole)]
    found = []
    for k in sizes:
        chunk_top, whole_top = by_chunk >= least[0][..., -k, None], whole >= least[1][..., -k, None]
        found.append((chunk_top & whole_top[:, None]).sum(-1) / k)
    return torch.stack(found)


@dataclass
class Observer(KVPolicy):
    """Sums agreement over some rows of a prompt: each is what a decode step at its position would be."""

    rows_at: frozenset[int]
    sizes: Sequence[int]
    num_layers: int
    sums: dict[str, dict[int, Tensor]] = field(default_factory=lambda: {c: {} for c in CHUNKINGS})
    count: int = 0

    def attend(self, layer: int, q: Tensor, cached: CachedTokens) -> None:
        for row in range(len(q)):
            position = cached.start + row
            if position not in self.rows_at:
                continue
            keys = cached.keys(layer)[: position + 1].float()
            for chunking, sums in self.sums.items():
                found = agreement(q[row].float(), keys, chunking, self.sizes)
                sums[layer] = sums[layer] + found if layer in sums else found
            self.count += layer == 0

    def mean(self, chunking: str) -> Tensor:
        """`[sizes, L, D / 2, Hq]`."""
        layers = [self.sums[chunking][i] for i in range(self.num_layers)]
        return torch.stack(layers, 1).transpose(2, 3) / self.count


@dataclass(frozen=True)
class Calibrated:
    """Attributes: path, where the table lies; best, mean: CA at `size` of a head's best chunk and of any one;
    chance: what a chunk that knows nothing has."""

    path: Path
    size: int
    best: float
    mean: float
    chance: float


def calibrate(
    engine: Engine,
    text: Path | None = None,
    *,
    num_passages: int = 4,
    tokens: int = 2048,
    rows: int = 16,
    progress: Callable[[int], None] = lambda done: None,
) -> Calibrated:
    """Measure CA of every layer, head and chunk, and keep the table where `fasa` finds it.

    Args:
        text: UTF-8; None: see `calibration.passages`.
        num_passages, tokens: of the text; rows: observed in each, spread over its second half.
        progress: told after each passage how many are done.

    Raises:
        RequestError: the text, the context or the pool is too small.
    """
    found = passages(engine, text, num_passages, tokens)
    sizes = tuple(k for k in SIZES if k < tokens // 2) or (max(1, tokens // 8),)
    at = torch.linspace(tokens // 2, tokens - 1, rows).long().tolist()
    observer = Observer(frozenset(at), sizes, engine.config.num_layers)
    with torch.inference_mode():
        for i, passage in enumerate(found):
            observe(engine, passage, observer)
            progress(i + 1)
    measured = {c: _bytes(observer.mean(c)) for c in CHUNKINGS}
    about = {
        "model": engine.name,
        "text": str(text) if text else "Python's standard library",
        "made": f"tokenloom calibrate fasa: {num_passages} passages of {tokens} tokens, {rows} rows of each",
    }
    path = store("fasa", shape_of(engine, tokens), {**measured, "sizes": torch.tensor(sizes)}, about)
    at_size = min(range(len(sizes)), key=lambda i: abs(sizes[i] - 256))
    table = observer.mean("pair")[at_size]
    chance = sum(sizes[at_size] / (p + 1) for p in observer.rows_at) / len(observer.rows_at)
    return Calibrated(path, sizes[at_size], float(table.amax(1).mean()), float(table.mean()), chance)


def _bytes(agreement: Tensor) -> Tensor:
    """As 255ths: the measurement's own error is larger."""
    return (agreement * 255).round().to(torch.uint8).contiguous().cpu()
