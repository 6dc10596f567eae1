"""GGUF headers: read as the gguf package reads them, and damage named before tensors are touched."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGUFValueType

from tiny_models import build_tiny, write_gguf
from tokenloom.errors import ModelError
from tokenloom.models.config import ModelConfig
from tokenloom.models.gguf_file import GGUFFile


def _write(path: Path, fill: Callable[[gguf.GGUFWriter], None]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    _, model = build_tiny(folder, "llama")
    return write_gguf(folder / "m.gguf", model, "Q4_0")


def test_reads_what_the_gguf_package_reads(tiny: Path) -> None:
    ours, theirs = GGUFFile(tiny), gguf.GGUFReader(tiny)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata.keys() == fields.keys()
    for key, value in fields.items():
        assert ours.metadata[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value)
    for tensor in theirs.tensors:
        entry = ours.tensors[tensor.name]
        assert entry.shape == tuple(reversed(tensor.shape.tolist()))
        assert entry.quantization == tensor.tensor_type.name
        assert ours.raw(tensor.name).tobytes() == tensor.data.tobytes()


def test_every_value_type_is_read(tmp_path: Path) -> None:
    values: dict[str, tuple[Any, GGUFValueType]] = {
        "u8": (200, GGUFValueType.UINT8),
        "i8": (-5, GGUFValueType.INT8),
        "u16": (60000, GGUFValueType.UINT16),
        "i16": (-300, GGUFValueType.INT16),
        "u32": (4_000_000_000, GGUFValueType.UINT32),
        "i32": (-70000, GGUFValueType.INT32),
        "u64": (2**63, GGUFValueType.UINT64),
        "i64": (-(2**62), GGUFValueType.INT64),
        "f32": (1e-5, GGUFValueType.FLOAT32),
        "f64": (1e-300, GGUFValueType.FLOAT64),
        "bool": (True, GGUFValueType.BOOL),
        "text": ("grüße", GGUFValueType.STRING),
    }

    def fill(writer: gguf.GGUFWriter) -> None:
        for key, (value, kind) in values.items():
            writer.add_key_value(key, value, kind)
        writer.add_array("numbers", [1, 2, 3])
        writer.add_array("texts", ["a", "", "ß"])

    metadata = GGUFFile(_write(tmp_path / "m.gguf", fill)).metadata
    assert {key: metadata[key] for key in values} == {key: value for key, (value, _) in values.items()}
    assert metadata["numbers"] == [1, 2, 3]
    assert metadata["texts"] == ["a", "", "ß"]


@pytest.mark.parametrize("content", [b"", b"GG", b"not a model at all, but long enough"])
def test_bad_magic_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"m\.gguf: (not a GGUF file|cannot be read)"):
        GGUFFile(path)


def test_other_versions_and_byte_orders_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for version, message in ((1, "version 1 is not supported"), (0x03000000, "big-endian")):
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, 0, 0))
        with pytest.raises(ModelError, match=message):
            GGUFFile(path)


def test_truncation_anywhere_is_named(tiny: Path, tmp_path: Path) -> None:
    content = tiny.read_bytes()
    path = tmp_path / "cut.gguf"
    for share in np.linspace(0.0001, 0.9999, 40):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(ModelError, match=r"cut\.gguf: (truncated|not a GGUF)"):
            GGUFFile(path)


def test_truncated_data_names_the_tensor(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny.read_bytes()[:-33])
    last = max(GGUFFile(tiny).tensors.values(), key=lambda tensor: tensor.offset)
    with pytest.raises(ModelError, match=rf"cut\.gguf: truncated: tensor '{last.name}' needs bytes"):
        GGUFFile(path)


def test_a_string_longer_than_the_file_names_its_key(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    key = b"general.name"
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    path.write_bytes(header + struct.pack("<IQ", 8, 2**40) + b"short")
    with pytest.raises(ModelError, match=r"truncated: metadata key 'general\.name'"):
        GGUFFile(path)


def _one_tensor(path: Path, shape: tuple[int, ...], kind: int, offset: int = 0) -> Path:
    table = (
        struct.pack("<Q", 1) + b"t" + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
    )
    table += struct.pack("<IQ", kind, offset)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + table + bytes(256))
    return path


@pytest.mark.parametrize(
    ("shape", "kind", "message"),
    [
        ((32, 1), 99, "tensor 't' has unknown quantisation type 99"),
        ((256, 1), 10, "tensor 't' has quantisation Q2_K, which is not supported"),
        ((33, 1), 8, "tensor 't' of shape .* does not divide into Q8_0 blocks"),
        ((2**40, 2**40), 0, "truncated: tensor 't'"),
        ((32, 0), 0, "tensor 't' of shape"),
        ((1,) * 5, 0, "tensor 't' has 5 dimensions"),
    ],
)
def test_bad_table_entries_name_the_tensor(
    tmp_path: Path, shape: tuple[int, ...], kind: int, message: str
) -> None:
    with pytest.raises(ModelError, match=rf"m\.gguf: {message}"):
        GGUFFile(_one_tensor(tmp_path / "m.gguf", shape, kind))


def test_split_files_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.gguf", lambda writer: writer.add_uint16("split.count", 3))
    with pytest.raises(ModelError, match="part of a split GGUF"):
        GGUFFile(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", "gemma", r"general\.architecture: architecture 'gemma'"),
        ("llama.block_count", None, r"llama\.block_count: is missing"),
        ("llama.expert_count", 8, r"llama\.expert_count: mixture-of-experts"),
        ("llama.rope.dimension_count", 8, r"llama\.rope\.dimension_count: must equal the head width, 16"),
        ("llama.rope.scaling.type", "longrope", r"llama\.rope\.scaling\.type: 'longrope'"),
        ("llama.rope.scaling.type", ["yarn"], r"llama\.rope\.scaling\.type: \['yarn'\]"),
        ("llama.context_length", [["a"]], r"llama\.context_length: must be an integer"),
        ("llama.attention.layer_norm_rms_epsilon", 0.0, r"layer_norm_rms_epsilon: must be a positive"),
        ("llama.attention.head_count_kv", 3, r"llama\.attention\.head_count_kv: 3 does not divide"),
    ],
)
def test_complaints_about_metadata_name_file_and_key(tiny: Path, key: str, value: Any, message: str) -> None:
    file = GGUFFile(tiny)
    file.metadata[key] = value
    with pytest.raises(ModelError, match=rf"m\.gguf: .*{message}"):
        ModelConfig.from_gguf(file)


def test_rope_scaling_of_gguf(tiny: Path) -> None:
    file = GGUFFile(tiny)
    file.metadata |= {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    file.metadata |= {"llama.rope.scaling.original_context_length": 128}
    rope = ModelConfig.from_gguf(file).rope
    assert (rope.kind, rope.factor, rope.original_max_position) == ("yarn", 4.0, 128)


def test_rope_freqs_become_the_freq_factors(tmp_path: Path, tiny: Path) -> None:
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    path = _write(tmp_path / "m.gguf", lambda writer: writer.add_tensor("rope_freqs.weight", factors))
    file = GGUFFile(tiny)
    with_factors = GGUFFile(path)
    with_factors.metadata = file.metadata
    with_factors.tensors["token_embd.weight"] = file.tensors["token_embd.weight"]
    assert ModelConfig.from_gguf(with_factors).rope.freq_factors == tuple(factors.tolist())
    assert ModelConfig.from_gguf(file).rope.freq_factors is None
