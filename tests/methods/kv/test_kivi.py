"""KIVI: codes come back, nothing is off by more than half a step, and what is packed is what should be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kv_rig import BLOCK, answer, bits, build_engine, request, text_of, tiny_files, tokens
from tokenloom.cache.cached_tokens import CachedTokens
from tokenloom.cache.packed_tokens import Codec
from tokenloom.cache.policy import SequenceShape
from tokenloom.errors import RequestError
from tokenloom.methods.kv import combine, packing
from tokenloom.methods.kv.bit_groups import BITS, hadamard, pack, quantize, unpack
from tokenloom.methods.kv.kivi import GROUP, Kivi, KiviCodec
from tokenloom.models.loader import ModelFiles, open_model

SHAPE = SequenceShape(100, 10, 2, 4, 2, 16)
PROMPT = text_of(1, 90)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return tiny_files(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("width", BITS)
def test_codes_come_back_from_their_bytes(width: int) -> None:
    codes = torch.randint(0, 2**width, (3, GROUP, 10), dtype=torch.uint8)
    packed = pack(codes, width)
    assert packed.numel() == codes.numel() * width // 8
    assert torch.equal(unpack(packed, width), codes)


@pytest.mark.parametrize("width", BITS)
@pytest.mark.parametrize("offset", [0.0, 3.0, -70.0, 1000.0])
def test_no_number_is_off_by_more_than_half_a_step(width: int, offset: float) -> None:
    x = torch.randn(50, GROUP, 6, dtype=torch.float64) * torch.rand(50, 1, 6) * 10 + offset
    codes, scale, least = quantize(x, width, 1)
    error = (codes * scale.double() + least.double() - x).abs()
    assert (error <= scale.double() / 2 * (1 + 1e-12)).all()
    # Steps are hardly wider than the range asks for; far from zero float16 itself is coarse.
    steps = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True) + abs(offset) * 2**-9) / (2**width - 1)
    assert (scale.double() <= steps * 1.01 + 1e-4).all()


def test_equal_numbers_are_no_division_by_zero() -> None:
    x = torch.tensor([0.0, 1.5, -3.0]).expand(1, GROUP, 3)
    codes, scale, least = quantize(x, 2, 1)
    assert torch.equal(codes * scale.float() + least.float(), x)


def round_trip(knobs: Kivi, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as they come back, packed in two steps."""
    codec, out = KiviCodec(knobs, SHAPE), (torch.empty_like(keys), torch.empty_like(values))
    parts = [codec.encode(0, at, keys[at:][:64], values[at:][:64]) for at in range(0, len(keys), 64)]
    data = torch.cat(parts)
    assert len(data) == codec.num_bytes(len(keys), keys.element_size())
    codec.decode(0, data, *out)
    if codec.basis is None:
        return out
    back = codec.basis.t().to(keys)
    return out[0] @ back, out[1] @ back


def test_keys_have_a_range_by_channel_and_values_by_token() -> None:
    """A channel of large keys costs other channels nothing, a token of large values other tokens nothing."""
    keys, values = torch.randn(128, 2, 16), torch.randn(128, 2, 16)
    keys[:, 1, 5] *= 1000
    values[77] *= 1000
    got_keys, got_values = round_trip(Kivi(bits=4), keys, values)
    keys_off, values_off = (got_keys - keys).abs(), (got_values - values).abs()
    keys_off[:, 1, 5] = 0
    values_off[77] = 0
    assert keys_off.max() < 0.3 and values_off.max() < 0.3
    by_token, _ = round_trip(Kivi(bits=4, axis="token"), keys, values)
    assert (by_token - keys).abs()[:, 1, :5].mean() > 1


