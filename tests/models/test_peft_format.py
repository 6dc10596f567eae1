"""Folders that PEFT writes give PEFT's logits here, and ours give them there; the rest is refused.

The reference is PEFT on transformers in float64.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_decoder import in_float64

from adapter_models import CONFIGS, Runner, Sequence, random_adapter, random_ids
from peft_folders import ALL, change_config, load, peft_logits, written_by_peft
from tiny_models import build_tiny
from tokenloom import durable
from tokenloom.models.adapters import (
    Dims,
    LoraConfig,
    read_config,
    save_adapter,
)
from tokenloom.models.adapters.adapter import TrainableBypass
from tokenloom.models.config import ModelConfig

FIRST_Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

PEFT_CONFIGS: dict[str, peft.PeftConfig] = {
    "all linears": peft.LoraConfig(r=3, lora_alpha=5, target_modules=ALL, lora_dropout=0.1),
    "all-linear": peft.LoraConfig(r=2, lora_alpha=2, target_modules="all-linear"),
    "rslora": peft.LoraConfig(r=4, lora_alpha=7, target_modules=ALL, use_rslora=True),
    "two linears": peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]),
    "patterns": peft.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=ALL,
        rank_pattern={
            "layers.0.self_attn.q_proj": 5,
            "model.layers.1.mlp.up_proj": 1,
            r"layers\.\d+\.mlp\.(gate|down)_proj": 3,
            "q_proj": 4,
        },
        alpha_pattern={"^model.layers.1.self_attn.o_proj": 2.5, "layers.1.self_attn.v_proj": 1, "v_proj": 9},
        use_rslora=True,
    ),
    "expression": peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=r".*\.(0\.self_attn\.(q|k)_proj|1\.mlp\.\w+_proj)"
    ),
    "one layer": peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["k_proj", "up_proj"],
        layers_to_transform=[1],
        layers_pattern="layers",
    ),
    "a layer by number": peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["k_proj", "model.layers.1.mlp.up_proj"], layers_to_transform=0
    ),
    "layers of their own": peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["layers.0.self_attn.q_proj", "1.mlp.down_proj", "o_proj"]
    ),
    "exclusions": peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=ALL, exclude_modules=["0.self_attn.q_proj", "up_proj"]
    ),
    "an excluding expression": peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=ALL, exclude_modules=r".*\.1\.mlp\..*"
    ),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "ia3 inputs": peft.IA3Config(
        target_modules=ALL, feedforward_modules=["q_proj", "up_proj", "gate_proj", "down_proj"]
    ),
    "ia3 expression": peft.IA3Config(
        target_modules=r".*\.(q_proj|v_proj|down_proj|o_proj)", feedforward_modules=r".*\.1\.\w+\.\w+_proj"
    ),
}
OURS = {name: config for name, config in CONFIGS.items() if config.kind != "bottleneck"}
ARCHITECTURES = ("llama", "qwen2", "qwen3")


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", list(PEFT_CONFIGS))
def test_a_folder_written_by_peft_gives_its_logits(tmp_path: Path, name: str, backend: str) -> None:
    folder, base = build_tiny(tmp_path, "llama")
    base, ids = in_float64(base), random_ids(12)
    plain = peft_logits(base, ids)
    expected = peft_logits(written_by_peft(base, PEFT_CONFIGS[name], tmp_path / "adapter"), ids)
    runner = Runner(folder, backend)
    adapter = load(tmp_path / "adapter", runner.config)
    assert (runner.logits([Sequence(ids, adapter)])[0] - expected).abs().max() <= 1e-9
    assert (plain - expected).abs().max() > 0.1


@pytest.mark.parametrize("name", ["patterns", "ia3 inputs"])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_models_with_biases_or_head_norms(tmp_path: Path, architecture: str, name: str) -> None:
    folder, base = build_tiny(tmp_path, architecture)
    base, ids = in_float64(base), random_ids(12)
    expected = peft_logits(written_by_peft(base, PEFT_CONFIGS[name], tmp_path / "adapter"), ids)
    runner = Runner(folder, "torch")
    adapter = load(tmp_path / "adapter", runner.config)
    assert (runner.logits([Sequence(ids, adapter)])[0] - expected).abs().max() <= 1e-9


@pytest.mark.parametrize("name", list(OURS))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_folder_gives_the_same_logits_in_peft(tmp_path: Path, architecture: str, name: str) -> None:
    folder, base = build_tiny(tmp_path, architecture)
    runner, ids = Runner(folder, "torch"), random_ids(12)
    adapter = random_adapter(OURS[name], Dims.of(runner.config))
    save_adapter(adapter, tmp_path / "saved", str(folder))
    model = peft.PeftModel.from_pretrained(in_float64(base), tmp_path / "saved")
    actual = runner.logits([Sequence(ids, adapter)])[0]
    assert (actual - peft_logits(model, ids)).abs().max() <= 1e-9


@pytest.mark.parametrize("name", list(CONFIGS))
def test_saving_and_loading_gives_the_same_adapter(
    tmp_path: Path, tiny_shape: ModelConfig, name: str
) -> None:
    adapter = random_adapter(CONFIGS[name], Dims.of(tiny_shape))
    save_adapter(adapter, tmp_path / "saved", "base")
    loaded = load(tmp_path / "saved", tiny_shape)
    assert torch.equal(loaded.flat, adapter.flat)
    assert loaded.tensors().keys() == adapter.tensors().keys()
    save_adapter(loaded, tmp_path / "again", "base")
    again = load(tmp_path / "again", tiny_shape)
    assert again.config == loaded.config
    for layer in range(2):
        for site, bypass in adapter.layers[layer].items():
            assert recipe(loaded.layers[layer][site]) == recipe(bypass)


def recipe(bypass: TrainableBypass) -> dict[str, Any]:
    """All of a bypass but its parameters."""
    rest = {key: value for key, value in vars(bypass).items() if key not in ("params", "low_rank")}
    if bypass.low_rank is not None:
        rest["parts"] = [part[1:] for part in bypass.low_rank.parts]
    return rest


def test_dropout_and_targets_are_read(adapter_folder: Path) -> None:
    change_config(adapter_folder, lora_dropout=0.25, target_modules=["q_proj", "1.mlp.up_proj"])
    config = read_config(adapter_folder, 2)
    assert config == LoraConfig(r=2, alpha=3, dropout=0.25, targets=("q_proj", "1.up_proj"))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_stored_precisions_are_converted(
    adapter_folder: Path, tiny_shape: ModelConfig, stored: torch.dtype
) -> None:
    file = adapter_folder / "adapter_model.safetensors"
    tensors = {name: tensor.to(stored) for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    adapter = load(adapter_folder, tiny_shape, torch.float32)
    assert adapter.flat.dtype == torch.float32
    for name, tensor in adapter.tensors().items():
        assert torch.equal(tensor, tensors[f"base_model.model.model.{name}"].float())


def test_an_existing_folder_is_replaced(tmp_path: Path, tiny_shape: ModelConfig) -> None:
    adapter = random_adapter(CONFIGS["ia3"], Dims.of(tiny_shape))
    save_adapter(adapter, tmp_path / "saved", "base")
    adapter.flat.zero_()
    save_adapter(adapter, tmp_path / "saved", "base")
    assert not load(tmp_path / "saved", tiny_shape).flat.any()
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_save_that_fails_leaves_nothing(
    tmp_path: Path, tiny_shape: ModelConfig, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: Any) -> None:
        assert not (tmp_path / "saved").exists()
        raise OSError("the disk is full")

    monkeypatch.setattr(durable.os, step, fail)
    adapter = random_adapter(CONFIGS["ia3"], Dims.of(tiny_shape))
    with pytest.raises(OSError, match="the disk is full"):
        save_adapter(adapter, tmp_path / "saved", "base")
    assert list(tmp_path.iterdir()) == []


def test_everything_is_synced_before_the_folder_appears(
    tmp_path: Path, tiny_shape: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int | str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        steps.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def replaced(source: Path, target: Path) -> None:
        steps.append("replace")
        replace(source, target)

    monkeypatch.setattr(durable.os, "fsync", synced)
    monkeypatch.setattr(durable.os, "replace", replaced)
    folder = tmp_path / "saved"
    save_adapter(random_adapter(CONFIGS["ia3"], Dims.of(tiny_shape)), folder, "base")
    config, tensors, own, parent = (
        path.stat().st_ino
        for path in (folder / "adapter_config.json", folder / "adapter_model.safetensors", folder, tmp_path)
    )
    assert steps == [config, tensors, own, "replace", parent]


def test_the_base_model_is_named_for_peft(tmp_path: Path, tiny_shape: ModelConfig) -> None:
    save_adapter(random_adapter(CONFIGS["lora"], Dims.of(tiny_shape)), tmp_path / "a" / "b", "org/base")
    config = peft.PeftConfig.from_pretrained(tmp_path / "a" / "b")
    assert isinstance(config, peft.LoraConfig)
    assert config.base_model_name_or_path == "org/base"
    assert config.task_type == "CAUSAL_LM"
