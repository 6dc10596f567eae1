"""The default model on its own 4-bit weights, against the same weights in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pydoc_data.topics import topics

import pytest
import torch

from tokenloom import LLM, SamplingParams
from tokenloom.kernels import native

pytestmark = [
    pytest.mark.default_model,
    pytest.mark.skipif(native is None, reason="the native kernels were not built"),
]

WINDOW, WINDOWS = 256, 16


@pytest.fixture(scope="module")
def packed() -> Iterator[LLM]:
    yield LLM(model__backend="cpu", cache__kv_bytes=2**27)


@pytest.fixture(scope="module")
def plain() -> Iterator[LLM]:
    yield LLM(model__backend="cpu", model__quantize="none", cache__kv_bytes=2**27)


@pytest.fixture(scope="module")
def windows(packed: LLM) -> list[list[int]]:
    """English: the manual that Python brings along."""
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = packed.tokenizer.encode(text)
    return [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(WINDOWS)]


def test_weights_stay_quantised_in_memory(packed: LLM, plain: LLM) -> None:
    assert packed.engine.decoder.num_bytes < 0.19 * plain.engine.decoder.num_bytes
    assert packed.engine.decoder.fused is not None


def test_perplexity_is_within_one_percent(packed: LLM, plain: LLM, windows: list[list[int]]) -> None:
    tokens = WINDOWS * (WINDOW - 1)
    loss = {
        name: -sum(score.total for score in llm.score(windows)) / tokens
        for name, llm in (("packed", packed), ("plain", plain))
    }
    assert abs(loss["packed"] - loss["plain"]) < 0.01


def test_a_cache_of_8_bits_changes_little(packed: LLM, windows: list[list[int]]) -> None:
    small = LLM(model__backend="cpu", cache__dtype="int8", cache__kv_bytes=2**26)
    losses = [-sum(s.total for s in llm.score(windows[:4])) / (4 * WINDOW - 4) for llm in (packed, small)]
    assert abs(losses[1] - losses[0]) < 0.01
    assert small.engine.kv.num_bytes <= 2**26
    # Half the bytes, and 8 bits with a scale in place of 32: 1.88 times as many blocks.
    assert small.engine.pool.num_blocks > 1.8 * packed.engine.pool.num_blocks


def test_an_answer_does_not_depend_on_the_threads(packed: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    threads = torch.get_num_threads()
    texts = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            texts.append(packed.generate("In the beginning", params)[0].text)
    finally:
        torch.set_num_threads(threads)
    assert len(set(texts)) == 1
