"""Options that commands share, and what they make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from tokenloom.config import Settings, load_settings

if TYPE_CHECKING:
    from tokenloom.llm import LLM

out, err = Console(), Console(stderr=True)

# Options that several commands share. Everything else in the settings tree goes through --set.
Model = Annotated[str | None, typer.Option("--model", "-m", help="Catalog name, folder or .gguf file.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16 or float64.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.")]
Quantize = Annotated[
    str | None, typer.Option(help="Weights in memory: auto (as stored), none (in dtype), q8 or q4.")
]
Backend = Annotated[
    str | None, typer.Option(help="auto, cpu (native), torch or reference (same tokens in any batch).")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; 0 takes torch's own choice.")]
KV = Annotated[
    str | None, typer.Option("--kv", help='Cached tokens kept and read, e.g. "snapkv(budget=1024)+int8".')
]
Draft = Annotated[
    str | None, typer.Option("--draft", help='Tokens guessed ahead, e.g. "token_recycling+ngram"; same text.')
]
Config = Annotated[Path | None, typer.Option("--config", "-c", help="A TOML file of settings.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Any setting as KEY=VALUE, e.g. cache.block_size=32.")
]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option(help="0 picks the most likely token.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
AdapterFolder = Annotated[Path | None, typer.Option("--adapter", "-a", help="A PEFT adapter's folder.")]


def model_flags(
    model: str | None,
    dtype: str | None,
    device: str | None,
    quantize: str | None,
    backend: str | None,
    threads: int | None,
) -> dict[str, Any]:
    return {
        "model.name": model,
        "model.dtype": dtype,
        "model.device": device,
        "model.quantize": quantize,
        "model.backend": backend,
        "model.threads": threads,
    }


def read_settings(flags: dict[str, Any], config: Path | None, extra: list[str] | None) -> Settings:
    return load_settings({**flags, **pairs(extra, "--set")}, config)


def pairs(items: list[str] | None, option: str) -> dict[str, Any]:
    """KEY=VALUE items; a value that is JSON is read as such."""
    found: dict[str, Any] = {}
    for item in items or []:
        key, equals, value = item.partition("=")
        if not equals:
            raise typer.BadParameter(f"{item!r} is not KEY=VALUE", param_hint=option)
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found


def fetch(name: str) -> None:
    """Pull a catalog model that is not on this machine yet."""
    from tokenloom.models.catalog import entries, pull

    if any(entry.name == name and not entry.is_pulled() for entry in entries()):
        pull(name)


def open_llm(flags: dict[str, Any], config: Path | None, extra: list[str] | None) -> LLM:
    from tokenloom.llm import LLM

    settings = read_settings(flags, config, extra)
    fetch(settings.model.name)
    with err.status(f"loading {settings.model.name}"):
        return LLM.from_settings(settings)
