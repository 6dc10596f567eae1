"""Reading config.json of both transformers generations, and naming what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tiny_models import EOS_ID, build_tiny, tiny_config, write_gguf
from tokenloom.errors import ModelError
from tokenloom.models.config import ModelConfig
from tokenloom.models.gguf_file import GGUFFile
from tokenloom.models.loader import read_config


def _hf(architecture: str = "llama", **overrides: Any) -> dict[str, Any]:
    config = tiny_config(architecture).to_dict()
    config.pop("layer_types", None)
    return {**config, **overrides}


def test_transformers_4_and_5_say_the_same() -> None:
    new = _hf(rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0})
    old = _hf(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0}, torch_dtype="bfloat16")
    del old["rope_parameters"], old["dtype"]
    new["dtype"] = "bfloat16"
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)
    assert ModelConfig.from_hf(old).rope.theta == 5e5


def test_rope_scaling_extends_the_context_where_configs_keep_the_unscaled_one() -> None:
    def limit(**rope: Any) -> int:
        return ModelConfig.from_hf(_hf(rope_parameters={"rope_theta": 1e4, **rope})).max_position

    assert limit(rope_type="linear", factor=4.0) == 2048
    assert limit(rope_type="dynamic", factor=2.0) == 1024
    assert limit(rope_type="yarn", factor=4.0, original_max_position_embeddings=512) == 2048
    assert limit(rope_type="yarn", factor=4.0, original_max_position_embeddings=128) == 512
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    assert limit(rope_type="llama3", factor=8.0, **llama3) == 512


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_qwen_slides_from_max_window_layers_on(architecture: str) -> None:
    config = _hf(
        architecture, num_hidden_layers=4, use_sliding_window=True, sliding_window=8, max_window_layers=3
    )
    assert ModelConfig.from_hf(config).sliding_windows == (None, None, None, 8)
    config["use_sliding_window"] = False
    assert ModelConfig.from_hf(config).sliding_windows == (None,) * 4


def test_layer_types_decide_where_given() -> None:
    types = ["sliding_attention", "full_attention"]
    config = _hf("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0, layer_types=types)
    assert ModelConfig.from_hf(config).sliding_windows == (8, None)


def test_mistral_slides_everywhere_and_llama_nowhere() -> None:
    assert ModelConfig.from_hf(_hf("mistral")).sliding_windows == (8, 8)
    assert ModelConfig.from_hf(_hf("mistral", sliding_window=None)).sliding_windows == (None, None)
    assert ModelConfig.from_hf(_hf("llama", sliding_window=8)).sliding_windows == (None, None)


def test_biases_and_norms_follow_the_architecture() -> None:
    def options(architecture: str, **overrides: Any) -> tuple[bool, bool, bool, bool]:
        config = ModelConfig.from_hf(_hf(architecture, **overrides))
        return config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm

    biases = {"attention_bias": True, "mlp_bias": True}
    assert options("llama") == (False, False, False, False)
    assert options("llama", **biases) == (True, True, True, False)
    assert options("mistral", **biases) == (False, False, False, False)
    assert options("qwen2", **biases) == (True, False, False, False)
    assert options("qwen3") == (False, False, False, True)
    assert options("qwen3", **biases) == (True, True, False, True)


def test_generation_config_says_where_to_stop() -> None:
    config = ModelConfig.from_hf(_hf(), {"eos_token_id": [5, 7], "bos_token_id": None})
    assert config.eos_token_ids == (5, 7)
    assert config.bos_token_id == 257
    assert ModelConfig.from_hf(_hf(), None).eos_token_ids == (EOS_ID,)


def test_missing_options_take_the_architectures_defaults() -> None:
    config = _hf()
    for key in ("head_dim", "num_key_value_heads", "rope_parameters", "tie_word_embeddings", "hidden_act"):
        del config[key]
    read = ModelConfig.from_hf(config)
    assert (read.head_dim, read.num_kv_heads, read.rope.theta, read.tie_word_embeddings) == (
        16,
        4,
        1e4,
        False,
    )


YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model_type": "gpt2"}, "config.json: model_type: architecture 'gpt2' is not supported"),
        ({"model_type": None}, "config.json: model_type: architecture None"),
        ({"hidden_act": "gelu"}, "config.json: hidden_act: activation 'gelu'"),
        ({"hidden_size": None}, "config.json: hidden_size: is missing"),
        ({"num_hidden_layers": 0}, "config.json: num_hidden_layers: .* not 0"),
        ({"vocab_size": "many"}, "config.json: vocab_size: .* not 'many'"),
        ({"vocab_size": 100}, "config.json: vocab_size: 100 leaves out"),
        ({"num_key_value_heads": 3}, "config.json: num_key_value_heads: 3 does not divide"),
        ({"head_dim": 15}, "config.json: head_dim: must be even"),
        ({"rms_norm_eps": -1.0}, "config.json: rms_norm_eps: must be a positive number"),
        ({"rms_norm_eps": float("nan")}, "config.json: rms_norm_eps: must be a positive number"),
        ({"max_position_embeddings": True}, "config.json: max_position_embeddings"),
        ({"tie_word_embeddings": "yes"}, "config.json: tie_word_embeddings: must be true or false"),
        ({"eos_token_id": -1}, "eos_token_id: must be a token id"),
        ({"quantization_config": {"bits": 4}}, "config.json: quantization_config: .*GGUF"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters: rope_type: 'longrope'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: factor: is missing"),
        ({"rope_parameters": {**YARN, "factor": "x"}}, "rope_parameters: factor: .* not 'x'"),
        ({"rope_parameters": {**YARN, "beta_fast": -2}}, "rope_parameters: beta_fast"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor: is missing"),
        ({"rope_parameters": None, "rope_scaling": 3}, "config.json: rope_scaling: must be an object"),
        ({"partial_rotary_factor": 0.5}, "config.json: partial_rotary_factor"),
    ],
)
def test_complaints_name_file_and_key(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ModelConfig.from_hf(_hf(**overrides))


def test_layer_types_of_the_wrong_length_are_refused() -> None:
    config = _hf("qwen3", use_sliding_window=True, sliding_window=8, layer_types=["full_attention"])
    with pytest.raises(ModelError, match="layer_types: must list 2"):
        ModelConfig.from_hf(config)


@pytest.mark.parametrize("content", ["{", "[]", None])
def test_a_broken_config_file_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=f"{tmp_path}/config.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_gguf_says_the_same_as_the_folder(tmp_path: Path, architecture: str) -> None:
    folder, model = build_tiny(tmp_path, architecture)
    ours = ModelConfig.from_gguf(GGUFFile(write_gguf(tmp_path / "m.gguf", model)))
    theirs = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
    differ = {key for key in vars(ours) if getattr(ours, key) != getattr(theirs, key)}
    assert differ == ({"dtype", "architecture"} if architecture == "mistral" else {"dtype"})
