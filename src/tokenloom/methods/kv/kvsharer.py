"""KVSharer: some layers read the keys and values of other, dissimilar layers, and store none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenloom.cache.cached_tokens import CachedTokens
from tokenloom.cache.policy import KVPolicy, SequenceShape
from tokenloom.errors import RequestError
from tokenloom.methods.calibration import load
from tokenloom.methods.kv.budget import at_least
from tokenloom.methods.kv.packing import Packing
from tokenloom.methods.kv.parts import Packer
from tokenloom.methods.registry import method


@method(
    "kvsharer",
    hook="kv",
    title="KVSharer: Efficient Inference via Layer-Wise Dissimilar KV Cache Sharing",
    arxiv="2410.18517",
    claim="keys and values of some layers stand in for those of others",
)
@dataclass(frozen=True)
class KVSharer(Packer):
    """`tokenloom calibrate kvsharer` tries pairs of layers from the most dissimilar down, once per model.

    Shared layers compute keys and values that nobody reads; their memory is given back when tokens are
    packed: the prompt's when it is complete, the answer's block by block.

    Attributes:
        layers: how many layers are shared: the first ones of the calibrated map.
        map: pairs (layer, earlier layer that it reads) instead of the calibrated ones: map=[[5,2],[7,3]].
    """

    conflicts: ClassVar = {
        **Packer.conflicts,
        "scorer": "a scorer chooses by each layer's own keys, and shared layers have none",
    }

    layers: int = 4
    map: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        at_least(0, layers=self.layers)
        pairs = tuple(tuple(pair) if isinstance(pair, list) else pair for pair in self.map)
        if any(not isinstance(pair, tuple) or [type(i) for i in pair] != [int, int] for pair in pairs):
            raise ValueError(f"map must be pairs like [[5,2],[7,3]], not {list(self.map)}")
        bad = next((pair for pair in pairs if not 0 <= pair[1] < pair[0]), None)
        if bad is not None:
            raise ValueError(f"map: {list(bad)}: a layer reads an earlier one")
        if len({layer for layer, _ in pairs}) < len(pairs):
            raise ValueError(f"map: a layer is named twice in {list(map(list, pairs))}")
        object.__setattr__(self, "map", pairs)

    @property
    def changes_prompt(self) -> bool:
        return bool(self.map or self.layers)

    def policy(self, shape: SequenceShape) -> KVPolicy:
        pairs = self.map
        if not pairs and self.layers:
            known = [(int(a), int(b)) for a, b in load("kvsharer", shape)["pairs"].tolist()]
            if self.layers > len(known):
                raise RequestError(
                    f"kv: kvsharer: layers is {self.layers}; calibration found {len(known)} to share "
                    f"(tokenloom calibrate kvsharer --layers {self.layers})",
                    param="kv",
                )
            pairs = tuple(known[: self.layers])
        if any(layer >= shape.num_layers for layer, _ in pairs):
            raise RequestError(f"kv: kvsharer: map: this model has {shape.num_layers} layers", param="kv")
        return Sharing(shape, roots(pairs, shape.num_layers)) if pairs else KVPolicy()


def roots(pairs: Sequence[tuple[int, int]], num_layers: int) -> list[int]:
    """Whose cache each layer reads: its own, or, through chains of pairs, another's."""
    reads = dict(pairs)
    found: list[int] = []
    for layer in range(num_layers):
        found.append(found[reads[layer]] if layer in reads else layer)
    return found


class Sharing(Packing):
    """Layer i reads what `roots[i]` has cached; only layers that are read are packed."""

    def __init__(self, shape: SequenceShape, roots: Sequence[int]) -> None:
        numbers = 2 * shape.num_kv_heads * shape.head_dim
        codec = WholeTokens(sorted(set(roots)), numbers)
        super().__init__(shape, lambda cached: codec, residual=0)
        self.roots = roots

    def attends(self, start: int, stop: int) -> bool:
        return True

    def attend(self, layer: int, q: Tensor, cached: CachedTokens) -> Tensor | None:
        root = self.roots[layer]
        return None if root == layer else cached.attend(root, q)


class WholeTokens:
    """See `cache.packed_tokens.Codec`: every number of some layers, as it is, `numbers` of a token."""

    group = 1
    basis: Tensor | None = None

    def __init__(self, layers: Sequence[int], numbers: int) -> None:
        self.layers = layers
        self.numbers = numbers

    def num_bytes(self, tokens: int, item_bytes: int) -> int:
        return tokens * self.numbers * item_bytes

    def encode(self, layer: int, first: int, keys: Tensor, values: Tensor) -> Tensor:
        return torch.stack((keys, values), 1).flatten().view(torch.uint8)

    def decode(self, layer: int, data: Tensor, keys: Tensor, values: Tensor) -> None:
        both = data.view(keys.dtype).view(len(keys), 2, *keys.shape[1:])
        keys.copy_(both[:, 0])
        values.copy_(both[:, 1])
