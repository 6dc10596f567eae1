"""tokenloom, through its engine in this process."""

from __future__ import annotations

import time

from worker import Job, Timing, serve

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

    def nll(self, tokens: list[int]) -> float:
        return -self.llm.score(tokens)[0].total


if __name__ == "__main__":
    serve(Tokenloom)
