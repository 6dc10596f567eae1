"""Weights by their Hugging Face names, from a folder of safetensors or from a GGUF file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Protocol

import gguf.quants
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenloom.errors import ModelError
from tokenloom.models.gguf_file import GGUFFile

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Dequantisation works on this many elements at a time: its float32 temporaries then stay in the CPU's cache.
_CHUNK_ELEMENTS = 1 << 18


class WeightSource(Protocol):
    """Where a model's tensors come from. Names are Hugging Face's: `model.layers.0.mlp.up_proj.weight`."""

    path: Path

    def names(self) -> list[str]:
        """Every tensor's name."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""
        ...

    def quantization(self, name: str) -> str:
        """The stored type: F32, F16, BF16, ... or a GGUF quantisation such as Q4_1."""
        ...

    def load(self, name: str, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """The tensor, dequantised and converted; contiguous and owned by the caller.

        Raises ModelError naming the file and the tensor if it is missing or unreadable.
        """
        ...


class SafetensorsSource:
    """A folder with model.safetensors, or with shards listed by model.safetensors.index.json.

    Raises ModelError for a missing shard, a corrupt file, or a folder that has only pickled weights, which
    are never opened: a pickle can run any code.
    """

    def __init__(self, folder: Path | str) -> None:
        self.path = Path(folder)
        self._files: dict[Path, Any] = {}
        self._file_of: dict[str, Path] = {}
        single, index = self.path / _SINGLE, self.path / _INDEX
        if single.is_file():
            self._file_of = dict.fromkeys(self._open(single).keys(), single)
        elif index.is_file():
            self._read_index(index)
        else:
            pickles = sorted(file.name for pattern in _PICKLES for file in self.path.glob(pattern))
            if pickles:
                raise ModelError(
                    f"{self.path}: only pickled weights ({pickles[0]}) are there; they are refused, because "
                    "a pickle can run code. Convert them to safetensors first"
                )
            raise ModelError(f"{self.path}: has neither {_SINGLE} nor {_INDEX}")

    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def quantization(self, name: str) -> str:
        return self._slice(name).get_dtype()

    def load(self, name: str, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        stored = self.quantization(name)
        if stored not in _FLOATS:
            raise ModelError(
                f"{self._file_of[name]}: tensor {name!r} has type {stored}; floating point is needed"
            )
        tensor = self._open(self._file_of[name]).get_tensor(name)
        # A copy, because the file's tensor may be a view of mapped memory.
        return torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise ModelError(f"{self.path}: tensor {name!r} is missing")
        return self._open(self._file_of[name]).get_slice(name)

    def _open(self, file: Path) -> Any:
        if file not in self._files:
            try:
                file.open("rb").close()  # safetensors calls a file that it may not read a missing one
            except OSError as error:
                raise ModelError(f"{file}: {error.strerror}") from error
            try:
                self._files[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file}: truncated or corrupt safetensors file ({error})") from error
        return self._files[file]

    def _read_index(self, index: Path) -> None:
        try:
            weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
            shards = {shard: self.path / shard for shard in weight_map.values()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index}: not a safetensors index with a weight_map ({error})") from error
        for shard, file in shards.items():
            if file.parent != self.path or not file.is_file():
                raise ModelError(f"{index}: shard {shard!r} is missing from {self.path}")
        for name, shard in weight_map.items():
            if name not in self._open(shards[shard]).keys():  # noqa: SIM118 (a file handle, not a mapping)
                raise ModelError(
                    f"{shards[shard]}: tensor {name!r} is missing, although {_INDEX} puts it there"
                )
            self._file_of[name] = shards[shard]


class GGUFSource:
    """A GGUF file, under Hugging Face's names and in Hugging Face's row order.

    Converters store the q and k rows of `llama` models interleaved, so that dimension i rotates with its
    neighbour; `load` puts them back to the half-split order that the kernels rotate. `raw` does not: its
    rows are the file's, and `row_order` says which of them belongs where.
    """

    def __init__(self, path: Path | str, file: GGUFFile | None = None) -> None:
        self.path = Path(path)
        self.file = file or GGUFFile(self.path)
        self._stored: dict[str, str] = {}
        for name in self.file.tensors:
            if name == "rope_freqs.weight":  # belongs to the configuration
                continue
            self._stored[_hf_name(name, self.path)] = name
        metadata = self.file.metadata
        self._heads: dict[str, int] = {}
        if metadata.get("general.architecture") == "llama":
            heads = metadata.get("llama.attention.head_count", 0)
            self._heads = {"q_proj": heads, "k_proj": metadata.get("llama.attention.head_count_kv", heads)}

    def names(self) -> list[str]:
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def quantization(self, name: str) -> str:
        return self._tensor(name).quantization

    def raw(self, name: str) -> np.ndarray:
        """The stored bytes, a zero-copy read-only view of the mapped file: uint8 `[rows, bytes per row]`."""
        return self.file.raw(self._tensor(name).name)

    def row_order(self, name: str) -> np.ndarray | None:
        """For each row of the tensor, the row of `raw` that holds it, int64 `[rows]`; None if in order."""
        projection = re.search(r"\.([qk]_proj)\.", name)
        if projection is None or projection[1] not in self._heads:
            return None
        rows, heads = self.shape(name)[0], self._heads[projection[1]]
        if heads < 1 or rows % (2 * heads):
            raise ModelError(
                f"{self.path}: tensor {name!r} has {rows} rows, which do not divide into {heads} heads"
            )
        return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)

    def load(self, name: str, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        tensor, order = self._tensor(name), self.row_order(name)
        stored = self.raw(name)
        if len(tensor.shape) == 1:  # a bias is a row of many elements, but its elements permute like rows
            values = _dequantize(stored, tensor.quantization).reshape(-1)
            return torch.from_numpy(values if order is None else values[order]).to(device, dtype, copy=True)
        num_rows, width = len(stored), tensor.shape[-1]
        out = torch.empty(num_rows, width, dtype=dtype)
        step = max(1, _CHUNK_ELEMENTS // width)
        for start in range(0, num_rows, step):
            rows = slice(start, start + step) if order is None else order[start : start + step]
            values = _dequantize(stored[rows], tensor.quantization)
            out[start : start + step] = torch.from_numpy(values)
        return out.reshape(tensor.shape).to(device)

    def _tensor(self, name: str) -> Any:
        if name not in self._stored:
            raise ModelError(f"{self.path}: tensor {name!r} is missing")
        return self.file.tensors[self._stored[name]]


def _dequantize(rows: np.ndarray, quantization: str) -> np.ndarray:
    """Stored rows, uint8 `[R, bytes]`, to float32 `[R, width]` that can be written to."""
    if quantization == "F32":
        return rows.view("<f4").copy()
    if quantization == "F16":
        return rows.view("<f2").astype(np.float32)
    return getattr(gguf.quants, quantization).dequantize_rows(np.ascontiguousarray(rows))


_HF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")


def _hf_name(name: str, path: Path) -> str:
    match = _GGUF_NAME.fullmatch(name)
    if match is None or match[2] not in _HF_NAMES:
        # Leaving an unknown tensor out would run a different model than the file holds.
        raise ModelError(f"{path}: tensor {name!r} is not one of a supported architecture")
    layer, module, kind = match.groups()
    prefix = "" if layer is None else f"model.layers.{layer}."
    return f"{prefix}{_HF_NAMES[module]}.{kind}"
