"""Greedy text against transformers' own `generate`, token by token: 20 prompts x 64 tokens, 2 to 4 minutes.

python -m pytest tests/system/greedy_text.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from transformers import AutoModelForCausalLM

from test_default_model import PROMPTS
from tokenloom import LLM, SamplingParams


@pytest.mark.timeout(1800)
@torch.inference_mode()
def test_greedy_text_is_identical_to_transformers(default_model: Path) -> None:
    llm = LLM(model__dtype="float32", model__quantize="none")
    peer = AutoModelForCausalLM.from_pretrained(
        default_model.parent, gguf_file=default_model.name, dtype=torch.float32
    ).eval()
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
        ids = torch.tensor([output.prompt_token_ids])
        peer.generation_config.eos_token_id = None
        expected = peer.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, pad_token_id=0
        )[0, ids.shape[1] :].tolist()
        assert output.completions[0].token_ids == expected, prompt
        assert output.text == llm.tokenizer.decode(expected)
