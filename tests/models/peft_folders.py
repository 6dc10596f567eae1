"""Adapter folders as PEFT writes them, and changes that spoil them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapter_models import CPU
from tokenloom.models.adapters import LINEARS, Adapter, load_adapter
from tokenloom.models.config import ModelConfig

ALL = list(LINEARS)


def peft_logits(model: Any, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        return model.eval()(torch.tensor([ids])).logits[0]


def written_by_peft(
    base: Any, config: peft.PeftConfig, folder: Path, dtype: torch.dtype = torch.float64
) -> Any:
    """A PEFT model with random parameters, saved to the folder."""
    model = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "ia3_" in name:
                noise = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_((noise + ("ia3_" in name)).to(dtype))
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


def load(folder: Path, shape: ModelConfig, dtype: torch.dtype = torch.float64) -> Adapter:
    return load_adapter(folder, shape, dtype, CPU)


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_tensors(folder: Path, **values: Tensor | None) -> None:
    """Replace, add or (None) remove tensors."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file) | values
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
