"""Retrieval with headroom: a small model trained to recall values by keys, under every KV method and budget.

    python benchmarks/kv_retrieval.py --train-seconds 480            # trains once, then measures
    python benchmarks/kv_retrieval.py --model results/recall-model   # measures again

A prompt is `--pairs` pairs of a key and a value; after it come some keys, and each has to bring back its
value (teacher-forced, through the engine). Selectors should hold; whoever drops before the question is known
falls in proportion to the budget; with the keys among the prompt's last tokens (`asked first`), scorers that
look there hold too. Writes results.json and accuracy.png. (FASA is left out:
it is calibrated by a model of text.)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from recall_model import CONTEXT, Recall, sample, save, train

from tokenloom.bench.kv.quality import quality
from tokenloom.bench.kv.specs import candidates, parse_budgets
from tokenloom.bench.kv.teacher import TeacherEngine
from tokenloom.config import load_settings
from tokenloom.errors import RequestError

EVICTORS = [
    "random(window=4, sinks=1)",
    "streaming(sinks=1)",
    "knorm(sinks=1)",
    "keydiff(window=4, sinks=1)",
    "snapkv(window=4)",
    "snapkv(window=4)+adakv",
    "h2o(min_prompt=0, row_norm=True, sinks=1)",
    "keyformer(min_prompt=0)",
]
SELECTORS = [
    "quest(page=4, dense_layers=0, group=q)",
    "tokenselect(prefill=False, theta=1.0, n_init=1, n_local=4)",
    "tokenselect(prefill=False, theta=1.0, n_init=1, n_local=4, vote=random)",
]
FIRST = " asked first"


def found(engine: TeacherEngine, texts: list[Recall], spec: Any, first: bool) -> dict[str, float]:
    """The part of values that are found, and bytes and reads as parts of the context's."""
    numbers = []
    for text in texts:
        prompt = text.context + (text.asked if first else [])
        given = ([] if first else text.asked) + text.told
        begin = len(given) - len(text.told)
        answers = tuple(range(i, i + 1) for i in range(begin + 1, len(given), 2))
        run = engine.run(prompt, given, spec)
        right = quality(run.logits, run.logits, given, answers)["accuracy"]
        reads = fmean(run.tokens_read) / (len(prompt) + len(given) / 2)
        numbers.append({"accuracy": right, "kv_bytes": run.kv_bytes[0], "read_part": reads})
    return {key: fmean(one[key] for one in numbers) for key in numbers[0]}


def measure(engine: TeacherEngine, texts: list[Recall], budgets: list[int | float]) -> list[dict[str, Any]]:
    """One row for each method, budget and place of the question."""
    rows = []
    for first in (False, True):
        for candidate in candidates(EVICTORS + ([] if first else SELECTORS), budgets):
            row = {"family": candidate.family + FIRST * first, "budget": candidate.budget}
            try:
                row.update(found(engine, texts, candidate.method(), first))
            except RequestError as error:
                print(f"left out: {candidate.spec}: {error}")
                continue
            print(f"{row['family']:72} {row['budget']!s:6} found {row['accuracy']:.2f}", flush=True)
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], budgets: list[int | float]) -> str:
    """Markdown: methods by budgets."""
    lines = ["| method | " + " | ".join(map(str, budgets)) + " |", "|---" * (len(budgets) + 1) + "|"]
    for family in dict.fromkeys(row["family"] for row in rows):
        own = {row["budget"]: row["accuracy"] for row in rows if row["family"] == family}
        cells = [own.get(budget, own.get(None)) for budget in budgets]
        shown = ["-" if cell is None else f"{cell:.2f}" for cell in cells]
        lines.append(f"| `{family}` | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    for axis, first in zip(axes, (False, True), strict=True):
        own = [row for row in rows if row["family"].endswith(FIRST) == first and row["budget"] is not None]
        for i, family in enumerate(dict.fromkeys(row["family"] for row in own)):
            line = sorted((row["budget"], row["accuracy"]) for row in own if row["family"] == family)
            label = family.removesuffix(FIRST)
            axis.plot(*zip(*line, strict=True), marker="o", color=f"C{i}", label=label)
        axis.plot((0, 1), (0, 1), color="#999999", linestyle=":", label="in proportion")
        axis.set(
            title="asked before anything is dropped" if first else "asked after the prompt",
            xlabel="budget, part of the prompt",
        )
    axes[0].set_ylabel("values found")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", type=Path, help="a folder that an earlier run has written")
    parser.add_argument("--train-seconds", type=float, default=480.0)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--first-pairs", type=int, default=8, help="training begins with so many")
    parser.add_argument("--rate", type=float, default=1e-3, help="of learning")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--budget", default="grid", help="parts of the prompt, or grid")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("results/kv-retrieval"))
    args = parser.parse_args()
    if not 1 <= args.questions <= args.pairs <= 128 or 5 * args.pairs + 3 > CONTEXT:
        parser.error("--questions is at most --pairs, and that at most 128")
    trained = None
    if args.model is None:
        model, trained = train(
            args.train_seconds, args.pairs, first=args.first_pairs, rate=args.rate, seed=args.seed
        )
        args.model = save(model, args.output / "model")
        print(f"trained: {trained:.3f} of the values found in its last batches of {args.pairs} pairs")
    settings = load_settings({"model.name": str(args.model), "model.quantize": "none", "cache.block_size": 1})
    engine = TeacherEngine(settings)
    generator = torch.Generator().manual_seed(args.seed + 1)
    texts = [sample(args.pairs, args.questions, generator) for _ in range(args.samples)]
    budgets = parse_budgets(args.budget)
    rows = measure(engine, texts, budgets)
    if rows[0]["accuracy"] < 0.9:
        print("the model itself recalls too little to tell methods apart: train for longer")
    args.output.mkdir(parents=True, exist_ok=True)
    about = {"trained": trained, "pairs": args.pairs, "questions": args.questions, "samples": args.samples}
    (args.output / "results.json").write_text(json.dumps({**about, "rows": rows}, indent=2))
    plot(rows, args.output / "accuracy.png")
    print(table(rows, budgets))


if __name__ == "__main__":
    main()
