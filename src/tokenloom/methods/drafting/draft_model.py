"""A smaller model guesses: any one with the same tokenizer, or the model itself less some layers."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from tokenloom.batch import BatchBuilder, SegmentKind
from tokenloom.cache.block_pool import BlockPool, OutOfBlocks
from tokenloom.cache.block_table import BlockTable
from tokenloom.cache.kv_cache import KVCache
from tokenloom.engine.draft import Drafter, DraftPlace, Tree, Verified
from tokenloom.errors import ModelError
from tokenloom.methods.registry import method, parse
from tokenloom.models.decoder import Decoder
from tokenloom.models.loader import open_model
from tokenloom.models.weight_loader import Quantize, WeightLoader

_loading = threading.Lock()  # requests are checked on threads of their own
MOST_RESIDENT = 4
"""Each has a cache, and requests choose."""
CHUNK = 256
"""Rows of one pass over a text that the draft model has not read yet."""


@method(
    "draft_model",
    hook="draft",
    title="Fast Inference from Transformers via Speculative Decoding",
    arxiv="2211.17192",
    claim="a smaller model writes a few tokens ahead, and the large one verifies them in one pass",
)
@dataclass(frozen=True)
class DraftModel:
    """Speculative decoding (Leviathan et al., arXiv 2211.17192) with greedy guesses: a smaller model writes
    some tokens ahead. Guesses are its likeliest tokens rather than draws: the large model's own draws decide
    alone.

    Parameters:
        model: a catalog name, folder or GGUF file with the same vocabulary, one of the setting
            `drafting.models` (or of the server's own spec).
        layers: without a model: so many layers of the served model itself, evenly spaced, the first and last
            among them. No weights are copied. An example rather than a good drafter: a model that was not
            trained for it guesses badly without some of its layers.
        tokens: guesses of a pass.
        fixed: verify all guesses in every pass, worth their time or not.
    """

    model: str = ""
    layers: int = 0
    tokens: int = 4
    fixed: bool = False

    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.layers < 0 or not 1 <= self.tokens <= 64:
            raise ValueError(f"layers is {self.layers} and tokens {self.tokens}: tokens must be from 1 to 64")

    def check(self, engine: Any) -> None:
        if bool(self.model) == bool(self.layers):
            raise ValueError("either model or layers must be given")
        if self.layers >= engine.config.num_layers:
            raise ValueError(f"layers is {self.layers}, and the model itself has {engine.config.num_layers}")
        if self.model and self.model not in _allowed(engine):
            raise ValueError(f"model {self.model!r} is not among the setting drafting.models")
        self._resident(engine)

    def drafter(self, place: DraftPlace) -> Drafter:
        return Writer(self, self._resident(place.engine))

    def _resident(self, engine: Any) -> Resident:
        """The draft model, loaded when it is first asked for."""
        shared, key = engine.drafting.shared, ("draft_model", self.model, self.layers)
        with _loading:
            if key not in shared:
                if sum(isinstance(kept, Resident) for kept in shared.values()) >= MOST_RESIDENT:
                    raise ValueError(
                        f"{MOST_RESIDENT} draft models are in memory already, and no more may be"
                    )
                shared[key] = Resident(self._decoder(engine), engine)
            found: Resident = shared[key]
        return found

    def _decoder(self, engine: Any) -> Decoder:
        if not self.model:
            return _fewer_layers(engine.decoder, self.layers)
        try:
            return _load(engine, self.model)
        except ModelError as error:
            raise ValueError(str(error)) from error


def _allowed(engine: Any) -> set[str]:
    """A request must not make the server read whatever path it names."""
    own = [
        part.model
        for entry, part in parse(engine.settings.methods.draft, "draft")
        if entry.make is DraftModel
    ]
    return {*engine.settings.drafting.models, *own}


def _load(engine: Any, name: str) -> Decoder:
    files = open_model(name)
    if files.config.vocab_size != engine.config.vocab_size:
        raise ModelError(
            f"{files.name} has a vocabulary of {files.config.vocab_size} tokens, and {engine.name} one of "
            f"{engine.config.vocab_size}"
        )
    sample = range(0, files.config.vocab_size, 97)
    if any(files.tokenizer.token_bytes(i) != engine.tokenizer.token_bytes(i) for i in sample):
        raise ModelError(f"{files.name} has another vocabulary than {engine.name}")
    quantize: Quantize = "none" if engine.decoder.fused is None else "auto"
    load = WeightLoader(files.weights, engine.dtype, engine.device, quantize)
    return Decoder(files.config, load, engine.decoder.kernels)


def _fewer_layers(decoder: Decoder, count: int) -> Decoder:
    """The same weights, some layers left out."""
    last = len(decoder.layers) - 1
    chosen = [round(i * last / max(1, count - 1)) for i in range(count)]
    smaller = copy.copy(decoder)
    smaller.layers = [decoder.layers[i] for i in chosen]
    smaller.config = replace(decoder.config, num_layers=count)
    smaller.fused = decoder.kernels.fuse(smaller.config, smaller.layers)
    return smaller


class Resident:
    """A draft model with a cache of its own, which holds as many tokens as the large one's."""

    def __init__(self, decoder: Decoder, engine: Any) -> None:
        config = decoder.config
        self.decoder = decoder
        self.pool = BlockPool(engine.pool.num_blocks, engine.pool.block_size)
        self.kv = KVCache(
            config.num_layers,
            config.num_kv_heads,
            config.head_dim,
            num_blocks=engine.pool.num_blocks,
            block_size=engine.pool.block_size,
            dtype=engine.dtype,
            device=engine.device,
        )

    @property
    def num_bytes(self) -> int:
        """Of its cache. Its weights are the large model's, or those of a model that was asked for."""
        return self.kv.num_bytes

    def next_token(self, table: BlockTable, tokens: list[int], start: int) -> int:
        """Compute `tokens[start:]` and say which is the most likely to follow."""
        table.grow(len(tokens))
        hidden = None
        for first in range(start, len(tokens), CHUNK):
            rows = tokens[first : first + CHUNK]
            builder = BatchBuilder(self.decoder.device)
            builder.add(
                SegmentKind.PREFILL,
                rows,
                table.blocks,
                kv_start=first,
                block_size=self.pool.block_size,
                contiguous=table.contiguous,
            )
            hidden = self.decoder.forward(builder.build(), self.kv)
        assert hidden is not None
        return int(self.decoder.logits(hidden[-1:]).argmax())


class Writer:
    """What the draft model has read of one sequence, and what it would write next."""

    wants = 0

    def __init__(self, knobs: DraftModel, resident: Resident) -> None:
        self.knobs, self.resident, self.fixed = knobs, resident, knobs.fixed
        self.table = BlockTable(resident.pool)
        self.read: list[int] = []
        self.certain = 0
        """Tokens of `read` that are known to be the text's own: the others were guesses."""

    def propose(self, tokens: list[int], most: int) -> Tree:
        known = self.certain
        while known < min(len(self.read), len(tokens) - 1) and self.read[known] == tokens[known]:
            known += 1
        known = min(known, len(tokens) - 1)
        text, tree, parent = list(tokens), Tree(), -1
        most = min(most, self.knobs.tokens, self.resident.decoder.config.max_position - len(tokens))
        try:
            for i in range(most):
                token = self.resident.next_token(self.table, text, known)
                known = len(text)
                text.append(token)
                parent = tree.add(token, parent, ("draft_model", self.knobs.model, self.knobs.layers, i))
        except OutOfBlocks:
            pass  # others have the cache: fewer guesses, or none
        self.read, self.certain = text[:known], min(known, len(tokens))
        return tree

    def glance(self, tokens: list[int], most: int) -> Tree:
        return Tree()  # every guess is a pass of its own

    def learn(self, verified: Verified) -> None:
        """It knows what it knows."""

    def close(self) -> None:
        self.table.clear()
