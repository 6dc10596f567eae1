"""A tiny model's shape, and a LoRA folder for it that PEFT wrote."""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import pytest

from peft_folders import ALL, written_by_peft
from tiny_models import build_tiny
from tokenloom.models.config import ModelConfig
from tokenloom.models.loader import read_config as read_model_config


@pytest.fixture(scope="module")
def tiny_shape(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder, _ = build_tiny(tmp_path_factory.mktemp("model"), "llama")
    return read_model_config(folder)


@pytest.fixture(scope="module")
def peft_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on all linears as PEFT writes it; tests work on copies."""
    path = tmp_path_factory.mktemp("peft")
    _, base = build_tiny(path, "llama")
    written_by_peft(base, peft.LoraConfig(r=2, lora_alpha=3, target_modules=ALL), path / "adapter")
    return path / "adapter"


@pytest.fixture
def adapter_folder(peft_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(peft_folder, tmp_path / "adapter"))
