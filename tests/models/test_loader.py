"""Opening a whole model: from a folder, from GGUF, by the default's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny_models import VOCAB_SIZE, build_tiny, write_gguf
from tokenloom.errors import ModelError
from tokenloom.models.catalog import DEFAULT_MODEL
from tokenloom.models.loader import describe, open_model


def test_folder_and_gguf_open_as_the_same_model(tmp_path: Path) -> None:
    folder, model = build_tiny(tmp_path, "llama")
    ours, other = open_model(str(folder)), open_model(str(write_gguf(tmp_path / "m.gguf", model)))
    assert set(ours.weights.names()) == set(other.weights.names())
    text = "the <|im_start|>thing"
    assert ours.tokenizer.encode(text) == other.tokenizer.encode(text)
    messages = [{"role": "user", "content": "hi"}]
    assert ours.tokenizer.render_chat(messages) == other.tokenizer.render_chat(messages)


def test_ids_beyond_the_tokenizer_decode_to_nothing(tmp_path: Path) -> None:
    folder, _ = build_tiny(tmp_path, "llama", vocab_size=VOCAB_SIZE + 32)
    tokenizer = open_model(str(folder)).tokenizer
    assert tokenizer.vocab_size == VOCAB_SIZE + 32
    assert tokenizer.decode([104, VOCAB_SIZE + 31, 105]) == "hi"


def test_describe_counts(tmp_path: Path) -> None:
    folder, model = build_tiny(tmp_path, "qwen2")
    found = describe(open_model(str(folder)))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert found["parameters"] == parameters
    assert found["parameters_by_type"] == {"F64": parameters}
    assert found["file_bytes"] == (folder / "model.safetensors").stat().st_size > 8 * parameters
    assert found["kv_bytes_per_token"] == {"float32": 2 * 2 * 2 * 16 * 4, "bfloat16": 2 * 2 * 2 * 16 * 2}
    assert (found["layers"], found["heads"], found["context_tokens"]) == (2, 4, 512)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    folder, _ = build_tiny(tmp_path, "llama")
    (folder / name).unlink()
    with pytest.raises(ModelError, match=name):
        open_model(str(folder))


@pytest.mark.default_model
def test_the_default_model_opens_by_name(default_model: Path) -> None:
    found = describe(open_model(DEFAULT_MODEL))
    assert found["parameters"] == 134_515_008
    assert found["parameters_by_type"] == {"Q4_1": 106_168_320, "Q8_0": 28_311_552, "F32": 35_136}
    assert found["kv_bytes_per_token"]["float32"] == 46_080
