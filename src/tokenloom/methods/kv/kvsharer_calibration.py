"""Which layers can read the cache of which others (KVSharer, arXiv 2410.18517: Section 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenloom.cache.cached_tokens import CachedTokens
from tokenloom.cache.policy import KVPolicy
from tokenloom.engine.engine import Engine
from tokenloom.methods.calibration import observe, passages, shape_of, store
from tokenloom.methods.kv.kvsharer import Sharing, roots


@dataclass
class Sums(KVPolicy):
    """Adds up keys and values of passages, position by position: by layer `[n, 2, Hk, D]`."""

    layers: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, layer: int, q: Tensor, cached: CachedTokens) -> None:
        new = torch.stack((cached.keys(layer), cached.values(layer)), 1).float()
        self.layers[layer] = self.layers[layer] + new if layer in self.layers else new

    def distances(self) -> Tensor:
        """Euclidean, between the layers' means up to one factor, `[L, L]`."""
        flat = torch.stack([self.layers[i].flatten() for i in range(len(self.layers))]).double()
        return torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")


@dataclass
class LastHidden:
    """What the last layer puts out, rows of one pass: a `Tap`."""

    num_layers: int
    rows: slice = field(default_factory=lambda: slice(0, 0))
    sites: frozenset[str] = frozenset({"input"})
    value: Tensor = field(default_factory=lambda: torch.empty(0))

    def save(self, layer: int, site: str, value: Tensor) -> None:
        if layer == self.num_layers:
            self.value = value.clone()

    def units(self) -> dict[str, Tensor] | None:
        return {}


@dataclass(frozen=True)
class Shared:
    """Attributes: path, where the map lies; pairs: (layer, whose cache it reads), in the order in which they
    were accepted; cosines: of the final hidden states to the model's own, with the pairs so far; tried: how
    many pairs were."""

    path: Path
    pairs: list[tuple[int, int]]
    cosines: list[float]
    tried: int


def calibrate(
    engine: Engine,
    text: Path | None = None,
    *,
    layers: int = 4,
    num_passages: int = 30,
    tokens: int = 64,
    cosine: float = 0.5,
    progress: Callable[[int], None] = lambda found: None,
) -> Shared:
    """Try pairs from the most dissimilar down, and keep the map where `kvsharer` finds it.

    Args:
        text: UTF-8; None: see `calibration.passages`.
        layers: stop when so many are shared.
        num_passages, tokens: of the text (the paper's 30 of 64).
        cosine: a pair is accepted while final hidden states are that similar, a mean over all rows.
        progress: told after each accepted pair how many there are.

    Raises:
        RequestError: the text, the context or the pool is too small.
    """
    shape = shape_of(engine, tokens)
    found = passages(engine, text, num_passages, tokens)
    with torch.inference_mode():
        sums = Sums()
        original = [_hidden(engine, passage, sums) for passage in found]
        pairs: list[tuple[int, int]] = []
        cosines: list[float] = []
        tried = 0
        for layer, root in by_distance(sums.distances()):
            if len(pairs) == layers:
                break
            if layer in dict(pairs):
                continue
            tried += 1
            policy = Sharing(shape, roots([*pairs, (layer, root)], shape.num_layers))
            similar = [
                F.cosine_similarity(_hidden(engine, passage, policy), before, dim=-1).mean()
                for passage, before in zip(found, original, strict=True)
            ]
            if (mean := float(torch.stack(similar).mean())) > cosine:
                pairs.append((layer, root))
                cosines.append(mean)
                progress(len(pairs))
    about = {
        "model": engine.name,
        "text": str(text) if text else "Python's standard library",
        "made": f"tokenloom calibrate kvsharer: {num_passages} passages of {tokens} tokens, cosine {cosine}",
    }
    measured = {"pairs": torch.tensor(pairs).view(-1, 2), "cosines": torch.tensor(cosines)}
    return Shared(store("kvsharer", shape, measured, about), pairs, cosines, tried)


def by_distance(distances: Tensor) -> list[tuple[int, int]]:
    """All pairs (layer, earlier layer), the farthest first: distances `[L, L]`."""
    pairs = [(i, j) for i in range(len(distances)) for j in range(i)]
    return sorted(pairs, key=lambda pair: -float(distances[pair]))


def _hidden(engine: Engine, passage: Sequence[int], policy: KVPolicy) -> Tensor:
    """The final hidden states of a short passage, `[n, hidden_size]`."""
    tap = LastHidden(engine.config.num_layers)
    observe(engine, passage, policy, [tap])
    return engine.decoder.kernels.rms_norm(tap.value, engine.decoder.norm, engine.config.rms_norm_eps).float()
