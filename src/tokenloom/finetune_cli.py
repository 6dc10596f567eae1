"""`tokenloom finetune`: train here, or have a server train, and watch."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tokenloom.config import Settings
from tokenloom.errors import RequestError, TokenloomError

POLL_S = 1.0
_ENDED = ("succeeded", "failed", "cancelled", "paused")


class ServerError(TokenloomError):
    """The server refused, or could not be reached."""


class Display:
    """Steps as a live bar, or as one JSON object per line."""

    def __init__(self, out: Console, as_json: bool) -> None:
        self.out, self.as_json = out, as_json
        self.bar = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
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
        self.bar.update(self.task, completed=step, total=total, state="  ".join([*parts, note]))

    def line(self, text: str) -> None:
        if not self.as_json:
            self.bar.console.print(text, highlight=False, soft_wrap=True)


def train_standalone(
    settings: Settings,
    data: Path,
    output: Path,
    validation: Path | None,
    options: dict[str, Any],
    display: Display,
) -> Path:
    """Train in this process; the first Ctrl-C stops with the state saved. Returns the adapter's folder."""
    from tokenloom.engine.engine import Engine
    from tokenloom.finetune.local import StepReport, finetune_folder

    seed = options.pop("seed")
    engine = Engine(settings)
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: _interrupt(asked, before))

    def on_step(report: StepReport) -> None:
        fields = {**report.metrics, "trained_tokens": report.trained_tokens}
        fields |= {"tokens_per_s": report.tokens_per_s, "eta_s": report.eta_s or 0.0}
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
    finally:
        signal.signal(signal.SIGINT, before)
    for warning in result.warnings:
        display.line(f"[yellow]{warning}[/]")
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
    options: dict[str, Any],
    display: Display,
) -> str:
    """Upload, start a job, and follow it to its end. Returns the finished model's name."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=60.0) as client:
        return follow(client, _create(client, model, data, validation, suffix, options), display)


def _create(
    client: httpx.Client,
    model: str | None,
    data: Path,
    validation: Path | None,
    suffix: str | None,
    options: dict[str, Any],
) -> str:
    from tokenloom.finetune.local import parse_options

    seed = options.pop("seed")
    requested = parse_options(options)
    body: dict[str, Any] = {
        "model": model or _call(client, "GET", "/v1/models")["data"][0]["id"],
        "training_file": _upload(client, data),
        "seed": seed,
        "hyperparameters": requested.hyperparameters.model_dump(exclude_unset=True),
        "lora": requested.lora.model_dump(exclude_unset=True),
    }
    if validation is not None:
        body["validation_file"] = _upload(client, validation)
    if suffix is not None:
        body["suffix"] = suffix
    job_id: str = _call(client, "POST", "/v1/fine_tuning/jobs", json=body)["id"]
    return job_id


def _upload(client: httpx.Client, path: Path) -> str:
    try:
        with path.open("rb") as file:
            answer = _call(
                client, "POST", "/v1/files", data={"purpose": "fine-tune"}, files={"file": (path.name, file)}
            )
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}", param="data") from error
    file_id: str = answer["id"]
    return file_id


def follow(
    client: httpx.Client, job_id: str, display: Display, sleep: Callable[[float], None] = time.sleep
) -> str:
    """Show a job's events until it ends.

    Raises:
        ServerError: the job failed, was cancelled or paused; or the server is gone.
    """
    display.line(f"job [bold]{job_id}[/] (Ctrl-C leaves it running)")
    seen: set[str] = set()
    try:
        with display.bar:
            while True:
                job = _call(client, "GET", f"/v1/fine_tuning/jobs/{job_id}")
                for event in _new_events(client, job_id, seen):
                    _show(event, job, display, client)
                if job["status"] in _ENDED:
                    break
                sleep(POLL_S)
    except KeyboardInterrupt:
        raise ServerError(
            f"job {job_id} goes on without you; POST /v1/fine_tuning/jobs/{job_id}/cancel ends it"
        ) from None
    if job["status"] != "succeeded":
        error = job.get("error") or {}
        raise ServerError(
            f"job {job_id} is {job['status']}: {error.get('message') or 'nothing more is known'}"
        )
    name: str = job["fine_tuned_model"]
    return name


def _new_events(client: httpx.Client, job_id: str, seen: set[str]) -> Iterator[dict[str, Any]]:
    """Events not shown yet, oldest first."""
    fresh: list[dict[str, Any]] = []
    after = None
    while True:
        query = {"limit": 100, **({"after": after} if after else {})}
        page = _call(client, "GET", f"/v1/fine_tuning/jobs/{job_id}/events", params=query)
        new = [event for event in page["data"] if event["id"] not in seen]
        fresh += new
        if len(new) < len(page["data"]) or not page["has_more"]:
            break
        after = page["data"][-1]["id"]
    seen.update(event["id"] for event in fresh)
    yield from reversed(fresh)


def _show(event: dict[str, Any], job: dict[str, Any], display: Display, client: httpx.Client) -> None:
    data = event.get("data") or {}
    if event.get("type") == "metrics" and "step" in data:
        display.step(data["step"], data.get("total_steps"), data, note=slo_state(client))
        return
    colour = {"warn": "yellow", "error": "red"}.get(event["level"], "dim")
    display.line(f"[{colour}]{event['message']}[/]")


def slo_state(client: httpx.Client) -> str:
    """How inference fares meanwhile: mean TTFT and time per token since the server started, and what runs."""
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
            parts.append(f"{label} {mean_ms:.0f} ms")
    return ", ".join(parts)


def _call(client: httpx.Client, method: str, path: str, **options: Any) -> dict[str, Any]:
    try:
        answer = client.request(method, path, **options)
        body = answer.json()
    except httpx.HTTPError as error:
        raise ServerError(f"--server {client.base_url}: {error}") from error
    except ValueError as error:
        raise ServerError(f"--server {client.base_url}: {method} {path} did not answer JSON") from error
    if answer.is_error:
        message = body.get("error", {}).get("message") if isinstance(body, dict) else None
        raise ServerError(f"{method} {path}: {message or answer.status_code}")
    assert isinstance(body, dict)
    return body
