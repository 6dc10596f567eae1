"""Hugging Face transformers, float32, the model's own forward in a greedy loop.

`generate` adds a few per cent of Python to each token; the bare loop is the faster of the two.
"""

from __future__ import annotations

import time

import torch
from transformers import AutoModelForCausalLM
from worker import Job, Timing, serve


class Transformers:
    package = "transformers"

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job["threads"])
        self.model = AutoModelForCausalLM.from_pretrained(f"{job['models']}/hf", dtype=torch.float32).eval()
        self.weights = "float32"
        self.weight_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new: int) -> Timing:
        ids = torch.tensor(prompts)
        start = time.perf_counter()
        out = self.model(ids, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        middle = time.perf_counter()
        for _ in range(new - 1):
            out = self.model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
        return Timing(middle - start, time.perf_counter() - middle, (new - 1) * len(prompts))

    @torch.inference_mode()
    def nll(self, tokens: list[int]) -> float:
        ids = torch.tensor(tokens)
        logits = self.model(ids[None], use_cache=False).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()


if __name__ == "__main__":
    serve(Transformers)
