"""Drafters times workloads: each prompt is answered without drafting, then by every drafter."""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from tokenloom.bench.drafting import prompts as workloads
from tokenloom.engine.draft import DraftMethod
from tokenloom.engine.draft_size import ENGINE_TRIALS, Acceptance
from tokenloom.engine.drafting import Drafting
from tokenloom.engine.engine import Engine
from tokenloom.engine.request import Request
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.kernels import describe
from tokenloom.llm import LLM
from tokenloom.methods.drafting import draft_method

VERSION = 2
REPEATED = 8
"""An n-gram so long that was there before is a repetition."""
LOOPING = 0.2
"""An answer with a larger share of repetitions proves nothing: loops are easily foretold."""


@dataclass
class Answer:
    """What some prompts, answered together, took from the moment when each had its first token.

    Attributes:
        tokens: all tokens of each answer.
        passes, seconds, decoded: from that moment on; passes of each sequence, decoded tokens.
        guessing_s: of these seconds, what planning guesses and learning from them took.
    """

    tokens: list[list[int]] = field(default_factory=list)
    passes: int = 0
    seconds: float = 0.0
    decoded: int = 0
    guessing_s: float = 0.0
    drafted: int = 0
    accepted: int = 0
    accepted_at: list[int] = field(default_factory=list)


def measure(
    llm: LLM,
    specs: Sequence[str],
    kinds: Sequence[str],
    *,
    temperatures: Sequence[float] = (0.0, 0.7),
    count: int = 4,
    new_tokens: int = 128,
    streams: int = 1,
    seed: int = 0,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Answer all prompts with every drafter.

    Each drafter has knowledge of its own, which begins anew with each temperature: it goes on learning from
    prompt to prompt and from one workload to the next, but has never seen an answer to the prompt at hand.

    Args:
        count: prompts of each kind; streams: how many are answered together.

    Returns:
        Ready for JSON: a row for each temperature, kind and drafter.

    Raises:
        RequestError: a spec or a kind does not exist.
    """
    engine = llm.engine
    methods: dict[str, DraftMethod | None] = {"off": None, **{spec: draft_method(spec) for spec in specs}}
    found = {kind: workloads.build(engine.tokenizer, kind, count, seed) for kind in kinds}
    warm = next(iter(found.values()))[0]
    for method in methods.values():  # first touch of memory; how long passes take
        answer(engine, [warm], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True), method)
    rows: list[dict[str, Any]] = []
    for temperature in temperatures:
        minds: dict[str, tuple[dict[Any, Any], Acceptance]] = {
            spec: ({}, Acceptance(ENGINE_TRIALS)) for spec in methods
        }
        params = SamplingParams(temperature=temperature, max_tokens=new_tokens, seed=seed, ignore_eos=True)
        for kind, asked in found.items():
            answers: dict[str, list[Answer]] = {spec: [] for spec in methods}
            for at in range(0, count, streams):
                for spec, method in methods.items():
                    engine.drafting.shared, engine.drafting.acceptance = minds[spec]
                    tell(f"temperature {temperature}: {kind} {at + 1} of {count}, {spec}")
                    answers[spec].append(answer(engine, asked[at : at + streams], params, method))
            for spec, given in answers.items():
                row = _row(given, answers["off"])
                rows.append({"temperature": temperature, "workload": kind, "spec": spec, **row})
    return {
        "version": VERSION,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "model": engine.name,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "device": str(engine.device),
        "backend": describe(engine.decoder.kernels),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {platform.processor() or platform.system()}",
        "prompts": count,
        "new_tokens": new_tokens,
        "streams": streams,
        "seed": seed,
        "rows": rows,
    }


def answer(
    engine: Engine, asked: list[list[int]], params: SamplingParams, method: DraftMethod | None
) -> Answer:
    """Answer prompts together."""
    requests = [Request(f"bench-{i}", ids, params, draft=method) for i, ids in enumerate(asked)]
    for request in requests:
        engine.add(request)
    sequences = [request.sequences[0] for request in requests]
    found, start, at_start = Answer(), 0.0, 0
    with _clocked(engine.drafting) as clock:
        while engine.has_work:
            if not start and all(sequence.num_output for sequence in sequences):
                start, at_start = time.perf_counter(), sum(sequence.num_output for sequence in sequences)
                clock[0] = 0.0
            if start:
                found.passes += sum(sequence.finish_reason is None for sequence in sequences)
            engine.step()
        found.seconds, found.guessing_s = time.perf_counter() - start, clock[0]
    found.tokens = [sequence.output for sequence in sequences]
    found.decoded = sum(map(len, found.tokens)) - at_start
    for request in requests:
        drafts = request.drafts
        found.drafted += drafts.tokens
        found.accepted += drafts.accepted
        longest = max(len(found.accepted_at), len(drafts.accepted_at))
        found.accepted_at = [
            sum(counts[i] for counts in (found.accepted_at, drafts.accepted_at) if i < len(counts))
            for i in range(longest)
        ]
    return found


@contextmanager
def _clocked(drafting: Drafting) -> Iterator[list[float]]:
    """Adds up the seconds that guessing takes besides its rows."""
    clock = [0.0]

    def timed(work: Callable[..., None]) -> Callable[..., None]:
        def run(*given: Any) -> None:
            start = time.perf_counter()
            work(*given)
            clock[0] += time.perf_counter() - start

        return run

    vars(drafting).update(plan=timed(drafting.plan), settle=timed(drafting.settle))
    try:
        yield clock
    finally:
        del vars(drafting)["plan"], vars(drafting)["settle"]


def _row(given: list[Answer], plain: list[Answer]) -> dict[str, Any]:
    decoded, passes = sum(a.decoded for a in given), sum(a.passes for a in given)
    seconds, before = sum(a.seconds for a in given), sum(a.seconds for a in plain)
    straight = [a for a in given if max(map(repeated, a.tokens)) < LOOPING]
    return {
        "tokens": decoded,
        "passes": passes,
        "tokens_per_s": decoded / seconds,
        "speedup": (decoded / seconds) / (sum(a.decoded for a in plain) / before),
        "tokens_per_pass": decoded / passes,
        "tokens_per_pass_without_loops": _ratio(straight),
        "guessing_ms_per_pass": sum(a.guessing_s for a in given) / passes * 1e3,
        "drafted": sum(a.drafted for a in given),
        "accepted": sum(a.accepted for a in given),
        "accepted_at": [
            sum(a.accepted_at[i] for a in given if i < len(a.accepted_at))
            for i in range(max(len(a.accepted_at) for a in given))
        ],
        "repeated": sum(repeated(t) for a in given for t in a.tokens) / sum(len(a.tokens) for a in given),
        "answers": [
            {
                "tokens": a.decoded,
                "passes": a.passes,
                "repeated": sum(map(repeated, a.tokens)) / len(a.tokens),
            }
            for a in given
        ],
        "same_text": all(a.tokens == b.tokens for a, b in zip(given, plain, strict=True)),
    }


def _ratio(answers: list[Answer]) -> float | None:
    passes = sum(a.passes for a in answers)
    return sum(a.decoded for a in answers) / passes if passes else None


def repeated(tokens: list[int]) -> float:
    """Share of n-grams of 8 that were there before."""
    grams = [tuple(tokens[i : i + REPEATED]) for i in range(len(tokens) - REPEATED + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
