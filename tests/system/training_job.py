"""An adapter to serve and a fine-tuning job to run, for the scripts beside this file."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import httpx
import torch

from questions import ADAPTER, MODEL
from tokenloom.models.adapters import Adapter, Dims, LoraConfig, save_adapter
from tokenloom.models.loader import open_model

WORDS = ("quay", "tide", "swell", "fairway", "hull", "hatch", "galley", "sheet")


def write_adapter(home: Path) -> None:
    """A random adapter in the folder that the server loads from; it changes what the model says."""
    dims = Dims.of(open_model(MODEL).config)
    adapter = Adapter(LoraConfig(r=8, alpha=16.0), dims, torch.float32, torch.device("cpu"))
    noise = torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(0))
    adapter.flat.copy_(0.02 * noise)
    save_adapter(adapter, home / "adapters" / ADAPTER, MODEL)


def rows(count: int, seed: int = 0) -> bytes:
    """A training file."""
    lines = []
    for i in range(count):
        word = WORDS[(i + seed) % len(WORDS)]
        messages = [
            {"role": "user", "content": f"What does a sailor say of the {word}, {i}?"},
            {"role": "assistant", "content": f"Arr, the {word} is where it was {seed}."},
        ]
        lines.append(json.dumps({"messages": messages}))
    return ("\n".join(lines) + "\n").encode()


def upload(client: httpx.Client, content: bytes, name: str = "rows.jsonl") -> str:
    """The id of an acknowledged file."""
    files = {"file": (name, io.BytesIO(content))}
    response = client.post("/v1/files", data={"purpose": "fine-tune"}, files=files)
    response.raise_for_status()
    return str(response.json()["id"])


def create_job(client: httpx.Client, file: str, epochs: int) -> str:
    """The id of a job of short examples."""
    body = {
        "model": MODEL,
        "training_file": file,
        "seed": 7,
        "hyperparameters": {"n_epochs": epochs, "batch_size": 4},
        "training": {"learning_rate": 0.0005, "max_seq_tokens": 64},
    }
    response = client.post("/v1/fine_tuning/jobs", json=body)
    response.raise_for_status()
    return str(response.json()["id"])


def job(client: httpx.Client, job_id: str) -> dict[str, Any]:
    response = client.get(f"/v1/fine_tuning/jobs/{job_id}")
    response.raise_for_status()
    return dict(response.json())


def steps(client: httpx.Client, job_id: str) -> dict[int, float]:
    """The loss of each step that the server has told of."""
    found: dict[int, float] = {}
    after: dict[str, str] = {}
    while True:
        response = client.get(f"/v1/fine_tuning/jobs/{job_id}/events", params={"limit": "100", **after})
        response.raise_for_status()
        page = response.json()
        for event in page["data"]:
            if event["type"] == "metrics":
                found[event["data"]["step"]] = event["data"]["train_loss"]
        if not page["has_more"]:
            return found
        after = {"after": page["data"][-1]["id"]}
