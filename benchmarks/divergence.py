"""How far apart next-token distributions are: tokenloom, llama.cpp and float32 on the same weights.

    sh benchmarks/peers_setup.sh llama_cpp     # once
    python benchmarks/divergence.py [--text-tokens 1024] [--threads 2] [--out results/divergence]

All read the default model's GGUF (Q4_1 and Q8_0) and the same English text in windows of 512 tokens;
float32 is tokenloom with the weights dequantised. Printed for each pair: mean, median and 99th percentile
over all rows of the Kullback-Leibler divergence KL(first || second), in nats, and how often both have the
same likeliest token.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from peers_cpu import WINDOW, Contestant, contestants, english_windows, run
from rich.console import Console
from rich.table import Table

from tokenloom.models.catalog import DEFAULT_MODEL, resolve


def log_probabilities(contestant: Contestant, job: dict[str, Any], file: Path) -> np.ndarray:
    """`[rows, vocab]`, over all windows."""
    run(contestant, "logits", {**job, "to": str(file)})
    logits = np.load(file).astype(np.float64)
    logits = logits.reshape(-1, logits.shape[-1])
    logits -= logits.max(-1, keepdims=True)
    result: np.ndarray = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return result


def compare(p: np.ndarray, q: np.ndarray) -> dict[str, float]:
    divergence = (np.exp(p) * (p - q)).sum(-1)
    return {
        "mean": float(divergence.mean()),
        "median": float(np.median(divergence)),
        "p99": float(np.quantile(divergence, 0.99)),
        "same_choice": float((p.argmax(-1) == q.argmax(-1)).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text-tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/divergence"))
    args = parser.parse_args()
    ours, llama = contestants(resolve(DEFAULT_MODEL))[:2]
    job = {
        "model": DEFAULT_MODEL,
        "threads": args.threads,
        "texts": english_windows(max(WINDOW, args.text_tokens)),
        "sizes": {"prefill": [], "contexts": []},
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "logits.npy"
        rows = {
            "float32": log_probabilities(ours, {**job, "quantize": "none"}, file),
            "tokenloom": log_probabilities(ours, {**job, "quantize": None}, file),
            "llama.cpp": log_probabilities(llama, {**job, "quantize": None}, file),
        }
    table = Table("KL(first || second)", "mean", "median", "p99", "same likeliest token")
    found = {}
    for first, second in (("float32", "tokenloom"), ("float32", "llama.cpp"), ("llama.cpp", "tokenloom")):
        name = f"{first}, {second}"
        found[name] = result = compare(rows[first], rows[second])
        figures = [f"{result[key]:.2e}" for key in ("mean", "median", "p99")]
        table.add_row(name, *figures, f"{result['same_choice']:.1%}")
    Console().print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
