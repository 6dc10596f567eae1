"""Rotary embedding against transformers' own modules."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from tiny_models import tiny_config
from tokenloom.errors import RequestError
from tokenloom.kernels import get_kernels
from tokenloom.models.config import ModelConfig
from tokenloom.models.rope import Rope

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn-mscale": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
    "yarn-fixed": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 256,
        "attention_factor": 1.25,
        "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}

KERNELS = get_kernels("reference")


def _pair(
    architecture: str = "llama", module: Any = LlamaRotaryEmbedding, **overrides: Any
) -> tuple[Rope, Any]:
    hf = tiny_config(architecture, **overrides)
    config = ModelConfig.from_hf(hf.to_dict())
    return Rope(config.rope, config.head_dim, config.max_position), module(hf)


def _theirs(module: Any, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = module(torch.empty(1), positions[None])
    half = cos.shape[-1] // 2
    return cos[0, :, :half], sin[0, :, :half]


@pytest.mark.parametrize("name", SCALINGS)
def test_tables_equal_transformers(name: str) -> None:
    rope, module = _pair(rope_parameters=SCALINGS[name], head_dim=64, max_position_embeddings=512)
    positions = torch.tensor([0, 1, 2, 63, 64, 65, 127, 300, 511])
    for ours, theirs in zip(rope.cos_sin(positions), _theirs(module, positions), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_qwen2_equals_its_own_module() -> None:
    rope, module = _pair("qwen2", Qwen2RotaryEmbedding, rope_parameters=SCALINGS["yarn"])
    positions = torch.arange(512)
    for ours, theirs in zip(rope.cos_sin(positions), _theirs(module, positions), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def _dynamic(max_position: int = 64) -> tuple[Rope, Any]:
    scaling = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return _pair(rope_parameters=scaling, max_position_embeddings=max_position)


def test_dynamic_equals_transformers_in_one_shot_up_to_the_original_maximum() -> None:
    rope, module = _dynamic()
    positions = torch.arange(64)
    for ours, theirs in zip(rope.cos_sin(positions), _theirs(module, positions), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_dynamic_equals_transformers_token_by_token_beyond_it() -> None:
    rope, module = _dynamic()
    for position in range(60, 256):
        positions = torch.tensor([position])
        for ours, theirs in zip(rope.cos_sin(positions), _theirs(module, positions), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_dynamic_rotation_does_not_depend_on_what_else_is_in_the_step() -> None:
    rope, _ = _dynamic()
    whole, _ = rope.cos_sin(torch.arange(200))
    alone, _ = _dynamic()[0].cos_sin(torch.tensor([130]))
    assert torch.equal(whole[130], alone[0])


def test_table_grows_without_changing_what_it_held() -> None:
    rope, module = _pair(max_position_embeddings=8192)
    before, _ = rope.cos_sin(torch.arange(10))
    far = torch.tensor([8191, 5000])
    torch.testing.assert_close(rope.cos_sin(far)[0], _theirs(module, far)[0], rtol=0, atol=1e-6)
    assert torch.equal(rope.cos_sin(torch.arange(10))[0], before)


def test_position_past_the_limit_is_refused() -> None:
    rope, _ = _pair(max_position_embeddings=128)
    with pytest.raises(RequestError, match="position 128 is past the model's limit of 128"):
        rope.cos_sin(torch.tensor([3, 128]))


def test_table_made_under_inference_mode_serves_training() -> None:
    rope, _ = _pair(max_position_embeddings=8192)
    with torch.inference_mode():
        rope.cos_sin(torch.tensor([4000]))
    x = torch.randn(2, 4, 16, requires_grad=True)
    KERNELS.rope(x, KERNELS.rotation(*rope.cos_sin(torch.tensor([3999, 4000])), x.dtype)).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rotation_equals_transformers(dtype: torch.dtype) -> None:
    rope, _ = _pair()
    x = torch.randn(7, 4, 16).to(dtype)
    kept = x.clone()
    cos, sin = rope.cos_sin(torch.arange(5, 12))
    whole_cos, whole_sin = (torch.cat([half, half], dim=-1)[None].to(dtype) for half in (cos, sin))
    theirs, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], whole_cos, whole_sin)
    assert torch.equal(KERNELS.rope(x, KERNELS.rotation(cos, sin, dtype)), theirs[0].transpose(0, 1))
    assert torch.equal(x, kept)


def test_freq_factors_slow_each_wave_by_its_own_factor() -> None:
    """GGUF files of Llama 3 hold the ratio of unscaled to scaled frequencies, not the scaling's numbers."""
    scaled, module = _pair(rope_parameters=SCALINGS["llama3"], head_dim=64)
    plain = SCALINGS["default"] | {"rope_theta": 500000.0}
    unscaled, plain_module = _pair(rope_parameters=plain, head_dim=64)
    factors = plain_module.inv_freq / module.inv_freq
    assert factors.max() > 7
    rope = Rope(dataclasses.replace(unscaled.config, freq_factors=tuple(factors.tolist())), 64, 512)
    positions = torch.arange(512)
    for ours, theirs in zip(rope.cos_sin(positions), scaled.cos_sin(positions), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
