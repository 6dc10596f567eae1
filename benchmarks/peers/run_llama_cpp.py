"""llama.cpp through the C functions of llama-cpp-python, on the GGUF that the job names.

Concurrent streams are one `llama_batch` with a row for each, which is what llama-server does behind HTTP.
The key-value cache has the size that the job needs; everything else is llama.cpp's default.
"""

from __future__ import annotations

import ctypes
import time

import llama_cpp as lib
import numpy as np
from worker import Job, Timing, serve


class LlamaCpp:
    package = "llama-cpp-python"

    def __init__(self, job: Job) -> None:
        lib.llama_log_set(_SILENT, None)
        self.model = lib.llama_model_load_from_file(job["gguf"].encode(), lib.llama_model_default_params())
        self.vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.weights = job["file_type"]
        self.weight_bytes = lib.llama_model_size(self.model)
        self._threads, self._context = job["threads"], job["context"]
        self._shape, self._ctx, self._batch = (0, 0), None, lib.llama_batch_init(job["context"], 0, 1)

    def _reset(self, streams: int, tokens: int) -> None:
        """An empty context for so many streams of so many tokens; one stream gets all that the job needs."""
        each = self._context if streams == 1 else 256 * -(-tokens // 256)  # llama.cpp rounds up so itself
        if self._shape != (streams, each):
            if self._ctx is not None:
                lib.llama_free(self._ctx)
            params = lib.llama_context_default_params()
            params.n_ctx, params.n_seq_max = each * streams, streams
            params.n_threads = params.n_threads_batch = self._threads
            self._ctx, self._shape = lib.llama_init_from_model(self.model, params), (streams, each)
        lib.llama_memory_clear(lib.llama_get_memory(self._ctx), True)

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """Run rows of (token, position, stream, wants logits)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, stream, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, stream
        if lib.llama_decode(self._ctx, batch) != 0:
            raise RuntimeError("llama_decode failed")

    def _logits(self, row: int) -> np.ndarray:
        return np.ctypeslib.as_array(lib.llama_get_logits_ith(self._ctx, row), (self.vocab_size,))

    def generate(self, prompts: list[list[int]], new: int) -> Timing:
        self._reset(len(prompts), len(prompts[0]) + new)
        start = time.perf_counter()
        last = []
        for chunk in self._chunks(prompts):
            self._decode(chunk)
            last += [int(self._logits(i).argmax()) for i, row in enumerate(chunk) if row[3]]
        middle = time.perf_counter()
        for position in range(len(prompts[0]), len(prompts[0]) + new - 1):
            self._decode([(token, position, stream, True) for stream, token in enumerate(last)])
            last = [int(self._logits(i).argmax()) for i in range(len(last))]
        return Timing(middle - start, time.perf_counter() - middle, (new - 1) * len(prompts))

    def _chunks(self, prompts: list[list[int]]) -> list[list[tuple[int, int, int, bool]]]:
        """All rows of the prompts, in calls of at most the context's `n_batch`."""
        rows = [
            (token, position, stream, position == len(prompt) - 1)
            for stream, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        size = lib.llama_n_batch(self._ctx)
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def logits(self, tokens: list[int]) -> np.ndarray:
        self._reset(1, len(tokens))
        self._decode([(token, i, 0, True) for i, token in enumerate(tokens)])
        return np.stack([self._logits(i).copy() for i in range(len(tokens))])

    def nll(self, tokens: list[int]) -> float:
        self._reset(1, len(tokens))
        self._decode([(token, i, 0, True) for i, token in enumerate(tokens[:-1])])
        total = 0.0
        for i, target in enumerate(tokens[1:]):
            row = self._logits(i).astype(np.float64)
            top = row.max()
            total += top + np.log(np.exp(row - top).sum()) - row[target]
        return float(total)


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _SILENT(level: int, text: bytes, data: int) -> None:
    return None


if __name__ == "__main__":
    serve(LlamaCpp)
