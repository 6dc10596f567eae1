"""tokenloom, through its engine in this process."""

from __future__ import annotations

import time

import numpy as np
import torch
from worker import Job, Timing, serve

from tokenloom.batch import BatchBuilder, SegmentKind
from tokenloom.cache.block_table import BlockTable
from tokenloom.engine.request import Request
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.llm import LLM


class Tokenloom:
    package = "tokenloom"

    def __init__(self, job: Job) -> None:
        settings = {"model__threads": job["threads"], "cache__prefix_caching": False}
        if job["quantize"]:
            settings["model__quantize"] = job["quantize"]
        self.llm = LLM(job["model"], **settings)
        self.weights = f"as in the file ({job['file_type']})" if not job["quantize"] else job["quantize"]
        self.weight_bytes = self.llm.engine.decoder.num_bytes
        self._count = 0

    def generate(self, prompts: list[list[int]], new: int) -> Timing:
        engine = self.llm.engine
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        requests = []
        for prompt in prompts:
            self._count += 1
            requests.append(Request(f"peers-{self._count}", prompt, params))
            engine.add(requests[-1])
        sequences = [sequence for request in requests for sequence in request.sequences]
        start = time.perf_counter()
        while any(sequence.num_output == 0 for sequence in sequences):
            engine.step()
        middle = time.perf_counter()
        early = sum(sequence.num_output for sequence in sequences)
        while engine.has_work:
            engine.step()
        return Timing(middle - start, time.perf_counter() - middle, new * len(prompts) - early)

    def logits(self, tokens: list[int]) -> np.ndarray:
        engine = self.llm.engine
        size = engine.pool.block_size
        table = BlockTable(engine.pool)
        table.grow(len(tokens))
        builder = BatchBuilder(engine.device)
        builder.add(
            SegmentKind.PREFILL,
            tokens,
            table.blocks,
            kv_start=0,
            block_size=size,
            contiguous=table.contiguous,
            logits="all",
        )
        with torch.inference_mode():
            hidden = engine.decoder.forward(builder.build(), engine.kv)
            result: np.ndarray = engine.decoder.logits(hidden).numpy()
        table.clear()
        return result

    def nll(self, tokens: list[int]) -> float:
        return -self.llm.score(tokens)[0].total


if __name__ == "__main__":
    serve(Tokenloom)
