"""Weights come out as transformers holds them, whatever file they lie in; broken files are named."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import gguf.quants
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from tiny_models import build_tiny, gguf_name, permute_rows, write_gguf
from tokenloom.errors import ModelError
from tokenloom.models import weights
from tokenloom.models.gguf_file import GGUFFile
from tokenloom.models.weights import GGUFSource, SafetensorsSource

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"attention_bias": True}),
}


def _stored(model: Any) -> dict[str, torch.Tensor]:
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def _assert_holds(source: weights.WeightSource, expected: dict[str, torch.Tensor]) -> None:
    assert set(source.names()) == set(expected)
    for name, tensor in expected.items():
        assert source.shape(name) == tuple(tensor.shape)
        loaded = source.load(name, torch.float32, "cpu")
        assert loaded.is_contiguous()
        assert torch.equal(loaded, tensor.float()), name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("max_shard_size", ["1GB", "50KB"])
def test_safetensors_equal_the_model(tmp_path: Path, variant: str, max_shard_size: str) -> None:
    architecture, overrides = VARIANTS[variant]
    folder, model = build_tiny(
        tmp_path, architecture, torch.float32, max_shard_size=max_shard_size, **overrides
    )
    assert (folder / "model.safetensors.index.json").exists() == (max_shard_size == "50KB")
    _assert_holds(SafetensorsSource(folder), _stored(model))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gguf_equals_the_model(tmp_path: Path, variant: str) -> None:
    architecture, overrides = VARIANTS[variant]
    _, model = build_tiny(tmp_path, architecture, torch.float32, **overrides)
    _assert_holds(GGUFSource(write_gguf(tmp_path / "m.gguf", model)), _stored(model))


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_quantised_gguf_equals_gguf_own_dequantisation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str, architecture: str
) -> None:
    monkeypatch.setattr(
        weights, "_CHUNK_ELEMENTS", 64 * 5
    )  # several chunks to a tensor, none of them whole heads
    _, model = build_tiny(tmp_path, architecture, torch.float32, tie_word_embeddings=True)
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", model, quantization))
    kind = GGMLQuantizationType[quantization]
    expected = _stored(model)
    for name, tensor in expected.items():
        if tensor.ndim == 2:
            rows = gguf.quants.quantize(tensor.numpy(), kind)
            expected[name] = torch.from_numpy(gguf.quants.dequantize(rows, kind))
            assert source.quantization(name) == quantization
    _assert_holds(source, expected)


@pytest.mark.parametrize("quantization", ["Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_in_row_chunks_equal_gguf_own_dequantisation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quantization: str
) -> None:
    """The gguf package cannot quantise to these, so the blocks are random bytes with sane scales."""
    kind = GGMLQuantizationType[quantization]
    _, block_bytes = GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (37 * 2, block_bytes), np.uint8)
    scales = generator.normal(0, 0.1, (len(blocks), 2)).astype(np.float16).view(np.uint8)
    if quantization == "Q6_K":
        blocks[:, -2:] = scales[:, :2]
    else:
        blocks[:, :4] = scales
    rows = blocks.reshape(37, -1)
    path = tmp_path / "k.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_tensor("blk.0.ffn_up.weight", rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(weights, "_CHUNK_ELEMENTS", 512 * 5)
    name = "model.layers.0.mlp.up_proj.weight"
    source = GGUFSource(path)
    assert source.shape(name) == (37, 512)
    expected = torch.from_numpy(gguf.quants.dequantize(rows, kind))
    assert expected.isfinite().all() and expected.std() > 0
    assert torch.equal(source.load(name, torch.float32, "cpu"), expected)


def test_raw_and_row_order_rebuild_the_tensor(tmp_path: Path) -> None:
    _, model = build_tiny(tmp_path, "llama", torch.float32)
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", model, "Q8_0"))
    for projection in ("q_proj", "k_proj"):
        name = f"model.layers.1.self_attn.{projection}.weight"
        order = source.row_order(name)
        assert order is not None and not np.array_equal(order, np.arange(len(order)))
        rebuilt = gguf.quants.dequantize(source.raw(name)[order], GGMLQuantizationType.Q8_0)
        assert np.array_equal(rebuilt, source.load(name, torch.float32, "cpu").numpy())
    assert source.row_order("model.layers.1.self_attn.v_proj.weight") is None
    assert not source.raw(name).flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        source.raw(name)[0, 0] = 1


def test_only_llama_is_permuted(tmp_path: Path) -> None:
    _, model = build_tiny(tmp_path, "qwen2", torch.float32)
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", model))
    assert all(source.row_order(name) is None for name in source.names())


def test_row_order_undoes_the_converters_permutation() -> None:
    rows = np.arange(32)
    assert permute_rows(rows, 2)[:4].tolist() == [0, 8, 1, 9]  # halves of a head of 16, interleaved
    assert gguf_name("model.layers.3.self_attn.q_proj.bias") == "blk.3.attn_q.bias"


def test_loaded_tensors_are_the_callers_own(tmp_path: Path) -> None:
    folder, model = build_tiny(tmp_path, "llama", torch.float32)
    for source in (SafetensorsSource(folder), GGUFSource(write_gguf(tmp_path / "m.gguf", model))):
        for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
            source.load(name, torch.float32, "cpu").zero_()
            assert source.load(name, torch.float32, "cpu").abs().sum() > 0


def test_load_converts(tmp_path: Path) -> None:
    folder, model = build_tiny(tmp_path, "llama", torch.float64)
    source = SafetensorsSource(folder)
    expected = model.state_dict()["model.norm.weight"]
    assert source.quantization("model.norm.weight") == "F64"
    assert torch.equal(source.load("model.norm.weight", torch.float64, "cpu"), expected)
    assert torch.equal(source.load("model.norm.weight", torch.bfloat16, "cpu"), expected.bfloat16())


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    folder, model = build_tiny(tmp_path, "llama")
    for source in (SafetensorsSource(folder), GGUFSource(write_gguf(tmp_path / "m.gguf", model))):
        for use in (
            source.shape,
            source.quantization,
            partial(source.load, dtype=torch.float32, device="cpu"),
        ):
            with pytest.raises(ModelError, match=r"tensor 'model\.layers\.9\.x' is missing") as error:
                use("model.layers.9.x")
            assert str(source.path) in str(error.value)


@pytest.mark.parametrize("kept_share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_safetensors_are_named(tmp_path: Path, kept_share: float) -> None:
    folder, _ = build_tiny(tmp_path, "llama")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept_share)])
    with pytest.raises(ModelError, match=r"model\.safetensors: truncated or corrupt"):
        SafetensorsSource(folder)


def test_a_file_that_may_not_be_read_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = build_tiny(tmp_path)

    def refuse(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ModelError, match=r"model\.safetensors: Permission denied$"):
        SafetensorsSource(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder, _ = build_tiny(tmp_path, "llama", max_shard_size="50KB")
    shard = sorted(folder.glob("model-*.safetensors"))[2]
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard.name}' is missing"):
        SafetensorsSource(folder)


def test_a_tensor_missing_from_its_shard_is_named(tmp_path: Path) -> None:
    folder, _ = build_tiny(tmp_path, "llama", max_shard_size="50KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra"] = content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"model-.*: tensor 'model\.extra' is missing"):
        SafetensorsSource(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {"a": "../b.safetensors"}}'])
def test_a_broken_index_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "b.safetensors").write_bytes(b"")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json"):
        SafetensorsSource(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(ModelError, match=f"pickled weights \\({name}\\).*refused"):
        SafetensorsSource(tmp_path)


def test_an_empty_folder_is_said_to_have_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        SafetensorsSource(tmp_path)


def test_integer_tensors_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors: tensor 'a' has type I8"):
        SafetensorsSource(tmp_path).load("a", torch.float32, "cpu")


def test_unknown_gguf_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.ffn_gate_inp.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"m\.gguf: tensor 'blk\.0\.ffn_gate_inp\.weight' is not one of"):
        GGUFSource(path, GGUFFile(path))