def test_sinks_are_exact_and_do_not_widen_the_others_range() -> None:
    keys, values = torch.randn(64, 2, 16), torch.randn(64, 2, 16)
    keys[:3] *= 100
    got_keys, got_values = round_trip(Kivi(bits=4, keep_sinks=3), keys, values)
    assert torch.equal(got_keys[:3], keys[:3]) and torch.equal(got_values[:3], values[:3])
    assert (got_keys - keys).abs().max() < 0.3
    without, _ = round_trip(Kivi(bits=4), keys, values)
    assert (without - keys)[3:32].abs().max() > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_pool_of_any_type_gets_its_own_numbers_back(dtype: torch.dtype) -> None:
    keys, values = (torch.randn(64, 2, 16).to(dtype) for _ in range(2))
    got_keys, got_values = round_trip(Kivi(bits=8, keep_sinks=2), keys, values)
    assert got_keys.dtype == dtype and torch.equal(got_values[:2], values[:2])
    assert (got_keys - keys).abs().max() < 0.04 and (got_values - values).abs().max() < 0.04


def test_hadamard_spreads_an_outlier() -> None:
    keys, values = torch.randn(64, 2, 16), torch.randn(64, 2, 16)
    values[:, :, 3] *= 40
    plain, turned = (round_trip(Kivi(bits=2, hadamard=h), keys, values)[1] for h in (False, True))
    assert (turned - values).abs().mean() < 0.8 * (plain - values).abs().mean()
    matrix = hadamard(64)
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(64, dtype=torch.float64))


@pytest.mark.parametrize(("key_bits", "value_bits"), [(0, 0), (2, 4), (8, 2)])
def test_bytes_are_those_of_codes_and_of_one_more_bit(key_bits: int, value_bits: int) -> None:
    shape = SequenceShape(1, 1, 1, 9, 3, 64)
    knobs = Kivi(bits=2, key_bits=key_bits, value_bits=value_bits, keep_sinks=4)
    numbers = 320 * 3 * 64
    codes = numbers * ((key_bits or 2) + 1 + (value_bits or 2) + 1) // 8
    assert KiviCodec(knobs, shape).num_bytes(320, 4) == codes + 2 * 4 * 3 * 64 * 4


def packed_after(files: ModelFiles, spec: str, prompt_tokens: int) -> tuple[int, int, int]:
    """After the prompt: tokens packed, tokens in the table, blocks in use."""
    engine = build_engine(files, cache__prefix_caching=False)
    engine.add(request(text_of(2, prompt_tokens), spec))
    engine.step()
    cached = engine.scheduler.running[0].cached
    assert cached is not None
    packed = cached.packed.length if cached.packed is not None else 0
    found = packed, cached.length, engine.pool.num_used
    engine.abort("r")
    assert engine.pool.num_used == 0
    return found


