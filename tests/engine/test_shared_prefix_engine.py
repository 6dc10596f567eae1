"""Requests with a common prefix answer the same whether it is read once or for each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tiny_models import build_tiny
from tokenloom.config import load_settings
from tokenloom.engine.engine import Engine
from tokenloom.engine.outputs import TokenLogprob
from tokenloom.engine.request import Request
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.kernels import native
from tokenloom.methods.kv import combine
from tokenloom.models.loader import open_model

Make = Callable[..., Engine]
PREFIX = [(3 * i) % 200 for i in range(96)]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    folder, _ = build_tiny(tmp_path_factory.mktemp("llama"), "llama")
    files = open_model(str(folder))

    def build(**flags: Any) -> Engine:
        defaults = {"model.dtype": "float64", "cache.block_size": 4, "cache.kv_bytes": 2**22}
        keys = {key.replace("__", "."): value for key, value in flags.items()}
        return Engine(load_settings({**defaults, **keys}), files)

    return build


def request(name: str, tail: list[int], kv: str = "", n: int = 1) -> Request:
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=0, n=n)
    return Request(name, PREFIX + tail, params, kv=combine(kv))


def run(engine: Engine, *requests: Request) -> dict[tuple[str, int], list[TokenLogprob | None]]:
    found: dict[tuple[str, int], list[TokenLogprob | None]] = {}
    for each in requests:
        engine.add(each)
    while engine.has_work:
        for output in engine.step():
            for delta in output.deltas:
                found.setdefault((output.request_id, delta.index), []).extend(delta.logprobs or [])
    return found


def same(
    actual: dict[tuple[str, int], list[TokenLogprob | None]],
    expected: dict[tuple[str, int], list[TokenLogprob | None]],
) -> None:
    assert actual.keys() == expected.keys()
    for key, entries in expected.items():
        for a, b in zip(actual[key], entries, strict=True):
            assert a is not None and b is not None
            assert a.token_id == b.token_id and abs(a.logprob - b.logprob) < 1e-9


def test_answers_are_the_same_and_reads_are_saved(make: Make) -> None:
    plain, together = make(), make(cache__shared_prefix_attention="on")
    for engine in (plain, together):
        run(engine, request("warm", []))
    tails = [[i, 7, 9][: 1 + i % 3] for i in range(4)]
    expected = run(plain, *(request(f"r{i}", tail) for i, tail in enumerate(tails)))
    before = together.stats().prefix_reads_saved
    same(run(together, *(request(f"r{i}", tail) for i, tail in enumerate(tails))), expected)
    assert before == 0 and plain.stats().prefix_reads_saved == 0
    # The prompts' last rows are one iteration, and seven decodes follow: three of four read nothing of it.
    assert together.stats().prefix_reads_saved == 8 * 3 * len(PREFIX)


@pytest.mark.skipif(native is None, reason="the native kernels were not built")
def test_by_default_whole_blocks_of_keys_are_read_once_where_that_changes_no_bit(make: Make) -> None:
    flags = {"model__dtype": "float32", "model__quantize": "q8", "cache__block_size": 16}
    flags["cache__kv_bytes"] = 2**24
    long = [[(7 * i + 1) % 200 for i in range(5 * native.KEY_BLOCK)] + [tail, 9] for tail in range(3)]
    shared = (len(PREFIX) + 5 * native.KEY_BLOCK) // native.KEY_BLOCK * native.KEY_BLOCK
    found = {}
    for mode in ("auto", "off"):
        engine = make(**flags, cache__shared_prefix_attention=mode)
        run(engine, request("warm", long[0]))
        found[mode] = run(engine, *(request(f"r{i}", tail) for i, tail in enumerate(long)))
        assert engine.stats().prefix_reads_saved == (8 * 2 * shared if mode == "auto" else 0)
    assert found["auto"] == found["off"]


def test_where_it_would_change_bits_nothing_is_shared_by_default(make: Make) -> None:
    engine = make()
    run(engine, request("r", [1, 2] * 150, n=3))
    assert engine.stats().prefix_reads_saved == 0


def test_the_choices_of_one_request_share_their_prompt(make: Make) -> None:
    expected = run(make(), request("r", [1, 2], n=3))
    together = make(cache__shared_prefix_attention="on")
    same(run(together, request("r", [1, 2], n=3)), expected)
    # 98 tokens of the prompt, of which 24 blocks are whole; the choices part in the next one.
    assert together.stats().prefix_reads_saved == 7 * 2 * 96


def test_requests_under_kv_methods_go_on_beside(make: Make) -> None:
    def mix() -> list[Request]:
        return [
            request("a", [5]),
            request("quest", [5, 6], "quest(budget=32)"),
            request("b", [8]),
            request("snap", [9], "snapkv(budget=16,window=4)"),
        ]

    together = make(cache__shared_prefix_attention="on")
    for engine in (warm := make(), together):
        run(engine, request("warm", []))
    same(run(together, *mix()), run(warm, *mix()))
    assert together.stats().prefix_reads_saved > 0
