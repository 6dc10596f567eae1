"""The decoder's logits equal those of transformers, family by family, in float64.

transformers' norms round to float32 on the way, so for this comparison they are given float64 arithmetic;
nothing else of it is changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import build_tiny, write_gguf
from tokenloom.batch import BatchBuilder, SegmentKind
from tokenloom.cache.kv_cache import KVCache
from tokenloom.errors import ModelError
from tokenloom.kernels import get_kernels
from tokenloom.models.decoder import Decoder
from tokenloom.models.loader import open_model
from tokenloom.models.weight_loader import WeightLoader

BLOCK = 4
CPU = torch.device("cpu")

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama multi-head": ("llama", {"num_key_value_heads": 4}),
    "llama one kv head": ("llama", {"num_key_value_heads": 1}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "yarn rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama3 rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 16,
            }
        },
    ),
}


def in_float64(model: Any) -> Any:
    """The same transformers model with norms that do not round to float32."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = forward.__get__(module)
    model.set_attn_implementation("sdpa")  # the eager one takes its softmax in float32
    return model.eval()


def our_logits(source: Path, ids: list[int], chunks: list[int], backend: str = "torch") -> Tensor:
    files = open_model(str(source))
    config = files.config
    decoder = Decoder(config, WeightLoader(files.weights, torch.float64, CPU), get_kernels(backend))
    kv = KVCache(
        config.num_layers,
        config.num_kv_heads,
        config.head_dim,
        num_blocks=32,
        block_size=BLOCK,
        dtype=torch.float64,
        device=CPU,
    )
    table, at, rows = list(range(3, 32)), 0, []
    for length in chunks:
        builder = BatchBuilder(CPU)
        builder.add(
            SegmentKind.PREFILL,
            ids[at : at + length],
            table,
            kv_start=at,
            block_size=BLOCK,
            contiguous=True,
            logits="all",
        )
        rows.append(decoder.logits(decoder.forward(builder.build(), kv)))
        at += length
    return torch.cat(rows)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_logits_equal_transformers(tmp_path: Path, family: str, backend: str) -> None:
    architecture, overrides = FAMILIES[family]
    folder, model = build_tiny(tmp_path, architecture, **overrides)
    ids = torch.randint(0, 200, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        expected = in_float64(model)(torch.tensor([ids])).logits[0]
    for chunks in ([40], [17, 1, 1, 21]):
        actual = our_logits(folder, ids, chunks, backend)
        assert (actual - expected).abs().max() <= 1e-9
    assert expected.std() > 0.1  # flat logits would prove nothing


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_gguf_gives_the_same_logits_as_safetensors(tmp_path: Path, architecture: str) -> None:
    folder, model = build_tiny(tmp_path, architecture, dtype=torch.float32)
    path = write_gguf(tmp_path / "model.gguf", model)
    ids = list(range(5, 30))
    difference = our_logits(path, ids, [25]) - our_logits(folder, ids, [25])
    assert difference.abs().max() <= 1e-9


def test_a_tensor_of_the_wrong_shape_is_named(tmp_path: Path) -> None:
    folder, _ = build_tiny(tmp_path, "llama")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 96', '"intermediate_size": 95'))
    with pytest.raises(ModelError, match=r"mlp.gate_proj.weight.*\[96, 64\].*\[95, 64\]"):
        our_logits(folder, [1], [1])
