"""All layers in one native call do what the operators do one after another.

Both round activations to 8 bits, so a last bit may turn a number to the next of 127 steps: then a row differs
by a few hundredths of the logits' deviation, and so do the rows that read it. Those before it differ by
rounding of float32 only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_models import BLOCK, FAMILIES, IDS, ISAS, Runner, assert_same, batch_of, build_runner
from tiny_models import build_tiny, write_gguf
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.kernels import native
from tokenloom.llm import LLM
from tokenloom.models.weight_loader import Quantize

pytestmark = [
    pytest.mark.skipif(native is None, reason="the native kernels were not built"),
    pytest.mark.usefixtures("usual_machine"),
]


@pytest.fixture
def runner(tmp_path: Path) -> Callable[..., Runner]:
    return partial(build_runner, tmp_path)


@pytest.mark.parametrize("quantize", ["q8", "q4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layers_equal_the_operators(
    runner: Callable[..., Runner], family: str, quantize: Quantize
) -> None:
    model = runner(family, quantize)
    assert model.decoder.fused is not None
    fused = model.logits([40])
    assert_same(fused, model.op_by_op().logits([40]))


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layers_store_the_operators_keys_and_values(runner: Callable[..., Runner], family: str) -> None:
    model = runner(family)
    batch = batch_of([(IDS, 0, list(range(3, 14)))])
    fused, plain = model.cache(), model.cache()
    model.forward(batch, fused)
    model.op_by_op().forward(batch, plain)
    stored = slice(3 * BLOCK, 13 * BLOCK)
    for part, expected in ((fused.keys, plain.keys), (fused.values, plain.values)):
        torch.testing.assert_close(part[0][stored], expected[0][stored], rtol=1e-5, atol=1e-5)
        assert_same(part[1][stored].flatten(1), expected[1][stored].flatten(1))


def test_fused_layers_store_8_bits_as_the_cache_does(runner: Callable[..., Runner]) -> None:
    model = runner()
    batch = batch_of([(IDS, 0, list(range(3, 14)))])
    fused, plain = model.cache(torch.int8), model.cache(torch.int8)
    model.forward(batch, fused)
    model.op_by_op().forward(batch, plain)
    stored = slice(3 * BLOCK, 13 * BLOCK)
    for part in ("key", "value"):
        quants = getattr(fused, f"{part}s")[0][stored].int() - getattr(plain, f"{part}s")[0][stored].int()
        assert quants.abs().max() <= 1 and (quants != 0).float().mean() < 0.01
        scales, expected = getattr(fused, f"{part}_scales"), getattr(plain, f"{part}_scales")
        torch.testing.assert_close(scales[0][stored], expected[0][stored], rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_quantised_file_runs_fused_as_it_is(
    runner: Callable[..., Runner], tmp_path: Path, architecture: str, kind: str
) -> None:
    _, model = build_tiny(tmp_path, architecture, torch.float32)
    path = write_gguf(tmp_path / "m.gguf", model, kind)
    quantised = runner(source=path, quantize="auto")
    assert quantised.decoder.fused is not None
    fused = quantised.logits([40])
    assert_same(fused, quantised.op_by_op().logits([40]))
    dense = runner(source=path, quantize="none", backend="torch").logits([40])
    assert 1e-4 < (fused - dense).pow(2).mean().sqrt() / dense.std() < 0.1  # of rounding activations


@pytest.mark.parametrize("chunks", [[17, 1, 1, 21], [1] * 40, [9, 31], [3, 8, 29]])
@pytest.mark.parametrize("family", ["llama", "sliding window", "qk norm"])
def test_prefill_in_pieces_equals_prefill_at_once(
    runner: Callable[..., Runner], family: str, chunks: list[int]
) -> None:
    model = runner(family)
    assert_same(model.logits(chunks), model.logits([40]))


def test_8_bit_keys_and_values_are_near(runner: Callable[..., Runner]) -> None:
    model = runner()
    exact, near = model.logits([17, 23]), model.logits([17, 23], torch.int8)
    error = (near - exact).pow(2).mean().sqrt() / exact.std()
    assert 1e-4 < error < 0.1


def test_8_bit_keys_and_values_are_the_operators_too(runner: Callable[..., Runner]) -> None:
    model = runner()
    fused = model.logits([17, 23], torch.int8)
    difference = fused - model.op_by_op().logits([17, 23], torch.int8)
    assert difference.pow(2).mean().sqrt() < 0.03 * fused.std()


# -- batches, threads, instruction sets ---------------------------------------------------------------------

MANY = [
    (IDS[:21], 0, [9, 1, 30, 4, 50, 7]),
    (IDS[:1], 0, [2]),
    (IDS[5:14], 0, [11, 12, 13]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_a_sequence_gives_the_same_bits_alone_and_beside_others(
    runner: Callable[..., Runner], dtype: torch.dtype
) -> None:
    model = runner()
    together, first = model.forward(batch_of(MANY), model.cache(dtype)), 0
    for part in MANY:
        rows = slice(first, first + len(part[0]))
        assert torch.equal(model.forward(batch_of([part]), model.cache(dtype)), together[rows])
        first = rows.stop


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("quantize", ["q8", "q4"])
def test_a_batch_gives_the_same_bits_in_any_number_of_threads_and_every_run(
    runner: Callable[..., Runner], quantize: Quantize, dtype: torch.dtype
) -> None:
    model, results = runner(quantize=quantize), []
    for threads in (1, 2, 3, 4, 2, 1):
        torch.set_num_threads(threads)
        results.append(model.forward(batch_of(MANY), model.cache(dtype)))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_gives_the_same_logits(runner: Callable[..., Runner], isa: str) -> None:
    model = runner("qk norm", "q4")
    native.use_isa("portable")
    expected = model.logits([40])
    native.use_isa(isa)
    assert_same(model.logits([40]), expected)


def test_a_row_that_is_not_finite_spoils_its_own_sequence(runner: Callable[..., Runner]) -> None:
    model = runner()
    batch, fused = batch_of(MANY), model.decoder.fused
    assert fused is not None
    cos_sin = model.decoder.rope.cos_sin(batch.positions)
    x = torch.randn(batch.num_rows, 64, generator=torch.Generator().manual_seed(0))
    clean, spoiled = x.clone(), x.clone()
    spoiled[21, 5] = torch.nan  # the one row of the second sequence
    for rows in (clean, spoiled):
        assert fused(batch, model.cache(), rows, *cos_sin)
    others = torch.arange(batch.num_rows) != 21
    assert spoiled[21].isnan().all() and clean.isfinite().all()
    assert torch.equal(spoiled[others], clean[others])


# -- the engine ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_greedy_text_is_the_operators_text(tmp_path: Path, kv: str) -> None:
    """Up to the first token whose runner-up is as likely: a last bit may decide that one."""
    folder, _ = build_tiny(tmp_path, "llama", torch.float32)
    keys = {"model__backend": "cpu", "model__quantize": "q8", "cache__dtype": kv, "cache__kv_bytes": 2**20}
    fused, plain = LLM(str(folder), **keys), LLM(str(folder), **keys)
    assert fused.engine.decoder.fused is not None
    plain.engine.decoder.fused = None
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=2)
    prompts, compared = [IDS[i : i + 1 + 3 * i] for i in range(8)], 0
    for one, other in zip(fused.generate(prompts, params), plain.generate(prompts, params), strict=True):
        for a, b in zip(one.completions[0].logprobs or [], other.completions[0].logprobs or [], strict=True):
            (_, best), (_, next_best) = b.top
            if best - next_best < 0.1:
                break
            assert a.token_id == b.token_id
            compared += 1
    assert compared > 20


# -- where there is nothing to fuse -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantize", "backend"), [("none", "cpu"), ("auto", "cpu"), ("q8", "torch"), ("q8", "reference")]
)
def test_without_packed_weights_or_native_kernels_the_operators_run(
    runner: Callable[..., Runner], quantize: Quantize, backend: str
) -> None:
    assert runner(quantize=quantize, backend=backend).decoder.fused is None


def test_a_head_width_without_a_kernel_runs_by_operators(
    runner: Callable[..., Runner], tmp_path: Path
) -> None:
    folder, _ = build_tiny(tmp_path, "llama", torch.float32, num_attention_heads=8, head_dim=12)
    model = runner(source=folder)
    assert model.decoder.fused is None
    expected = runner(source=folder, backend="torch").logits([40])
    error = (model.logits([40]) - expected).pow(2).mean().sqrt() / expected.std()
    assert error < 0.1


# -- what is refused ----------------------------------------------------------------------------------------


def arguments(model: Runner) -> dict[str, Any]:
    kv = model.cache()
    return {
        "x": torch.zeros(3, 64),
        "kv": native.KV(kv.keys, kv.values, [], []),
        "cos": torch.zeros(3, 8),
        "sin": torch.zeros(3, 8),
        "slots": torch.tensor([4, 5, 6]),
        "spans": torch.tensor([[0, 3, 3, 0]], dtype=torch.int32),
        "blocks": torch.tensor([1], dtype=torch.int32),
        "block_size": BLOCK,
        "bypasses": [],
        "taps": [],
        "qkv": torch.zeros(3, 128),
        "attend": lambda layer: torch.zeros(3, 64),
        "threads": 1,
    }


def one_layer() -> Any:
    return native.KV([torch.zeros(16, 2, 16)], [torch.zeros(16, 2, 16)], [], [])


REFUSED: dict[str, tuple[str, Callable[[], Any], str]] = {
    "x's width": ("x", lambda: torch.zeros(3, 32), "x: wrong shape"),
    "x strided": ("x", lambda: torch.zeros(3, 128)[:, :64], "x: wrong shape"),
    "x transposed": ("x", lambda: torch.zeros(64, 3).t(), "x: "),
    "cos": ("cos", lambda: torch.zeros(3, 16), "cos, sin: wrong shape"),
    "too few cos": ("cos", lambda: torch.zeros(2, 8), "cos, sin: wrong shape"),
    "sin": ("sin", lambda: torch.zeros(3, 16)[:, :4], "cos, sin: wrong shape"),
    "sin strided": ("sin", lambda: torch.zeros(8, 3).t(), "cos, sin: wrong shape|sin: "),
    "slots": ("slots", lambda: torch.tensor([4, 5]), "slots: one per row"),
    "slot too high": ("slots", lambda: torch.tensor([4, 5, 64 * BLOCK]), "slots: slot 256 is outside"),
    "slot below 0": ("slots", lambda: torch.tensor([4, 5, -1]), "slots: slot -1 is outside"),
    "block": ("blocks", lambda: torch.tensor([64], dtype=torch.int32), "blocks: block 64 is outside"),
    "span": ("spans", lambda: torch.tensor([[1, 3, 3, 0]], dtype=torch.int32), "spans: row 0"),
    "block_size": ("block_size", lambda: 0, "block_size"),
    "qkv": ("qkv", lambda: torch.zeros(3, 96), "qkv: wrong shape"),
    "what attend returns": ("attend", lambda: lambda layer: torch.zeros(3, 63), "attend: what it returns"),
    "a cache of another model": ("kv", one_layer, "a cache of another model"),
    "threads": ("threads", lambda: 0, "threads"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_of_layers_are_refused_by_name(runner: Callable[..., Runner], case: str) -> None:
    name, value, words = REFUSED[case]
    model = runner()
    layers: Any = model.decoder.fused
    good = arguments(model)
    layers._native.forward(**good)
    with pytest.raises(ValueError, match=words):
        layers._native.forward(**{**good, name: value()})


def test_layers_that_do_not_fit_are_refused_by_name() -> None:
    def weight(rows: int, columns: int) -> Any:
        return native.Weight(
            0, rows, columns, torch.zeros(-(-rows // 8), columns // 32, 272, dtype=torch.uint8)
        )

    good = {
        "input_norm": torch.ones(64),
        "qkv": weight(128, 64),
        "q_norm": torch.ones(16),
        "k_norm": torch.ones(16),
        "o": weight(64, 64),
        "post_norm": torch.ones(64),
        "gate_up": weight(192, 64),
        "down": weight(64, 96),
        "window": 0,
    }
    layers = native.Layers(64, 96, 4, 2, 16, 1e-5)
    layers.add(**good)
    for name, value in (
        ("input_norm", torch.ones(63)),
        ("post_norm", torch.ones(63)),
        ("q_norm", torch.ones(8)),
        ("k_norm", torch.ones(32)),
        ("qkv", weight(120, 64)),
        ("o", weight(64, 32)),
        ("gate_up", weight(96, 64)),
        ("down", weight(64, 64)),
    ):
        words = "norm" if "norm" in name else name
        with pytest.raises(ValueError, match=f"{words}.*: wrong shape"):
            layers.add(**{**good, name: value})
    for shape, words in (
        ((64, 96, 4, 3, 16), "heads"),
        ((64, 96, 4, 0, 16), "heads"),
        ((64, 96, 4, 2, 12), "head_dim"),
    ):
        with pytest.raises(ValueError, match=words):
            native.Layers(*shape, 1e-5)
