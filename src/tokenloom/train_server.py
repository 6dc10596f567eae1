"""`tokenloom train ppd --server`: a server writes the answers, and trains on them beside its requests."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from tokenloom.finetune_cli import Display, ServerError, call, connect, follow, served_model, upload
from tokenloom.methods.drafting.ppd_text import MOST_REPEATED, Prompt, prompts, repeated

STREAMS = 8
"""Answers asked for at a time."""
PRIORITY = 100
"""Whatever else waits on the server goes first."""
MOST_EPOCHS, TEXTS = 50, 2
"""OpenAI's limit; texts of a step."""


def train_ppd_on_server(
    url: str,
    key: str,
    *,
    texts: int,
    held_out: int,
    new_tokens: int,
    steps: int,
    rate: float,
    seed: int,
    knobs: dict[str, Any],
    display: Display,
) -> None:
    """Have the served model answer prompts, upload what it said, and follow the job that learns from it.

    Args:
        texts, held_out: prompts to learn from, and others to measure on; new_tokens: most of an answer.
        steps: about so many, in whole passes over the answers.
        knobs: `prompts` and `cuts` of the method.

    Raises:
        ServerError: the server refused, could not be reached, or the job did not succeed.
    """
    with connect(url, key) as client, tempfile.TemporaryDirectory() as folder:
        model = served_model(client)
        learned = _rows(client, model, prompts(texts, seed), new_tokens, display)
        kept = _rows(client, model, prompts(held_out, seed, held_out=True), new_tokens, display)
        epochs = max(1, min(MOST_EPOCHS, round(steps * TEXTS / len(learned))))
        body = {
            "model": model,
            "training_file": _uploaded(client, Path(folder, "answers.jsonl"), learned),
            "validation_file": _uploaded(client, Path(folder, "held-out.jsonl"), kept),
            "seed": seed,
            "method": {"type": "ppd", "ppd": knobs},
            "hyperparameters": {"n_epochs": epochs, "batch_size": TEXTS},
            "training": {"learning_rate": rate},
        }
        follow(client, call(client, "POST", "/v1/fine_tuning/jobs", json=body)["id"], display)


def _rows(
    client: httpx.Client, model: str, asked: Sequence[Prompt], new_tokens: int, display: Display
) -> list[dict[str, Any]]:
    """Rows of a training file: prompts with the model's greedy answers, less those that repeat themselves."""

    def answered(prompt: Prompt) -> dict[str, Any] | None:
        fields = {"model": model, "temperature": 0, "max_tokens": new_tokens, "priority": PRIORITY}
        if prompt.chat:
            user = {"role": "user", "content": prompt.text}
            answer = call(client, "POST", "/v1/chat/completions", json={**fields, "messages": [user]})
            text = answer["choices"][0]["message"]["content"] or ""
            row: dict[str, Any] = {"messages": [user, {"role": "assistant", "content": text}]}
        else:
            answer = call(client, "POST", "/v1/completions", json={**fields, "prompt": prompt.text})
            text = answer["choices"][0]["text"]
            row = {"prompt": prompt.text, "completion": text}
        return row if text.strip() and repeated(text.split()) <= MOST_REPEATED else None

    display.line(f"{len(asked)} answers are being written")
    with ThreadPoolExecutor(STREAMS) as pool:
        rows = [row for row in pool.map(answered, asked) if row is not None]
    if not rows:
        raise ServerError(f"--server {client.base_url}: every answer is empty or repeats itself")
    return rows


def _uploaded(client: httpx.Client, path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return upload(client, path)
