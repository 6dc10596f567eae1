"""Adapter folders that are broken, hostile or not for this model are refused by file and key."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapter_models import CONFIGS, random_adapter
from peft_folders import ALL, change_config, change_tensors, load
from tiny_models import build_tiny
from tokenloom.models.adapters import (
    AdapterError,
    Dims,
    save_adapter,
)
from tokenloom.models.config import ModelConfig
from tokenloom.models.loader import read_config as read_model_config

FIRST_Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("peft_type", "LOHA", r"peft_type: 'LOHA' is not supported; LORA, IA3, BOTTLENECK are"),
        ("peft_type", None, r"peft_type: None is not supported"),
        ("peft_type", ["LORA"], r"peft_type: \['LORA'\] is not supported"),
        ("bias", "all", r"bias: 'all' is not supported"),
        ("bias", "lora_only", r"bias: 'lora_only' is not supported"),
        ("use_dora", True, r"use_dora: True is not supported"),
        ("lora_bias", True, r"lora_bias: True is not supported"),
        ("fan_in_fan_out", True, r"fan_in_fan_out: True is not supported"),
        ("modules_to_save", ["lm_head"], r"modules_to_save: \['lm_head'\] is not supported"),
        ("trainable_token_indices", [1], r"trainable_token_indices: \[1\] is not supported"),
        ("layer_replication", [[0, 2]], r"layer_replication: .* is not supported"),
        ("target_parameters", ["mlp.weight"], r"target_parameters: .* is not supported"),
        ("a_key_of_tomorrow", 1, r"a_key_of_tomorrow: 1 is not supported"),
        ("init_lora_weights", "pissa", r"init_lora_weights: 'pissa' also changes the base model's weights"),
        ("init_lora_weights", "olora", r"init_lora_weights: 'olora' also changes"),
        ("target_modules", ["q_proj", "lm_head"], r"target_modules: reaches lm_head"),
        ("target_modules", ["embed_tokens"], r"target_modules: reaches model.embed_tokens"),
        ("target_modules", ["c_attn"], r"target_modules: .* reaches none of the model's linears"),
        ("target_modules", None, r"target_modules: must be a list of names or a pattern, not None"),
        ("target_modules", [1], r"target_modules: must be a list of names"),
        ("target_modules", "(q_proj", r"target_modules: not a regular expression"),
        ("exclude_modules", "[", r"exclude_modules: not a regular expression"),
        ("layers_to_transform", ["one"], r"layers_to_transform: must be a layer's number"),
        ("r", 0, r"r: must be a whole number from 1 to 65536, not 0"),
        ("r", 10**15, r"r: must be a whole number from 1 to 65536"),
        ("r", 2.5, r"r: must be a whole number"),
        ("r", True, r"r: must be a whole number"),
        ("lora_alpha", "16", r"lora_alpha: must be a finite number, not '16'"),
        ("lora_alpha", float("nan"), r"lora_alpha: must be a finite number, not nan"),
        ("lora_dropout", 1.0, r"lora_dropout: 1.0 is not within 0 and 1"),
        ("use_rslora", "yes", r"use_rslora: must be true or false, not 'yes'"),
        ("rank_pattern", [1], r"rank_pattern: must be an object"),
        ("rank_pattern", {"q_proj": -1}, r"rank_pattern.q_proj: must be a whole number"),
        ("rank_pattern", {"q_proj(": 2}, r"rank_pattern: not a regular expression"),
        ("alpha_pattern", {"q_proj": None}, r"alpha_pattern.q_proj: must be a finite number"),
    ],
)
def test_a_configuration_that_is_not_understood_is_refused_by_file_and_key(
    adapter_folder: Path, tiny_shape: ModelConfig, key: str, value: Any, message: str
) -> None:
    load(adapter_folder, tiny_shape)
    change_config(adapter_folder, **{key: value})
    with pytest.raises(AdapterError, match=rf"adapter_config.json: {message}"):
        load(adapter_folder, tiny_shape)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (FIRST_Q, None, rf"tensor '{FIRST_Q}' is missing"),
        (FIRST_Q, torch.zeros(3, 64), r"has shape \[3, 64\]; model and adapter_config.json say \[2, 64\]"),
        (FIRST_Q, torch.zeros(128), r"has shape \[128\]; model and adapter_config.json say \[2, 64\]"),
        (FIRST_Q, torch.zeros(2, 64, dtype=torch.int32), r"has type I32; F64, F32, F16, BF16 can be read"),
        (FIRST_Q, torch.full((2, 64), torch.nan), r"q_proj.lora_A.weight' has values that are not finite"),
        (FIRST_Q, torch.full((2, 64), torch.inf), r"q_proj.lora_A.weight' has values that are not finite"),
        (FIRST_Q.replace("lora_A", "lora_C"), torch.zeros(2, 64), r"lora_C.weight' is not of the adapter"),
        (FIRST_Q.replace("s.0.", "s.7."), torch.zeros(2, 64), r"layers.7.* is not of the adapter"),
        ("base_model.model.lm_head.weight", torch.zeros(1), r"lm_head.weight' is outside the layers"),
        (
            "base_model.model.model.embed_tokens.lora_embedding_A",
            torch.zeros(1),
            r"lora_embedding_A' is outside the layers",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    adapter_folder: Path, tiny_shape: ModelConfig, name: str, tensor: Tensor | None, message: str
) -> None:
    change_tensors(adapter_folder, **{name: tensor})
    with pytest.raises(AdapterError, match=rf"adapter_model.safetensors: .*{message}"):
        load(adapter_folder, tiny_shape)


def test_a_value_too_large_for_the_type_is_refused(adapter_folder: Path, tiny_shape: ModelConfig) -> None:
    change_tensors(adapter_folder, **{FIRST_Q: torch.full((2, 64), 1e6)})
    load(adapter_folder, tiny_shape, torch.float32)
    with pytest.raises(
        AdapterError, match=r"q_proj.lora_A.weight' has values .* not finite in torch.float16"
    ):
        load(adapter_folder, tiny_shape, torch.float16)


def test_a_rank_that_the_tensors_do_not_have_is_refused(
    adapter_folder: Path, tiny_shape: ModelConfig
) -> None:
    change_config(adapter_folder, rank_pattern={"1.mlp.up_proj": 4})
    with pytest.raises(
        AdapterError, match=r"layers.1.mlp.up_proj.lora_A.*has shape \[2, 64\].*say \[4, 64\]"
    ):
        load(adapter_folder, tiny_shape)


def test_tensors_of_linears_that_are_not_targets_are_refused(
    adapter_folder: Path, tiny_shape: ModelConfig
) -> None:
    change_config(adapter_folder, target_modules=["q_proj", "up_proj"])
    with pytest.raises(AdapterError, match=r"down_proj.lora_A.weight' is not of the adapter"):
        load(adapter_folder, tiny_shape)


def test_an_adapter_of_another_model_is_refused(adapter_folder: Path, tmp_path: Path) -> None:
    folder, _ = build_tiny(tmp_path, "llama", hidden_size=32, num_hidden_layers=2)
    with pytest.raises(AdapterError, match=r"has shape \[2, 64\]; .* say \[2, 32\]"):
        load(adapter_folder, read_model_config(folder))
    folder, _ = build_tiny(tmp_path, "llama", num_hidden_layers=3)
    with pytest.raises(AdapterError, match=r"layers.2.self_attn.q_proj.lora_A.weight' is missing"):
        load(adapter_folder, read_model_config(folder))


def test_pickles_are_refused(adapter_folder: Path, tiny_shape: ModelConfig) -> None:
    (adapter_folder / "adapter_model.safetensors").rename(adapter_folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model.bin: refused, because a pickle can run code"):
        load(adapter_folder, tiny_shape)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(adapter_folder: Path, tiny_shape: ModelConfig, name: str) -> None:
    (adapter_folder / name).unlink()
    with pytest.raises(AdapterError, match=name):
        load(adapter_folder, tiny_shape)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"LORA"', "\udcff", "[" * 100_000])
def test_a_broken_configuration_file_is_refused(
    adapter_folder: Path, tiny_shape: ModelConfig, text: str
) -> None:
    (adapter_folder / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(AdapterError, match=r"adapter_config.json: (cannot be read as JSON|must hold a JSON)"):
        load(adapter_folder, tiny_shape)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("feedforward_modules", None, r"feedforward_modules: must be a list"),
        (
            "feedforward_modules",
            ["v_proj", "down_proj"],
            r"v_proj.ia3_l' has shape \[32, 1\]; .* say \[1, 64\]",
        ),
        ("fan_in_fan_out", True, r"fan_in_fan_out: True is not supported"),
        ("r", 4, r"r: 4 is not supported"),
    ],
)
def test_an_ia3_configuration_that_does_not_fit_is_refused(
    tmp_path: Path, tiny_shape: ModelConfig, key: str, value: Any, message: str
) -> None:
    save_adapter(random_adapter(CONFIGS["ia3"], Dims.of(tiny_shape)), tmp_path / "ia3", "base")
    change_config(tmp_path / "ia3", **{key: value})
    with pytest.raises(AdapterError, match=message):
        load(tmp_path / "ia3", tiny_shape)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("size", None, r"size: must be a whole number"),
        ("scale", "1", r"scale: must be a finite number"),
        ("activation", "tanh", r"activation: 'tanh' is not one of relu, gelu, silu"),
        ("activation", ["relu"], r"activation: \['relu'\] is not one of"),
        ("target_modules", ["q_proj"], r"targets: 'q_proj' is not one of o_proj, down_proj"),
        ("r", 4, r"r: 4 is not supported"),
    ],
)
def test_a_bottleneck_configuration_that_does_not_fit_is_refused(
    tmp_path: Path, tiny_shape: ModelConfig, key: str, value: Any, message: str
) -> None:
    save_adapter(random_adapter(CONFIGS["bottleneck"], Dims.of(tiny_shape)), tmp_path / "b", "base")
    change_config(tmp_path / "b", **{key: value})
    with pytest.raises(AdapterError, match=rf"adapter_config.json: {message}"):
        load(tmp_path / "b", tiny_shape)


def test_a_truncated_file_is_refused_wherever_it_ends(adapter_folder: Path, tiny_shape: ModelConfig) -> None:
    file = adapter_folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    for length in [*range(20), *range(20, len(whole), 997), len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(AdapterError, match=r"adapter_model.safetensors: .*truncated or corrupt"):
            load(adapter_folder, tiny_shape)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_bytes_in_the_header_are_refused_or_harmless(
    peft_folder: Path, tiny_shape: ModelConfig, tmp_path: Path, data: st.DataObject
) -> None:
    folder = tmp_path / "fuzzed"
    shutil.copytree(peft_folder, folder, dirs_exist_ok=True)
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        adapter = load(folder, tiny_shape)
    except AdapterError as error:
        assert "adapter_model.safetensors" in str(error)
    else:
        assert adapter.flat.isfinite().all()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(ALL),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(ALL), inner, max_size=2),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from([*peft.LoraConfig().to_dict(), "feedforward_modules", "activation"]), value=JSON)
@example(key="lora_alpha", value=10**400)
@example(key="alpha_pattern", value={"q_proj": 10**400})
@example(key="layers_to_transform", value=[10**400])
def test_any_json_in_the_configuration_is_refused_or_read(
    peft_folder: Path, tiny_shape: ModelConfig, tmp_path: Path, key: str, value: Any
) -> None:
    folder = tmp_path / "fuzzed"
    shutil.copytree(peft_folder, folder, dirs_exist_ok=True)
    change_config(folder, **{key: value})
    try:
        adapter = load(folder, tiny_shape)
    except AdapterError as error:
        assert "adapter_" in str(error)
    else:
        assert len(adapter.tensors()) == 28
