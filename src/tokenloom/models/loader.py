"""A model as found on disk: configuration, weights and tokenizer, opened together."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenloom.errors import ModelError
from tokenloom.models.catalog import resolve
from tokenloom.models.config import ModelConfig
from tokenloom.models.gguf_file import GGUFFile
from tokenloom.models.weights import GGUFSource, SafetensorsSource, WeightSource
from tokenloom.text.tokenizer import Tokenizer


@dataclass
class ModelFiles:
    """An opened model. `name` is the catalog name or hub id, or the last part
    of a path without its ending; no weight has been read yet."""

    name: str
    path: Path
    config: ModelConfig
    weights: WeightSource
    tokenizer: Tokenizer


def open_model(name_or_path: str) -> ModelFiles:
    """Find a model by path, catalog name or hub id, and open its files.

    Raises ModelError that names what is missing or broken.
    """
    path = resolve(name_or_path)
    weights: WeightSource
    if path.is_dir():
        config = read_config(path)
        weights, tokenizer = SafetensorsSource(path), Tokenizer.from_folder(path)
    else:
        file = GGUFFile(path)
        config = ModelConfig.from_gguf(file)
        weights, tokenizer = GGUFSource(path, file), Tokenizer.from_gguf(file)
    tokenizer.pad_vocabulary(config.vocab_size)
    # A path is nobody's business but this machine's: clients see the model's name in every answer.
    given = Path(name_or_path).expanduser()
    name = (given.stem if given.is_file() else given.resolve().name) if given.exists() else name_or_path
    return ModelFiles(name, path, config, weights, tokenizer)


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a Hugging Face model folder. Raises ModelError naming the file and the key."""
    file, generation = folder / "config.json", folder / "generation_config.json"
    return ModelConfig.from_hf(
        _read_json(file), _read_json(generation) if generation.is_file() else None, file=str(file)
    )


def describe(files: ModelFiles) -> dict[str, Any]:
    """What `tokenloom models show` prints: sizes in bytes, lengths in tokens."""
    config, weights = files.config, files.weights
    stored: Counter[str] = Counter()
    for name in weights.names():
        stored[weights.quantization(name)] += math.prod(weights.shape(name))
    kv_numbers = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    model_files = [files.path] if files.path.is_file() else sorted(files.path.glob("*.safetensors"))
    return {
        "name": files.name,
        "path": str(files.path),
        "architecture": config.architecture,
        "parameters": stored.total(),
        "parameters_by_type": dict(stored.most_common()),
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocabulary": config.vocab_size,
        "context_tokens": config.max_position,
        "file_bytes": sum(file.stat().st_size for file in model_files),
        "kv_bytes_per_token": {"float32": 4 * kv_numbers, "bfloat16": 2 * kv_numbers},
        "has_chat_template": files.tokenizer.chat_template is not None,
    }


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: must hold a JSON object")
    return content
