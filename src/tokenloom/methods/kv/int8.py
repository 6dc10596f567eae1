"""Keys and values in 8 bits: a setting of the pool, named here so that it can be part of a spec."""

from __future__ import annotations

from dataclasses import dataclass

from tokenloom.methods.kv.parts import Storage
from tokenloom.methods.registry import method


@method(
    "int8",
    hook="kv",
    title="8-bit keys and values, one scale for each token and head",
    claim="a quarter of float32's bytes, for the whole server",
)
@dataclass(frozen=True)
class Int8(Storage):
    """Asks for a pool in 8 bits. A server's own spec makes it so; a request's can only insist on it."""

    def check(self, max_batch_tokens: int, max_running: int, quantized: bool) -> None:
        if not quantized:
            raise ValueError(
                "the server's cache is not in 8 bits; start it with --kv int8 (cache.dtype=int8)"
            )
