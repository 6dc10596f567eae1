"""OpenVINO GenAI: its continuous batching pipeline, on the int4 model that optimum-intel exported.

One stream runs through the same pipeline: it is what `LLMPipeline` uses on a CPU by default. Perplexity comes
from the same model file through OpenVINO's runtime, because GenAI hands out no prompt logits.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from worker import Job, Timing, serve


class OpenVino:
    package = "openvino-genai"

    def __init__(self, job: Job) -> None:
        self._folder = Path(job["models"]) / "openvino"
        self._options = {"INFERENCE_NUM_THREADS": job["threads"]}
        self.weights = "int4, groups of 64; embedding and head int8"
        self.weight_bytes = (self._folder / "openvino_model.bin").stat().st_size
        self._count = 0
        if job["part"] == "quality":
            core = openvino.Core()
            model = core.compile_model(self._folder / "openvino_model.xml", "CPU", self._options)
            self._request = model.create_infer_request()
            return
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = 2048
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            self._folder, scheduler, "CPU", self._options
        )

    def generate(self, prompts: list[list[int]], new: int) -> Timing:
        config = openvino_genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
        inputs = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        start = time.perf_counter()
        handles = []
        for tensor in inputs:
            self._count += 1
            handles.append(self._pipeline.add_request(self._count, tensor, config))
        done = [0] * len(handles)
        while not all(done):
            self._pipeline.step()
            done = [count + _read(handle) for count, handle in zip(done, handles, strict=True)]
        middle = time.perf_counter()
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        return Timing(middle - start, time.perf_counter() - middle, new * len(prompts) - sum(done))

    def nll(self, tokens: list[int]) -> float:
        self._request.reset_state()
        ids = np.array([tokens], dtype=np.int64)
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(len(tokens), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        logits = self._request.infer(inputs)["logits"][0, :-1].astype(np.float64)
        top = logits.max(axis=1)
        normaliser = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        return float((normaliser - logits[np.arange(len(tokens) - 1), tokens[1:]]).sum())


def _read(handle: Any) -> int:
    """Tokens that a request has got since it was last asked."""
    count = 0
    while handle.can_read():
        count += sum(len(output.generated_ids) for output in handle.read().values())
    return count


if __name__ == "__main__":
    serve(OpenVino)
