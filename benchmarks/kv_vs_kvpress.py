"""tokenloom's KV methods beside NVIDIA's kvpress, on the same weights and prompts, at the same kept parts.

    sh benchmarks/peers_setup.sh transformers kvpress     # once
    python benchmarks/kv_vs_kvpress.py [--ratios 0.25,0.5,0.75] [--samples 1] [--out results/kv_vs_kvpress]

Both sides compute in float32 on the weights that transformers made of the default model's GGUF, with the
knobs of kvpress's presses (SnapKV's window is 64, KeyDiff pins nothing). Every probe is a prompt, compressed
when it is complete, and tokens that follow it, fed one at a time; see `tokenloom bench kv`.

- quality: a process for each side runs all methods and parts; KL is to the same side's dense attention.
- cost: a process for each side, method and round, by turns; one text prompt, `--cost-rows` rows. Medians.
  Memory is the process's peak above what it held once the model was loaded and warm; KV bytes are those of
  the cache after the prompt: tensors in kvpress, blocks of the pool in tokenloom. A third side is tokenloom
  on weights as they are in the GGUF, which is how it runs unless told otherwise.

Writes results.json and kv_vs_kvpress.png to the output folder.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from math import exp
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from tokenloom.bench.kv.probes import Sizes, build
from tokenloom.bench.kv.text import Corpus
from tokenloom.models.catalog import DEFAULT_MODEL
from tokenloom.models.loader import open_model

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / ".peers" / "models" / "hf"
WORKERS = ROOT / "benchmarks" / "peers"
OURS = (Path(sys.executable), WORKERS / "run_tokenloom_kv.py")
THEIRS = (ROOT / ".peers" / "kvpress" / "bin" / "python", WORKERS / "run_kvpress.py")
# By name: the interpreter, its worker, and what is particular to its jobs.
SIDES: dict[str, tuple[Path, Path, dict[str, str]]] = {
    "tokenloom": (*OURS, {"model": str(MODEL), "quantize": "none"}),
    "kvpress": (*THEIRS, {"model": str(MODEL)}),
    "tokenloom, 4 bits": (*OURS, {"model": DEFAULT_MODEL, "quantize": "auto"}),
}
SAME_WEIGHTS = ("tokenloom", "kvpress")
SHARED = ("snapkv", "streaming", "keydiff", "pyramid", "adakv", "random")
OURS_ALONE = ("keydiff, ours", "tokenselect")
COST_RATIO = 0.25


def work(side: str, job: dict[str, Any]) -> dict[str, Any]:
    """One job in a fresh process."""
    python, worker, own = SIDES[side]
    done = subprocess.run(
        [python, worker],
        check=False,
        input=json.dumps({**job, **own}),
        capture_output=True,
        text=True,
        timeout=3600,
    )
    if done.returncode != 0:
        raise SystemExit(f"{side}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def probes_of(kinds: list[str], sizes: Sizes) -> list[dict[str, Any]]:
    tokenizer = open_model(str(MODEL)).tokenizer
    found = [p for p in build(kinds, Corpus(tokenizer), sizes) if p.group != "copy absent"]
    return [
        {
            "group": p.group,
            "prompt": p.prompt,
            "given": p.given,
            "answers": [(a.start, a.stop) for a in p.answers],
        }
        for p in found
    ]


def by_group(case: dict[str, Any]) -> dict[str, dict[str, float]]:
    groups: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(probe["group"] for probe in case["probes"]):
        members = [probe for probe in case["probes"] if probe["group"] == name]
        keys = [key for key in members[0] if key != "group"]
        groups[name] = {key: fmean(member[key] for member in members) for key in keys}
    return groups


def measure_quality(args: argparse.Namespace, ratios: list[float]) -> list[dict[str, Any]]:
    sizes = Sizes(rows=args.rows, samples=args.samples, places={"middle": 0.5})
    probes = probes_of(["text", "copy", "multikey"], sizes)
    job = {"threads": args.threads, "quality": True, "probes": probes}
    rows = []
    for side in SAME_WEIGHTS:
        names = SHARED if side == "kvpress" else SHARED + OURS_ALONE
        cases = [("dense", 1.0), *((name, ratio) for name in names for ratio in ratios)]
        result = work(side, {**job, "cases": cases})
        rows += [
            {"side": side, "method": case["name"], "ratio": case["ratio"], "groups": by_group(case)}
            for case in result["cases"]
        ]
    return rows


def measure_cost(args: argparse.Namespace) -> list[dict[str, Any]]:
    sizes = Sizes(prompt_tokens=args.cost_prompt, rows=args.cost_rows)
    job = {
        "model": str(MODEL),
        "threads": args.threads,
        "quality": False,
        "probes": probes_of(["text"], sizes),
    }
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for number in range(args.repeats):
        for name in ("dense", *args.cost_methods.split(",")):
            for side in list(SIDES)[:: 1 if number % 2 == 0 else -1]:
                case = work(side, {**job, "cases": [(name, COST_RATIO)]})["cases"][0]
                numbers = {key: case["probes"][0][key] for key in ("ttft_ms", "tpot_ms", "kv_bytes")}
                found.setdefault((side, name), []).append({**numbers, "peak_bytes": case["peak_bytes"]})
    return [
        {"side": side, "method": name, **{key: median(run[key] for run in runs) for key in runs[0]}}
        for side in SIDES
        for (of, name), runs in found.items()
        if of == side
    ]


def print_tables(results: dict[str, Any], console: Console) -> None:
    console.print(f"{results['machine']}; {results['date']}", highlight=False)
    heads = ("KL", "top-1", "perplexity", "copy NLL", "keys", "keys NLL")
    table = Table("method", "kept", *heads, title="tokenloom / kvpress")
    rows = {(row["side"], row["method"], row["ratio"]): row["groups"] for row in results["quality"]}
    for (side, method, ratio), ours in rows.items():
        if side != "tokenloom":
            continue
        theirs = rows.get(("kvpress", method, ratio))
        both = [ours] if theirs is None else [ours, theirs]
        table.add_row(
            method, f"{ratio:.0%}", *(" / ".join(cell) for cell in zip(*map(_cells, both), strict=True))
        )
    if results["quality"]:
        console.print(table)
    title = f"{COST_RATIO:.0%} kept; {' / '.join(SIDES)}"
    table = Table("method", "KV MB", "peak MB", "TTFT ms", "TPOT ms", title=title)
    for method in dict.fromkeys(row["method"] for row in results["cost"]):
        row = [row for row in results["cost"] if row["method"] == method]
        units = (("kv_bytes", 1e-6), ("peak_bytes", 1e-6), ("ttft_ms", 1), ("tpot_ms", 1))
        table.add_row(method, *(" / ".join(f"{r[key] * scale:.1f}" for r in row) for key, scale in units))
    if results["cost"]:
        console.print(table)


def _cells(groups: dict[str, dict[str, float]]) -> list[str]:
    text, copy = groups["text"], groups["copy middle"]
    cells = [f"{text['kl']:.3f}", f"{text['agreement']:.2f}", f"{exp(text['nll']):.2f}", f"{copy['nll']:.2f}"]
    return [*cells, f"{groups['multikey']['exact']:.2f}", f"{groups['multikey']['nll']:.2f}"]


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = (
        ("text", "kl", "text: KL to dense"),
        ("copy middle", "nll", "copy: NLL"),
        ("multikey", "nll", "keys: NLL"),
    )
    figure, axes = pyplot.subplots(1, 5, figsize=(19, 4), layout="constrained")
    for axis, (group, key, title) in zip(axes, panels, strict=False):
        for i, method in enumerate(SHARED):
            for side, style in (("tokenloom", "-o"), ("kvpress", "--x")):
                points = [
                    (100 * row["ratio"], row["groups"][group][key])
                    for row in results["quality"]
                    if row["side"] == side and row["method"] == method
                ]
                if points:
                    label = f"{method} ({side})" if axis is axes[0] else None
                    axis.plot(*zip(*points, strict=True), style, color=f"C{i}", label=label)
        axis.set(title=title, xlabel="% of the prompt kept")
    for axis, (key, scale, title) in zip(
        axes[3:],
        (("peak_bytes", 1e-6, "peak MB above the model"), ("tpot_ms", 1, "ms per token")),
        strict=True,
    ):
        names = list(dict.fromkeys(row["method"] for row in results["cost"]))
        for i, side in enumerate(SIDES):
            own = {row["method"]: row[key] * scale for row in results["cost"] if row["side"] == side}
            places = [x + 0.27 * (i - 1) for x in range(len(names))]
            axis.bar(places, [own[name] for name in names], 0.27, label=side)
        axis.set_xticks(range(len(names)), names, rotation=30)
        axis.set_title(title)
        axis.margins(y=0.3)
        axis.legend(loc="upper right", ncols=3, fontsize="x-small")
    axes[0].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ratios", default="0.25,0.5,0.75", help="parts of the prompt kept")
    parser.add_argument("--samples", type=int, default=1, help="texts of each kind of probe")
    parser.add_argument("--rows", type=int, default=64, help="teacher-forced rows of text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", nargs="+", choices=("quality", "cost"), default=["quality", "cost"])
    parser.add_argument("--repeats", type=int, default=3, help="rounds of cost")
    parser.add_argument("--cost-prompt", type=int, default=1536)
    parser.add_argument("--cost-rows", type=int, default=48)
    parser.add_argument("--cost-methods", default=",".join(m for m in SHARED if m != "random"))
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "kv_vs_kvpress")
    args = parser.parse_args()
    for python, *_ in SIDES.values():
        if not python.exists() or not MODEL.exists():
            raise SystemExit("not set up: sh benchmarks/peers_setup.sh transformers kvpress")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    ratios = [float(ratio) for ratio in args.ratios.split(",")]
    results = {
        "command": shlex.join(["python", "benchmarks/kv_vs_kvpress.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} threads",
        "quality": measure_quality(args, ratios) if "quality" in args.parts else before.get("quality", []),
        "cost": measure_cost(args) if "cost" in args.parts else before.get("cost", []),
    }
    file.write_text(json.dumps(results, indent=2))
    print_tables(results, Console())
    plot(results, args.out / "kv_vs_kvpress.png")


if __name__ == "__main__":
    main()
