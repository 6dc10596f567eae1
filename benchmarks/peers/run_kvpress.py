"""NVIDIA's kvpress on transformers, for `kv_vs_kvpress.py`: a prompt is computed at once under a press, what
follows is fed one token at a time at its own position.

Runs under .peers/kvpress, without tokenloom; quality is computed by the same file as tokenloom's.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src" / "tokenloom" / "bench" / "kv"))

import kvpress
import torch
from kv_worker import Memory
from quality import quality
from transformers import AutoModelForCausalLM, DynamicCache


def press_of(name: str, ratio: float) -> Any:
    """The press that keeps this part of a prompt; None: dense attention."""
    removed = 1 - ratio
    match name:
        case "dense":
            return None
        case "snapkv":
            return kvpress.SnapKVPress(removed)
        case "streaming":
            return kvpress.StreamingLLMPress(removed)
        case "keydiff":
            return kvpress.KeyDiffPress(removed)
        case "pyramid":
            return kvpress.PyramidKVPress(removed)
        case "adakv":
            return kvpress.AdaKVPress(kvpress.SnapKVPress(removed))
        case "random":
            return kvpress.RandomPress(removed)
    raise ValueError(name)


@torch.inference_mode()
def run(model: Any, press: Any, probe: dict[str, Any]) -> dict[str, Any]:
    """One probe: logits `[V]` by token, milliseconds, and bytes of the cache after the prompt."""
    prompt, given = probe["prompt"], probe["given"]
    cache, logits, steps = DynamicCache(), [], []
    start = time.perf_counter()
    with press(model) if press is not None else contextlib.nullcontext():
        out = model(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1)
    ttft = (time.perf_counter() - start) * 1e3
    logits.append(out.logits[0, -1].clone())
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    kv_bytes = sum(t.numel() * t.element_size() for t in tensors)
    for i, token in enumerate(given[:-1]):
        start = time.perf_counter()
        position = torch.tensor([[len(prompt) + i]])
        out = model(torch.tensor([[token]]), past_key_values=cache, position_ids=position)
        logits.append(out.logits[0, -1].clone())
        steps.append((time.perf_counter() - start) * 1e3)
    return {"logits": logits, "ttft_ms": ttft, "tpot_ms": median(steps), "kv_bytes": kv_bytes}


def main() -> None:
    job = json.load(sys.stdin)
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    results: dict[str, Any] = {
        "version": f"kvpress 0.5.5, transformers {sys.modules['transformers'].__version__}"
    }
    run(model, None, {"prompt": [1] * 64, "given": [1, 1, 1]})
    dense = [run(model, None, probe)["logits"] for probe in job["probes"]] if job["quality"] else []
    results["cases"] = []
    for name, ratio in job["cases"]:
        memory = Memory()
        rows = []
        for i, probe in enumerate(job["probes"]):
            found = run(model, press_of(name, ratio), probe)
            logits = found.pop("logits")
            if job["quality"]:
                answers = tuple(range(*answer) for answer in probe["answers"])
                found.update(quality(logits, dense[i], probe["given"], answers))
            rows.append({"group": probe["group"], **found})
        results["cases"].append({"name": name, "ratio": ratio, "peak_bytes": memory.peak(), "probes": rows})
    print(json.dumps(results), file=stdout)


if __name__ == "__main__":
    main()
