"""Which cached tokens are read and kept: KV methods, and the specs that combine them."""

from tokenloom.methods.kv import (
    adakv,
    int8,
    keydiff,
    keyformer,
    merge,
    pyramid,
    quest,
    random_tokens,
    snapkv,
    spatten,
    streaming,
    tokenselect,
)
from tokenloom.methods.kv.combination import Combination, combine

__all__ = [
    "Combination",
    "adakv",
    "combine",
    "int8",
    "keydiff",
    "keyformer",
    "merge",
    "pyramid",
    "quest",
    "random_tokens",
    "snapkv",
    "spatten",
    "streaming",
    "tokenselect",
]