@pytest.mark.parametrize(
    ("prompt", "packed"),
    [(63, 0), (64, 0), (65, 0), (95, 0), (96, 32), (97, 32), (127, 32), (128, 64)],
)
def test_the_newest_residual_tokens_and_less_than_a_group_more_stay(
    files: ModelFiles, prompt: int, packed: int
) -> None:
    got, left, used = packed_after(files, "kivi(residual=64)", prompt)
    assert (got, left) == (packed, prompt - packed)
    # A page has 4 * 32 * 8 bytes, 32 tokens of a layer 2 * 32 * 32 * 5 / 8; 3 layers, 6 pages to a block.
    pages = 3 * -(-packed * 2 * 32 * 5 // (8 * BLOCK * 32 * 8))
    assert used == -(-left // BLOCK) + -(-pages // 6)


def test_a_long_prompt_is_packed_piece_by_piece(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bits(answer(build_engine(files, model__backend="reference"), PROMPT, "kivi(residual=0)"))
    monkeypatch.setattr(packing, "_PIECE", 40)
    engine, pieces, pack_some = build_engine(files, model__backend="reference"), [], CachedTokens.pack

    def spy(cached: CachedTokens, tokens: int, codec: Codec) -> None:
        pieces.append(tokens)
        pack_some(cached, tokens, codec)

    monkeypatch.setattr(CachedTokens, "pack", spy)
    assert bits(answer(engine, PROMPT, "kivi(residual=0)")) == whole
    assert pieces == [32, 32, 32]


def test_answers_are_packed_as_they_grow(files: ModelFiles) -> None:
    engine, seen = build_engine(files, cache__prefix_caching=False), []
    engine.add(request(text_of(2, 70), "kivi(residual=32)", max_tokens=70))
    while engine.has_work:
        engine.step()
        for sequence in engine.scheduler.running:
            assert sequence.cached is not None and sequence.cached.packed is not None
            seen.append((sequence.num_computed, sequence.cached.packed.length))
    assert seen == [(n, (n - 32) // 32 * 32) for n in range(70, 70 + len(seen))]
    assert engine.pool.num_used == 0


def test_eight_bits_say_what_full_precision_says(default_model: Path) -> None:
    engine = build_engine(
        open_model(str(default_model)), model__dtype="auto", cache__block_size=16, cache__kv_bytes=2**26
    )
    prompt = engine.tokenizer.encode("The history of the lighthouse begins with a fire on a hill. " * 20)[
        :200
    ]
    plain = tokens(answer(engine, prompt, max_tokens=24))
    assert tokens(answer(engine, prompt, "kivi(bits=8, residual=0)", max_tokens=24)) == plain


def test_what_a_scorer_keeps_is_packed(files: ModelFiles) -> None:
    spec = "snapkv(budget=64, window=8)+kivi(residual=32, bits=8)"
    assert packed_after(files, spec, 90)[:2] == (32, 32)
    engine = build_engine(files, cache__prefix_caching=False)
    scored = bits(answer(engine, PROMPT, "snapkv(budget=64, window=8)"))[0]
    both = bits(answer(engine, PROMPT, spec))[0]
    assert [t for t, _ in both] == [t for t, _ in scored]
    assert 0 < max(abs(a - b) for (_, a), (_, b) in zip(both, scored, strict=True)) < 0.1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("kivi(bits=3)", "kivi: bits must be 2, 4 or 8, not 3"),
        ("kivi(key_bits=1)", "key_bits must be 2, 4 or 8, not 1"),
        ("kivi(residual=20)", "residual must be a multiple of 32, not 20"),
        ("kivi(residual=-32)", "residual must be at least 0"),
        ("kivi(keep_sinks=32)", "keep_sinks must be below 32"),
        ("kivi(axis=head)", "axis must be one of channel, token"),
        ("kivi+palu", "both a codec"),
        ("kivi+kvsharer", "both a codec"),
        ("kivi+int8", "round twice"),
        ("kivi+streaming", "packed ones are written once"),
        ("kivi+quest", "packed ones are decoded all together"),
        ("kivi+token_sparse", "both govern the rows of the prompt"),
        ("snapkv+pyramid+kivi", "the same number in every layer"),
        ("snapkv+adakv+kivi", "the same number in every head"),
    ],
)
def test_what_it_cannot_do_is_said(spec: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        combine(spec)


def test_an_8_bit_pool_is_refused(files: ModelFiles) -> None:
    engine = build_engine(files, model__dtype="float32", model__backend="torch", methods__kv="int8")
    with pytest.raises(RequestError, match="kivi: the server's cache is in 8 bits"):
        engine.add(request(PROMPT, "kivi"))


def test_heads_that_have_no_hadamard_matrix_are_refused(tmp_path: Path) -> None:
    engine = build_engine(tiny_files(tmp_path, head_dim=24), model__backend="reference")
    with pytest.raises(RequestError, match="hadamard needs heads whose width is a power of two, not 24"):
        engine.add(request(PROMPT, "kivi(hadamard=True)"))
    assert len(tokens(answer(engine, PROMPT, "kivi(bits=4, residual=0)"))[0]) == 12
