"""A server that the dashboard has all to show of, and how its page is asked and heard."""

from __future__ import annotations

import json
import time
from typing import Any

from busy_overview import busy
from dashboard_rig import expect
from fake_engine import FakeEngine
from running import Running, settings
from tokenloom.finetune.job_request import CreateJob
from tokenloom.finetune.records import JobError
from tokenloom.serve.jobs import open_jobs
from tuning_server import rows


class Site:
    """A server over a fake engine that seems busy, with a job of each end and one under way."""

    def __init__(self) -> None:
        engine = FakeEngine(settings(coserve__mode="off", slo__ttft_ms=150))
        jobs = open_jobs(engine, engine.settings)
        assert jobs.service is not None
        self.server = Running(engine, jobs=jobs)
        self.seem_busy()
        self.store = jobs.service.store
        self.file = self.server.http.post(
            "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", rows(2))}
        ).json()["id"]
        failed = self.job("failed", "queued", "running")
        self.store.jobs.fail(failed, JobError("out_of_memory", "no room for a pass", None))
        self.job("cancelled", "cancelled")
        self.running = self.job("sailor", "queued", "running")
        for step, loss in enumerate((3.5, 2.25, 1.125), 1):
            data = {"step": step, "train_loss": loss, "total_steps": 8}
            self.store.log.add_metrics(self.running, step, f"Step {step}", data, 64 * step, None)
        self.store.log.add_event(self.running, "a row was cut", "warn")

    def seem_busy(self) -> None:
        """Two requests, a job that trains, and the latencies of one request, now."""
        engine = self.server.engine
        engine.behave()
        engine.seen = busy(int(time.time()))
        engine.counters.ttft.add(0.3, time.monotonic())
        engine.counters.itl.add(0.02, time.monotonic())

    def job(self, name: str, *states: Any) -> str:
        asked = {"model": "fake", "training_file": self.file, "metadata": {"name": name}}
        job = self.store.jobs.create(CreateJob.model_validate(asked)).id
        for state in states:
            self.store.jobs.move(job, state, f"The job is {state}")
        return job


def said(page: Any) -> Any:
    """What the page tells those who listen to it."""
    return page.get_by_role("log", name="What happened")


def answering(page: Any, *logprobs: float) -> None:
    """Let the server answer all chats with the word "sea", once for each of these."""

    def answer(route: Any) -> None:
        entries = []
        for logprob in logprobs:
            token = {"token": " sea", "logprob": logprob, "bytes": list(b" sea")}
            other = {"token": " lake", "logprob": -9.5, "bytes": list(b" lake")}
            entries.append({**token, "top_logprobs": [token, other]})
        choice = {"index": 0, "delta": {"content": " sea" * len(entries)}, "logprobs": {"content": entries}}
        body = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
        route.fulfill(body=body, content_type="text/event-stream")

    page.route("**/v1/chat/completions", answer)


def ask(page: Any, *, of_both: bool = False) -> None:
    expect(page.get_by_label("Model of A")).to_have_value("fake")
    page.get_by_label("Side by side").set_checked(of_both)
    page.fill("#prompt", "what of it?")
    page.press("#prompt", "Enter")
    expect(said(page)).to_contain_text("Answer A: ")


def focused(page: Any) -> str:
    """The id of what has the focus, or its text."""
    return page.evaluate("document.activeElement.id || document.activeElement.textContent")
