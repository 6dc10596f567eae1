"""What every peer of `peers_cpu.py` has in common: a job comes in as JSON, one line of JSON goes out.

Runs under each peer's own interpreter, so it needs nothing but the standard library. A job is
`{"part", "model", "threads", "context", "seed", "sizes", "texts", ...}`:

- part "speed": a decode of one sequence, prefills, concurrent streams, then the process's memory.
- part "growth": milliseconds per decoded token at each context length.
- part "quality": negative log-likelihood of text in windows.
- part "logits": the logits of those windows' rows, into the file `job["to"]`.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol

Job = dict[str, Any]
VOCAB_SIZE = 49152


@dataclass(frozen=True)
class Timing:
    """One greedy generation: seconds until every stream has its first token, then until the last token of
    all, and how many tokens came in that second phase."""

    first_s: float
    rest_s: float
    rest_tokens: int


class Peer(Protocol):
    """An engine that has loaded the model.

    Attributes:
        package: the distribution whose version is reported.
        weights: how its weights are stored, in words.
        weight_bytes: bytes of weights that decoding one token reads (the output head whole, the embedding
            table only where it is that head).
    """

    package: str
    weights: str
    weight_bytes: int

    def generate(self, prompts: list[list[int]], new: int) -> Timing:
        """Decode `new` tokens after each prompt, all at once, greedily and past any end token."""

    def nll(self, tokens: list[int]) -> float:
        """Sum of -log p(token | all before it), natural, over all tokens but the first."""


def serve(load: Callable[[Job], Peer]) -> None:
    """Do the job on stdin; its result is the only line on stdout, whatever the peer's libraries print."""
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = json.load(sys.stdin)
    peer = load(job)
    measure = {"speed": speed, "growth": growth, "quality": quality, "logits": logits}[job["part"]]
    result = {
        "version": version(peer.package),
        "weights": peer.weights,
        "weight_bytes": peer.weight_bytes,
        **measure(peer, job),
    }
    print(json.dumps(result), file=stdout, flush=True)
    os._exit(0)  # some of these libraries do not survive the interpreter's own clean-up


def speed(peer: Peer, job: Job) -> dict[str, Any]:
    """Each shape is run once unrecorded, with a prompt of its own, before it is timed."""
    sizes, draw = job["sizes"], _Prompts(job["seed"])
    result: dict[str, Any] = {}

    peer.generate([draw(sizes["decode_prompt"])], 8)
    timing = peer.generate([draw(sizes["decode_prompt"])], sizes["decode_new"])
    result["decode"] = timing.rest_tokens / timing.rest_s

    for length in sizes["prefill"]:
        peer.generate([draw(length)], 1)
        result[f"prefill_{length}"] = length / peer.generate([draw(length)], 1).first_s

    count, new = sizes["streams"], sizes["stream_new"]
    peer.generate([draw(sizes["stream_prompt"]) for _ in range(count)], 4)
    timing = peer.generate([draw(sizes["stream_prompt"]) for _ in range(count)], new)
    result["streams"] = timing.rest_tokens / timing.rest_s
    result["streams_whole"] = count * new / (timing.first_s + timing.rest_s)
    result.update(memory())
    return result


def growth(peer: Peer, job: Job) -> dict[str, Any]:
    """`ms_per_token`: by context length, over the decode steps that end at that length."""
    new, draw = job["sizes"]["growth_new"], _Prompts(job["seed"])
    peer.generate([draw(64)], 4)
    result = {}
    for context in job["sizes"]["contexts"]:
        timing = peer.generate([draw(context - new)], new)
        result[str(context)] = timing.rest_s / timing.rest_tokens * 1e3
    return {"ms_per_token": result}


def quality(peer: Peer, job: Job) -> dict[str, Any]:
    """`nll` and `nll_tokens`; exp of their quotient is the perplexity. None if the peer gives no logits."""
    if not hasattr(peer, "nll"):
        return {"nll": None, "nll_tokens": 0}
    windows = job["texts"]
    return {
        "nll": sum(peer.nll(window) for window in windows),
        "nll_tokens": sum(len(window) - 1 for window in windows),
    }


def logits(peer: Peer, job: Job) -> dict[str, Any]:
    """Writes float32 `[windows, window, vocab]`, for peers that have a method of that name."""
    import numpy

    numpy.save(job["to"], numpy.stack([peer.logits(window) for window in job["texts"]]))  # type: ignore[attr-defined]
    return {}


def memory() -> dict[str, int]:
    """Resident bytes of this process: now, and at its peak."""
    with open("/proc/self/status") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    return {f"{key}_bytes": int(fields[name].split()[0]) * 1024 for key, name in _MEMORY}


_MEMORY = (("resident", "VmRSS"), ("peak", "VmHWM"))


class _Prompts:
    """Prompts of given lengths; no two begin alike, and every peer gets the same ones."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def __call__(self, length: int) -> list[int]:
        return [self._random.randrange(100, VOCAB_SIZE) for _ in range(length)]
