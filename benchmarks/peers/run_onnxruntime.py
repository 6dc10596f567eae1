"""ONNX Runtime GenAI, on the int4 model that its own builder made.

Perplexity comes from the same model file through ONNX Runtime, because GenAI keeps only the last logits.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import onnxruntime
import onnxruntime_genai
from worker import Job, Timing, serve


class OnnxRuntime:
    package = "onnxruntime-genai"

    def __init__(self, job: Job) -> None:
        folder = Path(job["models"]) / "onnxruntime"
        self.weights = "int4, blocks of 32, embedding and head too"
        self.weight_bytes = (folder / "model.onnx.data").stat().st_size
        if job["part"] == "quality":
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = job["threads"]
            decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
            self._no_past = (1, decoder["num_key_value_heads"], 0, decoder["head_size"])
            self._session = onnxruntime.InferenceSession(folder / "model.onnx", options)
            return
        config = onnxruntime_genai.Config(str(folder))
        options = {"intra_op_num_threads": job["threads"]}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = onnxruntime_genai.Model(config)

    def generate(self, prompts: list[list[int]], new: int) -> Timing:
        total = len(prompts[0]) + new
        params = onnxruntime_genai.GeneratorParams(self._model)
        # min_length keeps it going past an end token
        params.set_search_options(
            do_sample=False, batch_size=len(prompts), max_length=total, min_length=total
        )
        ids = np.array(prompts, dtype=np.int32)
        start = time.perf_counter()
        generator = onnxruntime_genai.Generator(self._model, params)
        generator.append_tokens(ids)
        generator.generate_next_token()
        middle = time.perf_counter()
        for _ in range(new - 1):
            generator.generate_next_token()
        return Timing(middle - start, time.perf_counter() - middle, (new - 1) * len(prompts))

    def nll(self, tokens: list[int]) -> float:
        ids = np.array([tokens], dtype=np.int64)
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        for entry in self._session.get_inputs():
            if entry.name.startswith("past_key_values"):
                inputs[entry.name] = np.zeros(self._no_past, dtype=np.float32)
        logits = self._session.run(["logits"], inputs)[0][0, :-1].astype(np.float64)
        top = logits.max(axis=1)
        normaliser = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        return float((normaliser - logits[np.arange(len(tokens) - 1), tokens[1:]]).sum())


if __name__ == "__main__":
    serve(OnnxRuntime)
