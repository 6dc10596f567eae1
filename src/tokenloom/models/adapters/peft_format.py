"""Adapter folders as PEFT writes them: `adapter_config.json` beside `adapter_model.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tokenloom.durable import new_folder
from tokenloom.models.adapters.adapter import Adapter, AdapterError
from tokenloom.models.adapters.peft_config import CONFIG_FILE, read_config
from tokenloom.models.adapters.sites import Dims
from tokenloom.models.config import ModelConfig

TENSORS_FILE = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_PREFIX = "base_model.model.model."
_FLOATS = ("F64", "F32", "F16", "BF16")
_OUTSIDE = ("embed", "lm_head", "modules_to_save")


def load_adapter(folder: Path, model: ModelConfig, dtype: torch.dtype, device: torch.device) -> Adapter:
    """Read a LoRA or IA³ folder that PEFT wrote, or any that `save_adapter` wrote.

    Args:
        folder: the adapter's folder.
        model: the shape of the model that it is for.
        dtype, device: what the parameters are converted to.

    Raises:
        AdapterError: the folder is broken, does not fit the model, or asks for what is not supported; the
            message names the file, and the key or tensor.
    """
    config, dims = read_config(folder, model.num_layers), Dims.of(model)
    # Without storage: nothing is reserved until the file is known to hold just these shapes.
    shapes = {
        _PREFIX + name: tuple(tensor.shape)
        for name, tensor in Adapter(config, dims, dtype, torch.device("meta")).tensors().items()
    }
    file = folder / TENSORS_FILE
    if not file.is_file() and (folder / _PICKLE).is_file():
        raise AdapterError(
            f"{folder / _PICKLE}: refused, because a pickle can run code; save the adapter as safetensors"
        )
    try:
        with safe_open(file, framework="pt") as tensors:
            _check(file, tensors, shapes)
            adapter = Adapter(config, dims, dtype, device)
            for name, parameter in adapter.tensors().items():
                parameter.copy_(tensors.get_tensor(_PREFIX + name))
                if not parameter.isfinite().all():
                    raise AdapterError(
                        f"{file}: tensor {_PREFIX + name!r} has values that are not finite in {dtype}"
                    )
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file}: missing, truncated or corrupt ({error})") from error
    return adapter


def save_adapter(adapter: Adapter, folder: Path, base_model: str) -> None:
    """Write an adapter as PEFT does; the folder appears complete or not at all, whenever the machine stops.

    Args:
        folder: replaced if it exists.
        base_model: the name under which PEFT looks the base model up.

    Raises:
        OSError: the folder cannot be written.
    """
    config = {"base_model_name_or_path": base_model, "inference_mode": True, **adapter.config.to_json()}
    tensors = {
        _PREFIX + name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in adapter.tensors().items()
    }
    with new_folder(folder) as aside:
        (aside / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        try:
            save_file(tensors, aside / TENSORS_FILE, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder}: cannot be written ({error})") from error


def _check(file: Path, tensors: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """The file holds exactly these tensors, in floating point."""
    found = set(tensors.keys())
    for name in sorted(found - shapes.keys()):
        if any(part in name for part in _OUTSIDE):
            raise AdapterError(f"{file}: tensor {name!r} is outside the layers, which alone are adapted")
        raise AdapterError(f"{file}: tensor {name!r} is not of the adapter that {CONFIG_FILE} describes")
    for name, shape in shapes.items():
        if name not in found:
            raise AdapterError(f"{file}: tensor {name!r} is missing")
        stored = tensors.get_slice(name)
        if tuple(stored.get_shape()) != shape:
            raise AdapterError(
                f"{file}: tensor {name!r} has shape {stored.get_shape()}; model and {CONFIG_FILE} say "
                f"{list(shape)}"
            )
        if stored.get_dtype() not in _FLOATS:
            raise AdapterError(
                f"{file}: tensor {name!r} has type {stored.get_dtype()}; {', '.join(_FLOATS)} can be read"
            )
