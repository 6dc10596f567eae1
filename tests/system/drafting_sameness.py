"""Greedy answers of the default model with every drafter against those without: 50 prompts of 256 tokens.

python tests/system/drafting_sameness.py            # about ten minutes on two cores
python tests/system/drafting_sameness.py --prompts 4 --new-tokens 32 --spec ngram --spec "ppd(rows=16)"

Says for each drafter how many answers equal the undrafted ones, and of the others how close the two likeliest
tokens were where they part: on backends that round differently in other batches a tie may fall the other way.
Ends with 1 if any differs. Nothing is kept, and nothing is known of the prompts at first.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from tokenloom import LLM, SamplingParams
from tokenloom.bench.drafting.prompts import KINDS, build
from tokenloom.engine.outputs import Completion
from tokenloom.errors import RequestError
from tokenloom.methods.drafting.ppd import Learned

SPECS = (
    *("ngram", "ngram(fixed=True)", "token_recycling", "token_recycling(tree=n16)"),
    *("token_recycling(tree=paper80)", "token_recycling+ngram", "token_recycling(tree=n16)+ngram"),
    *("ppd", "ppd(rows=16)", "token_recycling(tree=n16)+ppd(rows=16)"),
    *("draft_model(layers=8)", "draft_model(layers=4, tokens=2, fixed=True)"),
)


def gap(completion: Completion, at: int) -> float:
    """Between the logarithms of the two likeliest tokens at one place of an answer."""
    (_, first), (_, second), *_ = (completion.logprobs or [])[at].top
    return first - second


def give_vectors(llm: LLM) -> None:
    """Random ones for `ppd` where none were trained for this model: answers are the same all the same."""
    try:
        llm.generate("a", SamplingParams(max_tokens=1), draft="ppd")
    except RequestError:
        noise = torch.randn(3, llm.engine.config.hidden_size, generator=torch.Generator().manual_seed(0))
        rates = tuple(tuple(0.4 / (rank + 1) for rank in range(10)) for _ in range(3))
        llm.engine.drafting.shared["ppd"] = Learned(0.1 * noise.to(llm.engine.dtype), rates)
        print("ppd was not trained for this model: it guesses by random vectors", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--streams", type=int, default=4, help="prompts answered together")
    parser.add_argument("--spec", action="append", help="by default every drafter")
    parser.add_argument("--model", default=None)
    parser.add_argument("--backend", default="auto")
    chosen = parser.parse_args()
    given = {} if chosen.model is None else {"model": chosen.model}
    llm = LLM(**given, model__backend=chosen.backend, drafting__persist=False, cache__prefix_caching=False)
    each = -(-chosen.prompts // len(KINDS))
    prompts = [ids for kind in KINDS for ids in build(llm.tokenizer, kind, each)][: chosen.prompts]
    params = SamplingParams(temperature=0.0, max_tokens=chosen.new_tokens, ignore_eos=True, logprobs=2)

    def answers(draft: str) -> list[Completion]:
        start, found = time.monotonic(), []
        for first in range(0, len(prompts), chosen.streams):
            part = llm.generate(prompts[first : first + chosen.streams], params, draft=draft)
            found += [output.completions[0] for output in part]
        print(f"{draft}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        return found

    give_vectors(llm)
    plain, differing = answers("off"), 0
    for spec in chosen.spec or SPECS:
        drafted = answers(spec)
        pairs = [(x.token_ids, y.token_ids) for x, y in zip(drafted, plain, strict=True)]
        parted = [number for number, (x, y) in enumerate(pairs) if x != y]
        differing += len(parted)
        print(f"{spec}: {len(pairs) - len(parted)} of {len(pairs)} answers are the same", flush=True)
        for number in parted:
            at = next(i for i, (a, b) in enumerate(zip(*pairs[number], strict=True)) if a != b)
            print(f"  prompt {number} parts at token {at}, where the gap is {gap(plain[number], at):.2g}")
    return 1 if differing else 0


if __name__ == "__main__":
    raise SystemExit(main())
