"""Tokens per second and peak memory of LoRA training, beside Hugging Face PEFT on the same weights.

    python benchmarks/finetune_vs_peft.py [--lengths 512,1024,2048] [--repeats 3] [--retain fast]

Both sides train LoRA r=16 on all seven linears with AdamW in float32, one sequence per step, on the same
tokens. They run in processes of their own, by turns, so that a slow minute of the machine meets both; the
medians of all steps but each process's first are compared. Memory is the peak resident size while training,
minus the model's weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m-instruct"
SIDES = ("tokenloom", "peft")


def tokens_of(length: int, count: int) -> list[list[int]]:
    """Real text: this interpreter's own standard library."""
    from tokenloom.models.loader import open_model

    tokenizer = open_model(MODEL).tokenizer
    ids: list[int] = []
    for path in sorted(Path(argparse.__file__).parent.glob("*.py")):
        ids += tokenizer.encode(path.read_text("utf-8", errors="replace"))
        if len(ids) >= length * count:
            break
    return [ids[i * length : (i + 1) * length] for i in range(count)]


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Peak resident size since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status: this benchmark needs Linux")


def run_tokenloom(length: int, steps: int, retain: str) -> dict[str, object]:
    from tokenloom.config import load_settings
    from tokenloom.engine.engine import Engine
    from tokenloom.finetune.data import Sample
    from tokenloom.finetune.hyperparameters import FinetuneOptions, resolve_hyperparameters
    from tokenloom.finetune.local import StepReport, train_here

    engine = Engine(load_settings({"model.name": MODEL, "model.dtype": "float32", "model.quantize": "none"}))
    samples = [Sample(ids, [0.0] + [1.0] * (length - 1)) for ids in tokens_of(length, steps)]
    options = FinetuneOptions.model_validate(
        {
            "hyperparameters": {"n_epochs": 1, "batch_size": 1},
            "training": {"max_seq_tokens": length, "retain": retain, "checkpoint_every_steps": 10_000},
        }
    )
    times, losses = [time.perf_counter()], []

    def on_step(report: StepReport) -> None:
        times.append(time.perf_counter())
        losses.append(report.metrics["train_loss"])

    reset_peak()
    with tempfile.TemporaryDirectory() as folder:
        hyper = resolve_hyperparameters(steps, options)
        train_here(engine, samples, hyper, Path(folder) / "out", on_step=on_step)
    return _report(times, losses, peak_bytes(), engine.decoder.num_bytes)


def run_peft(length: int, steps: int, retain: str) -> dict[str, object]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from tokenloom.models.catalog import resolve

    sequences = tokens_of(length, steps)
    path = resolve(MODEL)
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=targets)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    reset_peak()
    times, losses = [time.perf_counter()], []
    for ids in sequences:
        batch = torch.tensor([ids])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        times.append(time.perf_counter())
    return _report(times, losses, peak_bytes(), weights)


def _report(times: list[float], losses: list[float], peak: int, weights: int) -> dict[str, object]:
    steps = [b - a for a, b in pairwise(times)]
    return {"steps_s": steps[1:], "losses": losses, "peak_bytes": peak, "weight_bytes": weights}


def measure(side: str, length: int, steps: int, retain: str) -> dict[str, object]:
    command = [sys.executable, __file__, "--worker", side, "--lengths", str(length)]
    command += ["--steps", str(steps), "--retain", retain]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, object] = json.loads(out.splitlines()[-1])
    return result


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4))
    pictures = (("tokens_per_s", "tokens/s"), ("mb_above_weights", "peak MB above the weights"))
    for axis, (key, title) in zip(axes, pictures, strict=True):
        for offset, side in zip((-0.2, 0.2), SIDES, strict=True):
            places = [i + offset for i in range(len(rows))]
            axis.bar(places, [row[f"{side}_{key}"] for row in rows], 0.4, label=side)
        axis.set(title=title, xlabel="tokens of a sequence")
        axis.set_xticks(range(len(rows)), [str(row["tokens"]) for row in rows])
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lengths", default="512,1024,2048")
    parser.add_argument("--repeats", type=int, default=3, help="processes per side and length")
    parser.add_argument("--steps", type=int, default=4, help="steps per process; the first is not counted")
    parser.add_argument("--retain", default="fast", choices=("lean", "fast", "ckpt"))
    parser.add_argument("--out", type=Path, default=Path("results/finetune_vs_peft"))
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    lengths = [int(n) for n in args.lengths.split(",")]
    if args.worker:
        run = run_tokenloom if args.worker == "tokenloom" else run_peft
        print(json.dumps(run(lengths[0], args.steps, args.retain)))
        return
    rows = []
    print(f"retain={args.retain}; LoRA r=16 on 7 linears, AdamW, float32, one sequence per step")
    print("tokens  tokenloom tok/s  peft tok/s  ratio   tokenloom MB  peft MB  share  (peak above weights)")
    for length in lengths:
        found: dict[str, list[dict[str, object]]] = {side: [] for side in SIDES}
        for _ in range(args.repeats):
            for side in SIDES:
                found[side].append(measure(side, length, args.steps, args.retain))
        speed, memory = {}, {}
        for side in SIDES:
            steps = [step for result in found[side] for step in result["steps_s"]]  # type: ignore[attr-defined]
            speed[side] = length / statistics.median(steps)
            memory[side] = max(r["peak_bytes"] - r["weight_bytes"] for r in found[side]) / 1e6  # type: ignore[operator]
        row = {
            "tokens": length,
            **{f"{side}_tokens_per_s": speed[side] for side in SIDES},
            **{f"{side}_mb_above_weights": memory[side] for side in SIDES},
            "speed_ratio": speed["tokenloom"] / speed["peft"],
            "memory_share": memory["tokenloom"] / memory["peft"],
            "first_losses": {side: found[side][0]["losses"] for side in SIDES},
        }
        rows.append(row)
        print(
            f"{length:6d}  {speed['tokenloom']:15.1f}  {speed['peft']:10.1f}  {row['speed_ratio']:5.2f}"
            f"   {memory['tokenloom']:12.0f}  {memory['peft']:7.0f}  {row['memory_share']:5.0%}",
            flush=True,
        )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps({"retain": args.retain, "rows": rows}, indent=1) + "\n")
    plot(rows, args.out / "finetune_vs_peft.png")


if __name__ == "__main__":
    main()
