"""The default model end to end, against transformers on the same dequantised weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenloom import LLM, SamplingParams

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "Q: What is 17 + 25?\nA:",
    "The three laws of thermodynamics are",
    "import numpy as np\n\nx =",
    "Dear Sir or Madam,",
    "In 1969, the first",
    "SELECT name FROM users WHERE",
    "Water boils at",
    "The most important thing about sleep is",
    "1, 2, 4, 8, 16,",
    "Roses are red,",
    "To make a good omelette, first",
    "The difference between a list and a tuple in Python",
    "Photosynthesis is the process by which",
    "<html>\n<head>",
    "Il était une fois",
    "He opened the door and saw",
    "The mitochondria",
]


@pytest.fixture(scope="module")
def llm(default_model: Path) -> LLM:
    return LLM(model__dtype="float32", model__quantize="none")


@pytest.fixture(scope="module")
def peer(default_model: Path) -> Iterator[Any]:
    from transformers import AutoModelForCausalLM

    yield AutoModelForCausalLM.from_pretrained(
        default_model.parent, gguf_file=default_model.name, dtype=torch.float32
    ).eval()


@torch.inference_mode()
def test_logits_equal_transformers(llm: LLM, peer: Any) -> None:
    ids = llm.tokenizer.encode(" ".join(PROMPTS))[:160]
    [score] = llm.score([ids], top=20)
    logits = peer(torch.tensor([ids])).logits[0]
    logprobs = logits.log_softmax(-1)
    for i, entry in enumerate(score.logprobs[1:]):
        assert entry is not None
        for token, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            assert abs(logprobs[i, token].item() - logprob) <= 2e-4


@torch.inference_mode()
def test_all_logits_equal_transformers(llm: LLM, peer: Any) -> None:
    from tokenloom.batch import BatchBuilder, SegmentKind

    ids = llm.tokenizer.encode("\n".join(PROMPTS))[:128]
    engine = llm.engine
    builder = BatchBuilder(engine.device)
    table = [engine.pool.allocate() for _ in range(8)]
    builder.add(SegmentKind.PREFILL, ids, table, kv_start=0, block_size=16, contiguous=False, logits="all")
    actual = engine.decoder.logits(engine.decoder.forward(builder.build(), engine.kv))
    for block in table:
        engine.pool.release(block)
    assert (actual - peer(torch.tensor([ids])).logits[0]).abs().max() <= 2e-4


@torch.inference_mode()
def test_greedy_text_is_what_transformers_would_choose(llm: LLM, peer: Any) -> None:
    """Every one of 20 x 64 tokens is transformers' argmax after the ones before it.

    One forward pass checks 64 choices; tests/system/greedy_text.py runs transformers' own `generate`.
    """
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    for output in llm.generate(PROMPTS, params):
        ids = output.prompt_token_ids + output.completions[0].token_ids
        choices = peer(torch.tensor([ids]), logits_to_keep=65).logits[0].argmax(-1)
        assert choices[:-1].tolist() == output.completions[0].token_ids


def test_chat_ends_by_itself_and_stops_on_a_string(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Say hello in one short sentence."}]
    [output] = llm.chat(messages, SamplingParams(temperature=0, max_tokens=100))
    assert output.completions[0].finish_reason == "stop"
    assert "<|im_end|>" not in output.text and output.text
    word = output.text.split()[1]
    [stopped] = llm.chat(messages, SamplingParams(temperature=0, max_tokens=100, stop=word))
    assert stopped.text == output.text[: output.text.index(word)]
    assert stopped.completions[0].stop_reason == word


def test_one_weird_token_at_a_time_never_shows_a_broken_character(llm: LLM) -> None:
    text = "héllo 🎉 日本語 — ok"
    ids = llm.tokenizer.encode(text)
    detokenizer = llm.tokenizer.detokenizer()
    pieces = [detokenizer.push([i]) for i in ids]
    assert all("�" not in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.finish() == text


def test_stream_gives_the_same_text(llm: LLM) -> None:
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=24)
    whole = llm.generate(PROMPTS[1], params)[0].text
    assert "".join(delta.text for delta in llm.stream(PROMPTS[1], params)) == whole


def test_ending_a_stream_early_frees_everything(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[1], SamplingParams(max_tokens=50))
    next(stream)
    stream.close()
    assert llm.engine.pool.num_used == 0 and not llm.engine.has_work


def test_reference_backend_repeats_itself_on_the_real_model(default_model: Path) -> None:
    exact = LLM(model__backend="reference", cache__kv_bytes=2**28)
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=6, logprobs=1, ignore_eos=True)
    alone = exact.generate(PROMPTS[0] * 6, params)[0]  # cold cache
    batch = exact.generate([PROMPTS[2], PROMPTS[0] * 6, PROMPTS[3]], params)[1]  # warm, in company
    assert batch.cached_tokens > 0
    assert batch.completions == alone.completions
