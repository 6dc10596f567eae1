"""Which cached tokens are read and kept: KV methods, and the specs that combine them."""

from tokenloom.methods.kv import (
    adakv,
    fasa,
    int8,
    keydiff,
    keyformer,
    kivi,
    knorm,
    kvsharer,
    merge,
    palu,
    pyramid,
    quest,
    random_tokens,
    snapkv,
    spatten,
    streaming,
    token_sparse,
    tokenselect,
)
from tokenloom.methods.kv.combination import Combination, combine
from tokenloom.methods.kv.plain_scorer import from_press, scorer

__all__ = [
    "Combination",
    "adakv",
    "combine",
    "fasa",
    "from_press",
    "int8",
    "keydiff",
    "keyformer",
    "kivi",
    "knorm",
    "kvsharer",
    "merge",
    "palu",
    "pyramid",
    "quest",
    "random_tokens",
    "scorer",
    "snapkv",
    "spatten",
    "streaming",
    "token_sparse",
    "tokenselect",
]
