"""tokenloom's drafters beside llama.cpp's prompt lookup, on the same GGUF and the same prompts.

    sh benchmarks/peers_setup.sh llama_cpp        # once
    python benchmarks/drafting_vs_llamacpp.py [--prompts 3] [--rounds 3] [--out results/drafting_vs_llamacpp]

One stream, past any end token, on five workloads (`tokenloom bench drafting`). Tokens per second are of
decoding: from the first token of an answer to its last. Every contestant runs a workload in a process of its
own, by turns, `--rounds` times; medians. llama.cpp guesses 2 tokens (what llama-cpp-python's documentation
advises without a GPU) or 10 (its default). Its decoding with a draft model is no part of that package.

Ratios are to the same engine without guesses, and of tokenloom's best to llama.cpp's best. Writes
results.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from tokenloom.bench.drafting.prompts import KINDS, build
from tokenloom.models.catalog import DEFAULT_MODEL, resolve
from tokenloom.models.loader import open_model

ROOT = Path(__file__).resolve().parent.parent
WORKERS = ROOT / "benchmarks" / "peers"
LLAMA_CPP = ROOT / ".peers" / "llama_cpp" / "bin" / "python"
OURS = ("off", "ngram", "token_recycling", "token_recycling+ngram")
THEIRS = {"llama.cpp": 0, "llama.cpp lookup 2": 2, "llama.cpp lookup 10": 10}


def work(python: Path, worker: str, job: dict[str, Any]) -> dict[str, Any]:
    """One job in a fresh process."""
    done = subprocess.run(
        [python, WORKERS / worker],
        check=False,
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=3600,
    )
    if done.returncode != 0:
        raise SystemExit(f"{worker}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def run(name: str, job: dict[str, Any], llama_cpp: Path) -> dict[str, Any]:
    if name in THEIRS:
        own = {"gguf": str(resolve(DEFAULT_MODEL)), "context": 4096, "lookup": THEIRS[name]}
        return work(llama_cpp, "run_llama_cpp_drafting.py", {**job, **own})
    own = {"model": DEFAULT_MODEL, "spec": "" if name == "off" else name}
    return work(Path(sys.executable), "run_tokenloom_drafting.py", {**job, **own})


def speed(result: dict[str, Any]) -> float:
    runs = result["runs"]
    return sum(len(r["tokens"]) - 1 for r in runs) / sum(r["seconds"] for r in runs)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=3, help="of each workload")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--temperatures", default="0,0.7")
    parser.add_argument("--workloads", default=",".join(KINDS))
    parser.add_argument("--llama-cpp", type=Path, default=LLAMA_CPP, help="a Python with llama-cpp-python")
    parser.add_argument("--out", type=Path, default=Path("results/drafting_vs_llamacpp"))
    return parser.parse_args()


def main() -> None:
    args = arguments()
    tokenizer, rows = open_model(DEFAULT_MODEL).tokenizer, []
    for temperature in map(float, args.temperatures.split(",")):
        for kind in args.workloads.split(","):
            job = {
                "threads": args.threads,
                "prompts": build(tokenizer, kind, args.prompts),
                "new": args.new_tokens,
                "temperature": temperature,
                "seed": 0,
            }
            speeds: dict[str, list[float]] = {name: [] for name in (*OURS, *THEIRS)}
            versions: dict[str, str] = {}
            for _ in range(args.rounds):
                for name in speeds:
                    result = run(name, job, args.llama_cpp)
                    speeds[name].append(speed(result))
                    versions[name] = result["version"]
            medians = {name: median(values) for name, values in speeds.items()}
            rows.append({"temperature": temperature, "workload": kind, "tokens_per_s": medians})
            report(rows[-1])
    args.out.mkdir(parents=True, exist_ok=True)
    results = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{platform.machine()}, {platform.processor() or platform.system()}",
        "versions": versions,
        "arguments": {key: str(value) for key, value in vars(args).items()},
        "rows": rows,
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


def report(row: dict[str, Any]) -> None:
    speeds = row["tokens_per_s"]
    table = Table("engine", "tokens/s", "x", title=f"{row['workload']}, temperature {row['temperature']:g}")
    for name, value in speeds.items():
        theirs = name in THEIRS
        alone = speeds["llama.cpp" if theirs else "off"]
        table.add_row(name if theirs else f"tokenloom {name}", f"{value:.1f}", f"{value / alone:.2f}")
    ours, theirs = (max(speeds[name] for name in names) for names in (OURS, THEIRS))
    table.add_row("best to best", "", f"{ours / theirs:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
