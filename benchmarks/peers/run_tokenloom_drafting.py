"""tokenloom without and with a drafter; see `drafting_vs_llamacpp.py`.

A job is `{"model", "threads", "spec", "prompts", "new", "temperature", "seed"}`.
"""

from __future__ import annotations

import json
import sys

from tokenloom import LLM, SamplingParams
from tokenloom.bench.drafting.run import answer
from tokenloom.methods.drafting import draft_method
from tokenloom.version import __version__


def main() -> None:
    job = json.load(sys.stdin)
    llm = LLM(
        job["model"],
        model__threads=job["threads"],
        drafting__persist=False,
        cache__prefix_caching=False,
        methods__draft=job["spec"],  # pass times are measured before anything is
    )
    params = SamplingParams(
        temperature=job["temperature"], max_tokens=job["new"], seed=job["seed"], ignore_eos=True
    )
    method = draft_method(job["spec"])
    runs = []
    for prompt in [job["prompts"][0][:32], *job["prompts"]]:  # the first one is not reported
        given = answer(llm.engine, [prompt], params, method)
        runs.append({"tokens": given.tokens[0], "seconds": given.seconds})
    print(json.dumps({"version": __version__, "runs": runs[1:]}), flush=True)


if __name__ == "__main__":
    main()
