"""Beyond a model's context: nats per token of text, by length, of dense attention at original positions
and of `tokenselect(positions=compact)` (arXiv 2411.02886).

    python benchmarks/extrapolation.py --lengths 4000,8000,10000,12000

Dense attention is given a longer table of rotations than the model was trained for: that is what fails. Each
row is one method; columns are the last `--rows` tokens of a text of each length, fed one by one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from statistics import fmean
from typing import Any

from tokenloom.bench.kv.quality import quality
from tokenloom.bench.kv.teacher import TeacherEngine
from tokenloom.bench.kv.text import Corpus
from tokenloom.config import load_settings
from tokenloom.errors import RequestError
from tokenloom.methods.kv import combine
from tokenloom.models.catalog import DEFAULT_MODEL
from tokenloom.models.loader import open_model

SPECS = ("off", "tokenselect(budget={budget}, chunk={chunk}, theta=1.0, positions=compact)")


def nll(engine: TeacherEngine, spec: str, tokens: list[int], rows: int) -> float:
    """Of the last tokens, nats each; inf where something was not finite."""
    prompt, given = tokens[:-rows], tokens[-rows:]
    run = engine.run(prompt, given, combine(spec))
    if not all(bool(row.isfinite().all()) for row in run.logits):
        return math.inf
    return quality(run.logits, run.logits, run.tokens, (range(1, rows),))["nll"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--lengths", default="4000,8000,10000,12000", help="texts of so many tokens")
    parser.add_argument("--rows", type=int, default=64, help="of which so many last ones are scored")
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--text", default="docs", help="docs, code or a file")
    parser.add_argument("--samples", type=int, default=1, help="places in the text; means are shown")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    lengths = [int(length) for length in args.lengths.split(",")]
    files = open_model(args.model)
    trained = files.config.max_position
    longer = dataclasses.replace(files.config, max_position=max(trained, *lengths) + 1)
    settings = load_settings({"model.name": args.model, "cache.prefix_caching": False})
    # Dense attention needs the longer table; methods run on the model as it is.
    engines = {
        "off": TeacherEngine(settings, dataclasses.replace(files, config=longer)),
        "other": TeacherEngine(settings, files),
    }
    corpus = Corpus(files.tokenizer, args.text)
    texts = [corpus.take(max(lengths)) for _ in range(args.samples)]
    results: dict[str, Any] = {"trained": trained, "nll": {}}
    for spec in (s.format(budget=args.budget, chunk=args.chunk) for s in SPECS):
        engine = engines["off" if spec == "off" else "other"]
        row = results["nll"].setdefault(spec, {})
        for length in lengths:
            try:
                row[length] = fmean(nll(engine, spec, text[:length], args.rows) for text in texts)
            except RequestError as error:
                row[length] = None
                print(f"{spec} at {length}: {error}")
    if args.json:
        print(json.dumps(results, indent=2))
        return
    print(f"nats per token, the last {args.rows} of a text (the model was trained on {trained} tokens)")
    print("| method | " + " | ".join(map(str, lengths)) + " |\n|---|" + "---|" * len(lengths))
    for spec, row in results["nll"].items():
        print(f"| `{spec}` | " + " | ".join("-" if v is None else f"{v:.3f}" for v in row.values()) + " |")


if __name__ == "__main__":
    main()
