"""In which directions a layer's keys and values vary most (Palu, arXiv 2407.21118: Section 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tokenloom.cache.cached_tokens import CachedTokens, CosSin
from tokenloom.cache.policy import KVPolicy, SequenceShape
from tokenloom.engine.engine import Engine
from tokenloom.errors import RequestError
from tokenloom.methods.calibration import observe, passages, shape_of, store
from tokenloom.methods.kv.rotation import turned


class Moments(KVPolicy):
    """Sums x x' of all keys before RoPE, and of all values, over rows: float64 `[2, L, C, C]`, C = Hk * D."""

    def __init__(self, shape: SequenceShape, cos_sin: CosSin) -> None:
        self.cos_sin = cos_sin
        width = shape.num_kv_heads * shape.head_dim
        self.sums = torch.zeros(2, shape.num_layers, width, width, dtype=torch.float64)

    def attend(self, layer: int, q: Tensor, cached: CachedTokens) -> None:
        begin = cached.length - len(q)
        positions = torch.arange(cached.start, cached.start + len(q), device=q.device)
        rotated = cached.keys(layer, begin).double()
        keys = turned(rotated, positions, torch.zeros_like(positions), self.cos_sin)
        for i, x in enumerate((keys, cached.values(layer, begin).double())):
            rows = x.flatten(1)
            self.sums[i, layer] += (rows.t() @ rows).cpu()

    def bases(self, groups: int) -> Tensor:
        """Eigenvectors by falling eigenvalue, `[2, L, groups, C / groups, C / groups]`, in columns."""
        size = self.sums.shape[-1] // groups
        blocks = [self.sums[..., i : i + size, i : i + size] for i in range(0, size * groups, size)]
        return torch.linalg.eigh(torch.stack(blocks, 2)).eigenvectors.flip(-1)

    def kept(self, ratio: float) -> Tensor:
        """The part of keys' and values' squares that so much of the rank holds, by layer, `[2, L]`."""
        values = torch.linalg.eigvalsh(self.sums).flip(-1)
        return values[..., : max(1, round(ratio * values.shape[-1]))].sum(-1) / values.sum(-1)


def calibrate(
    engine: Engine,
    text: Path | None = None,
    *,
    num_passages: int = 4,
    tokens: int = 2048,
    groups: Sequence[int] = (1,),
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[Path, Moments]:
    """Find the bases, and keep them where `palu` finds them.

    Args:
        text: UTF-8; None: see `calibration.passages`.
        groups: for each of these numbers of groups of kv heads.
        progress: told after each passage how many are done.

    Returns:
        The file, and what was summed.

    Raises:
        RequestError: the text, the context or the pool is too small; kv heads cannot be split into so many
            groups.
    """
    shape = shape_of(engine, tokens)
    moments = Moments(shape, engine.decoder.rope.cos_sin)
    bad = next((g for g in groups if g < 1 or engine.config.num_kv_heads % g), None)
    if bad is not None:
        raise RequestError(f"groups: {engine.config.num_kv_heads} kv heads cannot be split into {bad}")
    found = passages(engine, text, num_passages, tokens)
    with torch.inference_mode():
        for i, passage in enumerate(found):
            observe(engine, passage, moments)
            progress(i + 1)
        bases = {g: moments.bases(g).float() for g in groups}
    measured = {
        f"{part}_{g}": found[i].contiguous()
        for g, found in bases.items()
        for i, part in enumerate(("keys", "values"))
    }
    about = {
        "model": engine.name,
        "text": str(text) if text else "Python's standard library",
        "made": f"tokenloom calibrate palu: {num_passages} passages of {tokens} tokens",
    }
    return store("palu", shape, measured, about), moments
