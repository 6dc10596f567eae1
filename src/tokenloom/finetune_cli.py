"""`tokenloom finetune`: train here, or have a server train, and watch."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from tokenloom.config import Settings
from tokenloom.errors import RequestError, TokenloomError

POLL_S = 1.0
_ENDED = ("succeeded", "failed", "cancelled", "paused")


class ServerError(TokenloomError):
    """The server refused, or could not be reached."""


class Display:
    """Steps as a live bar on `out`, or on standard output as one JSON object per line."""

    def __init__(self, out: Console, as_json: bool) -> None:
        self.out, self.as_json = out, as_json
        self.bar = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            console=out,
            disable=as_json,
        )
        self.task = self.bar.add_task("finetuning", total=None, state="")

    def step(self, step: int, total: int | None, fields: dict[str, Any], note: str = "") -> None:
        """One step is done; `fields` has train_loss, tokens_per_s and the like."""
        if self.as_json:
            print(json.dumps({"step": step, "total_steps": total, **fields}), flush=True)
            return
        parts = [f"loss {fields['train_loss']:.4f}"] if fields.get("train_loss") is not None else []
        if fields.get("full_valid_loss") is not None:
            parts.append(f"valid {fields['full_valid_loss']:.4f}")
        if fields.get("tokens_per_s"):
            parts.append(f"{fields['tokens_per_s']:.0f} tokens/s")
        if fields.get("eta_s") is not None:
            parts.append(f"{timedelta(seconds=round(fields['eta_s']))} left")
        self.bar.update(self.task, completed=step, total=total, state=escape("  ".join([*parts, note])))

    def line(self, text: str, style: str = "") -> None:
        """Words of their own, above the bar."""
        self.out.print(escape(text), style=style, highlight=False, soft_wrap=True)


def train_standalone(
    settings: Settings,
    data: Path,
    output: Path,
    validation: Path | None,
    seed: int,
    options: dict[str, Any],
    display: Display,
) -> Path:
    """Train in this process; the first Ctrl-C stops with the state saved. Returns the adapter's folder.

    Raises:
        TrainingStopped: after a Ctrl-C.
        RequestError: see `LLM.finetune`; or a file cannot be read or written.
    """
    from tokenloom.engine.engine import Engine
    from tokenloom.finetune.local import StepReport, finetune_folder

    engine = Engine(settings)
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: _interrupt(asked, before))

    def on_step(report: StepReport) -> None:
        fields: dict[str, Any] = {**report.metrics, "trained_tokens": report.trained_tokens}
        fields |= {"tokens_per_s": report.tokens_per_s, "eta_s": report.eta_s}
        display.step(report.step, report.total_steps, fields)

    try:
        with display.bar:
            result = finetune_folder(
                engine,
                data,
                output,
                validation=validation,
                seed=seed,
                on_step=on_step,
                stop=lambda: bool(asked),
                options=options,
            )
    except OSError as error:
        raise RequestError(f"{error.filename or output}: {error.strerror or error}") from error
    finally:
        signal.signal(signal.SIGINT, before)
    for warning in result.warnings:
        display.line(warning, "yellow")
    return result.adapter


def _interrupt(asked: list[int], before: Any) -> None:
    """The first Ctrl-C asks to stop after the iteration at hand; the next one does not wait."""
    if asked:
        signal.signal(signal.SIGINT, before)
        raise KeyboardInterrupt
    asked.append(1)


def train_on_server(
    url: str,
    key: str,
    model: str | None,
    data: Path,
    validation: Path | None,
    suffix: str | None,
    seed: int,
    options: dict[str, Any],
    display: Display,
) -> str:
    """Upload, start a job, and follow it to its end. Returns the finished model's name."""
    with connect(url, key) as client:
        name = follow(client, create(client, model, data, validation, suffix, seed, options), display)
    assert name is not None  # jobs that train an adapter always make one
    return name


