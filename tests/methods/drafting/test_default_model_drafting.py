"""On the default model, in native kernels on its own 4-bit weights: the same bits, whoever guesses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenloom import LLM, SamplingParams
from tokenloom.kernels import native

SPECS = ("token_recycling(tree=n16)+ngram", "draft_model(layers=4, tokens=2, fixed=True)", "ppd(rows=12)")
PROMPTS = ["def fibonacci(n):\n", "List the numbers from 1 to 20: 1, 2, 3,"]


@pytest.mark.skipif(native is None, reason="the native kernels were not built")
def test_answers_are_the_same_to_the_bit(default_model: Path) -> None:
    llm = LLM(drafting__persist=False, cache__kv_bytes=2**27)
    for params in (
        SamplingParams(temperature=0, max_tokens=12, logprobs=0),
        SamplingParams(temperature=0.7, top_p=0.9, seed=4, max_tokens=12, logprobs=0),
    ):
        plain = llm.generate(PROMPTS, params)
        for spec in SPECS:
            drafted = llm.generate(PROMPTS, params, draft=spec)
            assert [d.completions[0].logprobs for d in drafted] == [p.completions[0].logprobs for p in plain]
