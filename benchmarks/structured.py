"""What structured output costs: compiling a grammar, a mask, and a token of an answer with and without one.

    python benchmarks/structured.py [--batch 1 4] [--tokens 96] [--repeats 5] [--json results.json]

One engine on the default model. Compiling is timed on grammars that were not seen before, with the mask
of the first token; `first use` is the library's view of the vocabulary, made once. Masks are timed alone,
along an answer. Answers of `--tokens` tokens are then written by a batch of each size, the kinds alternating:
without a processor, with one that allows everything (the hook's own part), and under a schema whose answer
cannot end before that. Reported are medians.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tokenloom.config import load_settings
from tokenloom.engine.engine import Engine
from tokenloom.engine.request import Request
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.structured import Grammar, Grammars, Structured, grammars_of
from tokenloom.structured.grammar import banned_tokens

PROMPT = "List the inhabitants of a small town as JSON, with name, age and trade:"


def people(number: int) -> Structured:
    """A schema of at least 40 people; each number is another grammar."""
    person = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 3, "maxLength": 40 + number},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "trade": {"enum": ["baker", "smith", "miller", "clerk", "none"]},
        },
        "required": ["name", "age", "trade"],
        "additionalProperties": False,
    }
    return Structured(json={"type": "array", "items": person, "minItems": 40})


@dataclass
class AllowsAll:
    """The hook without a grammar behind it."""

    def processor(self) -> AllowsAll:
        return self

    def apply(self, row: torch.Tensor) -> None:
        """Nothing is banned."""

    def accept(self, token: int) -> bool:
        return False


def compile_ms(engine: Engine, repeats: int) -> tuple[float, float, Grammar]:
    """The first use, later ones (median), and a grammar."""
    grammars = Grammars(engine.tokenizer, engine.config.vocab_size, engine.end_tokens, engine.settings.limits)
    times = []
    for number in range(repeats + 1):
        start = time.perf_counter()
        grammar = grammars.compile(people(number))
        times.append((time.perf_counter() - start) * 1e3)
    return times[0], median(times[1:]), grammar


def mask_ms(grammar: Grammar, tokens: list[int]) -> list[float]:
    """Each mask along an answer, computed and unpacked."""
    matcher, times = grammar.start.deep_copy(), []
    for token in tokens:
        if not matcher.consume_token(token):
            break
        start = time.perf_counter()
        banned_tokens(matcher, grammar.vocab_size, "json")
        times.append((time.perf_counter() - start) * 1e3)
    return times


def answers(engine: Engine, methods: list[Any], batch: int, tokens: int) -> tuple[float, list[int]]:
    """Milliseconds for each iteration that gives every choice a token, and the tokens of the first one."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, processors=methods)
    prompt = engine.tokenizer.encode(PROMPT)
    requests = [Request(f"r{i}", prompt, params) for i in range(batch)]
    for request in requests:
        engine.add(request)
    engine.step()
    start, steps = time.perf_counter(), 0
    while engine.has_work:
        engine.step()
        steps += 1
    return (time.perf_counter() - start) * 1e3 / steps, requests[0].sequences[0].output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    engine = Engine(load_settings({"coserve.mode": "off", "cache.prefix_caching": False}))
    first, later, _ = compile_ms(engine, options.repeats)
    kinds: dict[str, list[Any]] = {
        "no processor": [],
        "processor that allows all": [AllowsAll()],
        "schema": [grammars_of(engine).compile(people(0))],
    }
    _, written = answers(engine, kinds["schema"], 1, options.tokens)
    masks = sorted(mask_ms(kinds["schema"][0], written))
    results: dict[str, Any] = {
        "first_use_ms": first,
        "compile_ms": later,
        "mask_ms": {"median": median(masks), "worst": masks[-1]},
        "iteration_ms": {},
    }
    table = Table("batch", *kinds, title="ms per iteration of decodes")
    for batch in options.batch:
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(options.repeats):
            for kind, methods in kinds.items():
                times[kind].append(answers(engine, methods, batch, options.tokens)[0])
        row = {kind: median(values) for kind, values in times.items()}
        results["iteration_ms"][batch] = row
        base = row["no processor"]
        table.add_row(str(batch), *(f"{value:.2f} ({value / base:.2f}x)" for value in row.values()))
    console = Console()
    console.print(f"first use {first:.0f} ms, compiling {later:.1f} ms with the first mask")
    console.print(f"{len(masks)} masks: median {median(masks):.3f} ms, worst {masks[-1]:.2f} ms")
    console.print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
