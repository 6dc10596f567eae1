"""What stays quantised, what becomes Q8_0 or Q4_1, and what is dense; errors name the tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from tiny_models import build_tiny, write_gguf
from tokenloom.errors import ModelError
from tokenloom.kernels import PackedWeight, dense, get_kernels
from tokenloom.models.decoder import Decoder
from tokenloom.models.loader import open_model
from tokenloom.models.weight_loader import Quantize, WeightLoader
from tokenloom.models.weights import GGUFSource, SafetensorsSource, WeightSource

CPU = torch.device("cpu")
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
QKV = [("q_proj", 64), ("k_proj", 32), ("v_proj", 32)]


def loader(
    source: WeightSource, quantize: Quantize = "auto", dtype: torch.dtype = torch.float32
) -> WeightLoader:
    return WeightLoader(source, dtype, CPU, quantize)


def format_of(weight: Any) -> str:
    return weight.format.name if isinstance(weight, PackedWeight) else str(weight.dtype)


def stack_of(tmp_path: Path, kinds: tuple[str, str, str], width: int = 64) -> tuple[GGUFSource, list[Tensor]]:
    """q, k and v projections of these types, and the numbers that they hold."""
    path, tensors = tmp_path / "stack.gguf", []
    writer = gguf.GGUFWriter(path, "qwen2")
    generator = np.random.default_rng(0)
    for (name, out), kind in zip(QKV, kinds, strict=True):
        if kind.endswith("_K"):
            stored = random_k_rows(generator, kind, out, width)
        else:
            values = generator.normal(size=(out, width)).astype(np.float32)
            stored = gguf.quants.quantize(values, GGMLQuantizationType[kind])
        writer.add_tensor(f"blk.0.attn_{name[0]}.weight", stored, raw_dtype=GGMLQuantizationType[kind])
        tensors.append(torch.from_numpy(gguf.quants.dequantize(stored, GGMLQuantizationType[kind])))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFSource(path), tensors


def random_k_rows(generator: np.random.Generator, kind: str, rows: int, width: int) -> np.ndarray:
    """gguf's tools read K types but do not write them."""
    elements, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = generator.integers(0, 256, (rows * width // elements, block_bytes), dtype=np.uint8)
    scales = generator.normal(0, 0.1, (len(blocks), 2)).astype(np.float16).view(np.uint8)
    if kind == "Q6_K":
        blocks[:, -2:] = scales[:, :2]
    else:
        blocks[:, :4] = scales
    return blocks.reshape(rows, -1)


# -- auto ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_auto_keeps_the_files_blocks_as_they_are(tmp_path: Path, kind: str) -> None:
    source, tensors = stack_of(tmp_path, (kind, kind, kind))
    weight = loader(source).stacked(ATTENTION, QKV, 64, False).weight
    assert format_of(weight) == kind
    assert torch.equal(dense(weight), torch.cat(tensors))


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_auto_makes_types_without_kernels_q8_0(tmp_path: Path, kind: str) -> None:
    source, tensors = stack_of(tmp_path, (kind, kind, kind), width=256)
    weight = loader(source).stacked(ATTENTION, QKV, 256, False).weight
    assert format_of(weight) == "Q8_0"
    assert torch.equal(dense(weight), PackedWeight.quantize("Q8_0", torch.cat(tensors)).dense())


@pytest.mark.parametrize(
    "kinds", [("Q4_0", "Q4_0", "Q8_0"), ("Q4_1", "F32", "Q4_1"), ("Q4_0", "Q4_1", "Q6_K")]
)
def test_auto_makes_stacks_of_several_types_q8_0(tmp_path: Path, kinds: tuple[str, str, str]) -> None:
    source, tensors = stack_of(tmp_path, kinds, width=256)
    weight = loader(source).stacked(ATTENTION, QKV, 256, False).weight
    assert format_of(weight) == "Q8_0"
    assert torch.equal(dense(weight), PackedWeight.quantize("Q8_0", torch.cat(tensors)).dense())


@pytest.mark.parametrize("kinds", [("F32", "F32", "F32"), ("F16", "F16", "F16"), ("BF16", "F32", "F16")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_leaves_floats_dense(tmp_path: Path, kinds: tuple[str, str, str], dtype: torch.dtype) -> None:
    source, tensors = stack_of(tmp_path, kinds)
    weight = loader(source, dtype=dtype).stacked(ATTENTION, QKV, 64, False).weight
    assert format_of(weight) == str(dtype)
    assert torch.equal(dense(weight), torch.cat(tensors).to(dtype))


def test_none_makes_everything_dense(tmp_path: Path) -> None:
    source, tensors = stack_of(tmp_path, ("Q4_0", "Q8_0", "F16"))
    weight = loader(source, "none").stacked(ATTENTION, QKV, 64, False).weight
    assert torch.equal(dense(weight), torch.cat(tensors)) and format_of(weight) == "torch.float32"


@pytest.mark.parametrize("quantize", ["auto", "q8", "q4"])
def test_widths_that_blocks_do_not_divide_stay_dense(tmp_path: Path, quantize: Quantize) -> None:
    source, tensors = stack_of(tmp_path, ("F32", "F32", "F32"), width=72)
    weight = loader(source, quantize).stacked(ATTENTION, QKV, 72, False).weight
    assert torch.equal(dense(weight), torch.cat(tensors)) and format_of(weight) == "torch.float32"


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_llamas_rows_are_put_in_order(tmp_path: Path, kind: str) -> None:
    _, model = build_tiny(tmp_path, "llama", torch.float32)
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", model, kind))
    weight = loader(source).stacked(ATTENTION, QKV, 64, False).weight
    names = [f"{ATTENTION}.{name}.weight" for name, _ in QKV]
    expected = torch.cat([source.load(name, torch.float32, CPU) for name in names])
    assert format_of(weight) == kind and torch.equal(dense(weight), expected)


# -- q8, q4 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quantize", "format"), [("q8", "Q8_0"), ("q4", "Q4_1")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safetensors_are_quantised_on_loading(
    tmp_path: Path, quantize: Quantize, format: str, dtype: torch.dtype
) -> None:
    folder, model = build_tiny(tmp_path, "llama", dtype)
    weight = loader(SafetensorsSource(folder), quantize).stacked(ATTENTION, QKV, 64, False).weight
    attention = model.model.layers[0].self_attn
    expected = torch.cat([getattr(attention, name).weight for name, _ in QKV]).float()
    assert format_of(weight) == format
    assert torch.equal(dense(weight), PackedWeight.quantize(format, expected.detach()).dense())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("quantize", "format"), [("q8", "Q8_0"), ("q4", "Q4_1")])
def test_embedding_and_head_are_q8_0_even_under_q4(
    tmp_path: Path, quantize: Quantize, format: str, tied: bool
) -> None:
    folder, _ = build_tiny(tmp_path, "llama", torch.float32, tie_word_embeddings=tied)
    files = open_model(str(folder))
    decoder = Decoder(files.config, loader(files.weights, quantize), get_kernels("torch"))
    assert format_of(decoder.embedding) == format_of(decoder.head) == "Q8_0"
    assert (decoder.embedding is decoder.head) == tied
    for layer in decoder.layers:
        weights = [linear.weight for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        assert [format_of(w) for w in weights] == [format] * 4


def test_q8_quantises_what_a_file_holds_in_4_bits(tmp_path: Path) -> None:
    source, tensors = stack_of(tmp_path, ("Q4_1", "Q4_1", "Q4_1"))
    weight = loader(source, "q8").stacked(ATTENTION, QKV, 64, False).weight
    assert format_of(weight) == "Q8_0"
    torch.testing.assert_close(dense(weight), torch.cat(tensors), rtol=0, atol=0.02)


def test_q4_takes_a_file_of_q4_1_as_it_is(tmp_path: Path) -> None:
    source, tensors = stack_of(tmp_path, ("Q4_1", "Q4_1", "Q4_1"))
    assert torch.equal(
        dense(loader(source, "q4").stacked(ATTENTION, QKV, 64, False).weight), torch.cat(tensors)
    )


@pytest.mark.parametrize("quantize", ["none", "q8", "q4"])
def test_norms_and_biases_are_never_quantised(tmp_path: Path, quantize: Quantize) -> None:
    folder, model = build_tiny(tmp_path, "qwen2", torch.float32)
    load = loader(SafetensorsSource(folder), quantize)
    linear = load.stacked(ATTENTION, QKV, 64, True)
    attention = model.model.layers[0].self_attn
    assert linear.bias is not None
    assert torch.equal(linear.bias, torch.cat([getattr(attention, name).bias for name, _ in QKV]))
    assert torch.equal(load("model.norm.weight", (64,)), model.model.norm.weight)


@pytest.mark.parametrize(("quantize", "most"), [("none", 4.0), ("q8", 8.5 / 8), ("q4", 6 / 8)])
def test_a_decoder_counts_the_bytes_it_holds(tmp_path: Path, quantize: Quantize, most: float) -> None:
    folder, model = build_tiny(tmp_path, "llama", torch.float32)
    files = open_model(str(folder))
    decoder = Decoder(files.config, loader(files.weights, quantize), get_kernels("torch"))
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    low = 4 * vectors + matrices * (4.0 if quantize == "none" else 0.5)
    assert low <= decoder.num_bytes <= 4 * vectors + matrices * most * 1.1


# -- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", ["none", "auto", "q8", "q4"])
def test_a_missing_matrix_is_named(tmp_path: Path, quantize: Quantize) -> None:
    source, _ = stack_of(tmp_path, ("Q8_0", "Q8_0", "Q8_0"))
    load = loader(source, quantize)
    with pytest.raises(
        ModelError, match=r"stack\.gguf: tensor 'model\.layers\.0\.mlp\.up_proj\.weight' is missing"
    ):
        load.stacked(MLP, [("up_proj", 96)], 64, False)
    with pytest.raises(ModelError, match=r"stack\.gguf: tensor 'lm_head\.weight' is missing"):
        load.matrix("lm_head.weight", (288, 64))
    with pytest.raises(ModelError, match=r"stack\.gguf: tensor 'model\.norm\.weight' is missing"):
        load("model.norm.weight", (64,))


@pytest.mark.parametrize("quantize", ["none", "auto", "q8", "q4"])
def test_a_matrix_of_another_shape_is_named_with_both_shapes(tmp_path: Path, quantize: Quantize) -> None:
    source, _ = stack_of(tmp_path, ("Q8_0", "Q8_0", "Q8_0"))
    with pytest.raises(ModelError, match=r"k_proj\.weight' has shape \[32, 64\].* \[64, 64\]"):
        loader(source, quantize).stacked(ATTENTION, [("q_proj", 64), ("k_proj", 64)], 64, False)


def test_a_missing_bias_is_named(tmp_path: Path) -> None:
    source, _ = stack_of(tmp_path, ("Q8_0", "Q8_0", "Q8_0"))
    with pytest.raises(ModelError, match=r"tensor 'model\.layers\.0\.self_attn\.q_proj\.bias' is missing"):
        loader(source).stacked(ATTENTION, QKV, 64, True)
