"""How well the latency model foretells iterations that it was not fitted to.

    python benchmarks/latency_model.py [--mixes 60] [--fresh]

Profiles this machine (or takes the stored profile), then times random mixes of decodes, prompt chunks,
training rows and backward pieces, and compares. Target: mean absolute error of at most 15 %.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from statistics import mean, median
from typing import Any

from coserve import new_engine, new_trainer

from tokenloom.config import home
from tokenloom.engine.latency_model import LatencyModel
from tokenloom.engine.latency_profile import Cell
from tokenloom.finetune.profiler import EngineProfiler, stored_profile

TARGET = 0.15


def random_mixes(count: int, seed: int) -> list[Cell]:
    """Mixes between the cells of the grid: sizes are drawn from continuous (log-uniform) ranges."""
    source = random.Random(seed)

    def size(low: int, high: int) -> int:
        return round(low * (high / low) ** source.random())

    cells = []
    for _ in range(count):
        kind = source.random()
        if kind < 0.35:
            cells.append(Cell(decode_rows=size(1, 16), context=size(32, 1500)))
        elif kind < 0.65:
            cells.append(Cell(decode_rows=size(1, 16), context=size(32, 1500), train_rows=size(2, 200)))
        elif kind < 0.75:
            cells.append(Cell(decode_rows=size(1, 8), context=size(32, 800), prefill_rows=size(16, 200)))
        elif kind < 0.9:
            end = size(64, 1000)
            cells.append(Cell(bwd_rows=min(end, size(8, 256)), bwd_end=end))
        else:
            cells.append(Cell(loss_rows=size(4, 128)))
    return cells


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(4.6, 4.2))
    for kind in sorted({row["kind"] for row in rows}):
        points = [(row["predicted_ms"], row["measured_ms"]) for row in rows if row["kind"] == kind]
        axis.scatter(*zip(*points, strict=True), s=14, label=kind)
    ends = [min(row["measured_ms"] for row in rows), max(row["measured_ms"] for row in rows)]
    axis.plot(ends, ends, color="gray", linewidth=0.8)
    axis.set(
        xscale="log", yscale="log", xlabel="predicted ms", ylabel="measured ms", title="held-out iterations"
    )
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mixes", type=int, default=60)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--fresh", action="store_true", help="profile again although a profile is stored")
    parser.add_argument("--home", type=Path, default=None, help="where profiles are stored")
    parser.add_argument("--out", type=Path, default=Path("results/latency_model"))
    args = parser.parse_args()
    where = args.home or home()
    args.max_batch_tokens, args.temporal_every, args.tpot_ms, args.ttft_ms = 512, 64, 200.0, 2000.0
    engine = new_engine("off", args)
    trainer = new_trainer(engine)
    model: LatencyModel | None = None if args.fresh else stored_profile(engine, where)
    if model is None:
        profiler = EngineProfiler(engine, trainer.adapter, trainer.hyper, where)
        while (model := profiler.run_cell()) is None:
            continue
    held_out = EngineProfiler(
        engine, trainer.adapter, trainer.hyper, where, random_mixes(args.mixes, args.seed)
    )
    while held_out.measure_next():
        continue
    errors, rows = [], []
    kinds: dict[str, list[float]] = {}
    below = 0
    for features, measured_ms in held_out.samples:
        predicted_ms = model.predict(features)
        error = abs(predicted_ms - measured_ms) / measured_ms
        kind = "backward" if features.bwd_rows else "loss" if features.loss_rows else "batch"
        if kind == "batch" and features.train_rows:
            kind = "batch with training rows"
        kinds.setdefault(kind, []).append(error)
        errors.append(error)
        below += measured_ms <= predicted_ms * model.margin(features)
        rows.append({"kind": kind, "measured_ms": measured_ms, "predicted_ms": predicted_ms})
    for kind, found in sorted(kinds.items()):
        print(f"{kind:26s} {len(found):3d} mixes  mean error {mean(found):6.1%}  median {median(found):6.1%}")
    print(f"{'all':26s} {len(errors):3d} mixes  mean error {mean(errors):6.1%}  (target {TARGET:.0%})")
    print(f"within the plan (95 % wanted): {below / len(errors):.0%} of the mixes")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps({"mape": mean(errors), "rows": rows}, indent=1) + "\n")
    plot(rows, args.out / "latency_model.png")


if __name__ == "__main__":
    main()
