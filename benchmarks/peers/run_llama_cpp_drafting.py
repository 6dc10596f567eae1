"""llama.cpp, through llama-cpp-python, without and with its prompt lookup; see `drafting_vs_llamacpp.py`.

A job is `{"gguf", "threads", "context", "lookup", "prompts", "new", "temperature", "seed"}`; `lookup` is how
many tokens are guessed, 0 for none.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version

from llama_cpp import Llama
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding


def main() -> None:
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = json.load(sys.stdin)
    lookup = LlamaPromptLookupDecoding(num_pred_tokens=job["lookup"]) if job["lookup"] else None
    llama = Llama(
        job["gguf"],
        n_ctx=job["context"],
        n_threads=job["threads"],
        n_threads_batch=job["threads"],
        draft_model=lookup,
        verbose=False,
    )
    runs = []
    for prompt in [job["prompts"][0][:32], *job["prompts"]]:  # the first one is not reported
        llama.reset()
        llama.set_seed(job["seed"])
        start, tokens = 0.0, []
        for token in llama.generate(prompt, top_k=0, top_p=1.0, min_p=0.0, temp=job["temperature"]):
            tokens.append(token)
            if not start:
                start = time.perf_counter()
            if len(tokens) == job["new"]:
                break
        runs.append({"tokens": tokens, "seconds": time.perf_counter() - start})
    print(json.dumps({"version": version("llama-cpp-python"), "runs": runs[1:]}), file=stdout, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
