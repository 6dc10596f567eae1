"""tokenloom's side of `kv_vs_kvpress.py`: the same probes through the real engine."""

from __future__ import annotations

import json
import os
import sys
from statistics import median
from typing import Any

import torch
from kv_worker import Memory

from tokenloom.bench.kv.quality import quality
from tokenloom.bench.kv.teacher import TeacherEngine
from tokenloom.config import load_settings
from tokenloom.methods.kv import combine
from tokenloom.version import __version__

# The knobs of kvpress's presses, where they differ from ours.
SPECS = {
    "dense": "off",
    "snapkv": "snapkv(budget={}, window=64)",
    "streaming": "streaming(budget={})",
    "keydiff": "keydiff(budget={}, window=0, sinks=0)",
    "keydiff, ours": "keydiff(budget={})",
    "pyramid": "snapkv(budget={}, window=64)+pyramid",
    "adakv": "snapkv(budget={}, window=64)+adakv",
    "random": "random(budget={}, window=0, sinks=0)",
    "tokenselect": "tokenselect(budget={})",
}


def main() -> None:
    job = json.load(sys.stdin)
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    flags = {"model.name": job["model"], "model.dtype": "float32", "model.quantize": job["quantize"]}
    engine = TeacherEngine(load_settings({**flags, "model.threads": job["threads"]}))
    engine.run([1] * 64, [1, 1, 1])
    dense = [engine.run(p["prompt"], p["given"]).logits for p in job["probes"]] if job["quality"] else []
    results: dict[str, Any] = {"version": f"tokenloom {__version__}, torch {torch.__version__}", "cases": []}
    for name, ratio in job["cases"]:
        memory = Memory()
        rows = []
        for i, probe in enumerate(job["probes"]):
            budget = int(ratio * len(probe["prompt"])) if name == "tokenselect" else ratio
            run = engine.run(probe["prompt"], probe["given"], combine(SPECS[name].format(budget)))
            found: dict[str, Any] = {"group": probe["group"], "ttft_ms": run.ttft_ms}
            found |= {"tpot_ms": median(run.step_ms), "kv_bytes": run.kv_bytes[0]}
            if job["quality"]:
                answers = tuple(range(*answer) for answer in probe["answers"])
                found |= quality(run.logits, dense[i], probe["given"], answers)
            rows.append(found)
        results["cases"].append({"name": name, "ratio": ratio, "peak_bytes": memory.peak(), "probes": rows})
    print(json.dumps(results), file=stdout)


if __name__ == "__main__":
    main()
