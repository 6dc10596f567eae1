"""A tiny SentencePiece-like vocabulary, as GGUF metadata and as transformers builds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_CONTROL, _UNKNOWN, _BYTE, _NORMAL = 3, 2, 6, 1
_MERGED = [
    "▁t",
    "he",
    "▁the",
    "in",
    "▁a",
    "er",
    "▁▁",
    "▁▁▁",
    "on",
    "ing",
    "▁w",
    "▁wor",
    "or",
    "ld",
    "▁world",
    "é",
]


def pieces() -> list[tuple[str, float, int]]:
    """(piece, score, type) by id: unknown, bos, eos, 256 bytes, merged pieces, single characters."""
    found: list[tuple[str, float, int]] = [
        ("<unk>", 0.0, _UNKNOWN),
        ("<s>", 0.0, _CONTROL),
        ("</s>", 0.0, _CONTROL),
    ]
    found += [(f"<0x{byte:02X}>", 0.0, _BYTE) for byte in range(256)]
    found += [(piece, -float(rank), _NORMAL) for rank, piece in enumerate(_MERGED)]
    characters = "▁etaoinshrdlucmwfgypbvk.,!ü中"
    found += [(piece, -100.0 - rank, _NORMAL) for rank, piece in enumerate(characters)]
    return found


@dataclass
class Metadata:
    """Stands for an opened GGUF file."""

    path: Path = Path("sp.gguf")
    metadata: dict[str, Any] = field(default_factory=dict)


def gguf_metadata(**changes: Any) -> Metadata:
    """The vocabulary as a GGUF file would hold it, with changes by key (without `tokenizer.ggml.`)."""
    texts, scores, types = zip(*pieces(), strict=True)
    values: dict[str, Any] = {
        "model": "llama",
        "tokens": list(texts),
        "scores": list(scores),
        "token_type": list(types),
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    return Metadata(
        metadata={f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}
    )
