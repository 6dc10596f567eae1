"""A real server over a tiny model that also trains, and what its tests send it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from openai import OpenAI

from running import Running, settings, wait_for
from tokenloom.engine.async_engine import AsyncEngine
from tokenloom.engine.engine import Engine
from tokenloom.models.adapters import Adapter, Dims, LoraConfig, save_adapter
from tokenloom.models.loader import open_model
from tokenloom.serve.jobs import open_jobs

PROMPT = "the boat on the sea is at rest and the other boats are in it"
WORDS = ("sea", "boat", "storm", "wind", "sail", "shore")


def start(model: Path, **flags: Any) -> Running:
    """Serve a model in float64, with the files and jobs of `TOKENLOOM_HOME`. Training gets a pass after each
    fourth iteration, so that tests need no latency profile."""
    chosen: dict[str, Any] = {
        "model__name": str(model),
        "model__dtype": "float64",
        "cache__kv_bytes": 2**24,
        "server__served_model_name": "tiny",
        "server__drain_timeout_s": 5,
        "coserve__mode": "temporal",
        "coserve__temporal_every": 4,
    }
    every = settings(**(chosen | flags))
    engine = AsyncEngine(Engine(every))
    return Running(engine, jobs=open_jobs(engine, every))


def client_of(server: Running) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def write_adapter(model: Path, folder: Path, seed: int, rank: int = 4) -> Path:
    """A random adapter that changes what the tiny model says."""
    dims = Dims.of(open_model(str(model)).config)
    adapter = Adapter(LoraConfig(r=rank, alpha=8.0), dims, torch.float64, torch.device("cpu"))
    noise = torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(seed))
    adapter.flat.copy_(0.3 * noise.double())
    save_adapter(adapter, folder, "tiny")
    return folder


def say(server: Running, model: str, prompt: str = PROMPT, max_tokens: int = 24, **fields: Any) -> str:
    """The greedy continuation by one of the server's models."""
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    response = server.http.post("/v1/completions", json=body | fields)
    assert response.status_code == 200, response.text
    assert response.json()["model"] == model
    return response.json()["choices"][0]["text"]


def rows(count: int) -> bytes:
    lines = []
    for i in range(count):
        word = WORDS[i % len(WORDS)]
        messages = [
            {"role": "user", "content": f"what of the {word}?"},
            {"role": "assistant", "content": f"the {word} is wide and calm {i}"},
        ]
        lines.append(json.dumps({"messages": messages}))
    return ("\n".join(lines) + "\n").encode()


def upload(client: OpenAI, content: bytes, name: str = "rows.jsonl") -> str:
    return client.files.create(file=(name, io.BytesIO(content)), purpose="fine-tune").id


def create(client: OpenAI, file: str, epochs: int = 2, **extra: Any) -> Any:
    """A job of `epochs` times 3 steps on 12 rows, at a rate that shows."""
    training = {"learning_rate": 0.02, "max_seq_tokens": 64, **extra.pop("training", {})}
    return client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file,
        seed=7,
        hyperparameters={"n_epochs": epochs, "batch_size": 4},
        extra_body={"lora": {"r": 4, "alpha": 8}, "training": training},
        **extra,
    )


def until(client: OpenAI, job_id: str, *statuses: str, timeout_s: float = 60.0) -> Any:
    """The job, once it has one of the statuses."""
    found: list[Any] = []

    def look() -> bool:
        found[:] = [client.fine_tuning.jobs.retrieve(job_id)]
        return found[0].status in statuses

    wait_for(look, timeout_s)
    return found[0]


def steps_of(client: OpenAI, job_id: str) -> int:
    events = client.fine_tuning.jobs.list_events(job_id, limit=100).data
    return max((event.data["step"] for event in events if event.type == "metrics"), default=0)