def connect(url: str, key: str) -> httpx.Client:
    """To a server's root, with the key if there is one. Raises ServerError: the URL is none."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        return httpx.Client(base_url=url.rstrip("/").removesuffix("/v1"), headers=headers, timeout=60.0)
    except httpx.InvalidURL as error:
        raise ServerError(f"--server {url}: {error}") from error


def create(
    client: httpx.Client,
    model: str | None,
    data: Path,
    validation: Path | None,
    suffix: str | None,
    seed: int,
    options: dict[str, Any],
) -> str:
    """Upload the files and create the job; its id. Without a model it is the one that the server serves."""
    from tokenloom.finetune.local import parse_options

    requested = parse_options(options)
    body: dict[str, Any] = {
        "model": model or served_model(client),
        "training_file": upload(client, data),
        "seed": seed,
        "hyperparameters": requested.hyperparameters.model_dump(exclude_unset=True),
        "lora": requested.lora.model_dump(exclude_unset=True),
    }
    if validation is not None:
        body["validation_file"] = upload(client, validation)
    if suffix is not None:
        body["suffix"] = suffix
    job_id: str = call(client, "POST", "/v1/fine_tuning/jobs", json=body)["id"]
    return job_id


def served_model(client: httpx.Client) -> str:
    """The first that the server names."""
    models = call(client, "GET", "/v1/models").get("data")
    if not models:
        raise ServerError(f"--server {client.base_url}: names no model")
    name: str = models[0]["id"]
    return name


def upload(client: httpx.Client, path: Path) -> str:
    """A file for fine-tuning; its id."""
    try:
        with path.open("rb") as file:
            answer = call(
                client, "POST", "/v1/files", data={"purpose": "fine-tune"}, files={"file": (path.name, file)}
            )
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}", param="data") from error
    file_id: str = answer["id"]
    return file_id


def follow(
    client: httpx.Client, job_id: str, display: Display, sleep: Callable[[float], None] = time.sleep
) -> str | None:
    """Show a job's events until it ends; the name of the model that it made, if it made one.

    Raises:
        ServerError: the job failed, was cancelled or paused; or the server is gone.
    """
    display.line(f"job {job_id} (Ctrl-C leaves it running)")
    seen: set[str] = set()
    steps: list[dict[str, Any]] = []
    try:
        with display.bar:
            while True:
                job = call(client, "GET", f"/v1/fine_tuning/jobs/{job_id}")
                for event in _new_events(client, job_id, seen):
                    if event.get("type") == "metrics":
                        steps.append(event)
                        _show_step(steps, job, display, slo_state(client))
                    else:
                        colour = {"warn": "yellow", "error": "red"}.get(event["level"], "dim")
                        display.line(event["message"], colour)
                if job["status"] in _ENDED:
                    break
                sleep(POLL_S)
    except KeyboardInterrupt:
        base = str(client.base_url).rstrip("/")
        raise ServerError(
            f"job {job_id} goes on without you: GET {base}/v1/fine_tuning/jobs/{job_id} tells how "
            f"it is, POST to .../{job_id}/cancel ends it"
        ) from None
    if job["status"] != "succeeded":
        error = job.get("error") or {}
        raise ServerError(
            f"job {job_id} is {job['status']}: {error.get('message') or 'nothing more is known'}"
        )
    name: str | None = job["fine_tuned_model"]
    return name


def _new_events(client: httpx.Client, job_id: str, seen: set[str]) -> list[dict[str, Any]]:
    """Events not shown yet, oldest first."""
    fresh: list[dict[str, Any]] = []
    after = None
    while True:
        query = {"limit": 100, **({"after": after} if after else {})}
        page = call(client, "GET", f"/v1/fine_tuning/jobs/{job_id}/events", params=query)
        new = [event for event in page["data"] if event["id"] not in seen]
        fresh += new
        if len(new) < len(page["data"]) or not page["has_more"]:
            break
        after = page["data"][-1]["id"]
    seen.update(event["id"] for event in fresh)
    return fresh[::-1]


def _show_step(steps: list[dict[str, Any]], job: dict[str, Any], display: Display, note: str) -> None:
    """The last of the steps' events; their times, which are whole seconds, give the speed."""
    first, last = steps[0], steps[-1]
    fields = dict(last["data"])
    elapsed_s = last["created_at"] - first["created_at"]
    if elapsed_s:
        fields["tokens_per_s"] = (fields["trained_tokens"] - first["data"]["trained_tokens"]) / elapsed_s
    if job.get("estimated_finish"):
        fields["eta_s"] = max(0.0, job["estimated_finish"] - time.time())
    display.step(fields.pop("step"), fields.pop("total_steps", None), fields, note)


def slo_state(client: httpx.Client) -> str:
    """How inference fares meanwhile: what runs, and means since the server started (targets are not told)."""
    try:
        text = client.get("/metrics").raise_for_status().text
        samples = {s.name: s.value for f in text_string_to_metric_families(text) for s in f.samples}
    except (httpx.HTTPError, ValueError):
        return ""
    parts = [f"{samples.get('tokenloom:num_requests_running', 0):.0f} running"]
    for stem, label in (("time_to_first_token", "TTFT"), ("time_per_output_token", "TPOT")):
        count = samples.get(f"tokenloom:{stem}_seconds_count", 0)
        if count:
            mean_ms = samples[f"tokenloom:{stem}_seconds_sum"] / count * 1e3
            parts.append(f"mean {label} {mean_ms:.0f} ms")
    return ", ".join(parts)


def call(client: httpx.Client, method: str, path: str, **options: Any) -> dict[str, Any]:
    """The answer's JSON object. Raises ServerError with the server's own words."""
    try:
        answer = client.request(method, path, **options)
        body = answer.json()
    except httpx.HTTPError as error:
        raise ServerError(f"--server {client.base_url}: {error}") from error
    except ValueError as error:
        raise ServerError(f"--server {client.base_url}: {method} {path} did not answer JSON") from error
    if answer.is_error:
        fault = body.get("error") if isinstance(body, dict) else None
        message = fault.get("message") if isinstance(fault, dict) else None
        raise ServerError(f"{method} {path}: {message or answer.status_code}")
    if not isinstance(body, dict):
        raise ServerError(f"--server {client.base_url}: {method} {path} did not answer a JSON object")
    return body
