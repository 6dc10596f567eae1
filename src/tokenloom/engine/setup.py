"""What an engine runs on: the device, the arithmetic, and the memory for keys and values."""

from __future__ import annotations

import torch

from tokenloom.cache.kv_cache import KVCache, bytes_per_token, default_pool_bytes
from tokenloom.config import CacheSettings
from tokenloom.errors import ModelError
from tokenloom.kernels import Kernels
from tokenloom.models.config import ModelConfig
from tokenloom.models.weight_loader import Quantize


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU if there is one.

    Raises:
        ModelError: it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("model.device: cuda was asked for, but torch finds no CUDA device")
    return torch.device(name)


def choose_dtype(name: str, stored: str, device: torch.device) -> torch.dtype:
    """`auto` is float32 on CPU, and elsewhere the 16-bit type of the stored weights if they have one."""
    if name == "auto":
        name = "float32" if device.type == "cpu" or stored not in ("bfloat16", "float16") else stored
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def choose_quantize(wanted: Quantize, kernels: Kernels, dtype: torch.dtype) -> Quantize:
    """Only the native kernels compute on quantised weights; elsewhere they would only cost time."""
    native = kernels.name == "cpu" and dtype == torch.float32
    return "none" if wanted == "auto" and not native else wanted


def allocate_kv(
    config: ModelConfig, cache: CacheSettings, dtype: torch.dtype, device: torch.device, max_model_len: int
) -> KVCache:
    """As large as `cache.kv_bytes` says, or as the machine has room for.

    Raises:
        ModelError: that holds no block.
    """
    stored = torch.int8 if cache.dtype == "int8" else dtype
    token_bytes = bytes_per_token(config.num_layers, config.num_kv_heads, config.head_dim, stored)
    wanted = token_bytes * max(32768, 4 * max_model_len)
    pool_bytes = cache.kv_bytes or default_pool_bytes(device, wanted)
    num_blocks = pool_bytes // (token_bytes * cache.block_size)
    if num_blocks < 1:
        raise ModelError(
            f"cache.kv_bytes: {pool_bytes} bytes hold no block of {cache.block_size} tokens "
            f"({token_bytes * cache.block_size} bytes)"
        )
    return KVCache(
        config.num_layers,
        config.num_kv_heads,
        config.head_dim,
        num_blocks=num_blocks,
        block_size=cache.block_size,
        dtype=stored,
        device=device,
    )
