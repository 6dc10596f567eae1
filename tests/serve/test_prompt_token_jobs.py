"""`ppd`'s prompt tokens trained by a fine-tuning job, beside requests, and used by the server at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import openai
import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from running import Running, assert_error
from tiny_models import build_tiny
from tokenloom.cli import app
from tokenloom.errors import RequestError
from tokenloom.finetune.job_request import parse_job
from tuning_server import PROMPT, client_of, rows, say, start, steps_of, until, upload


@pytest.fixture
def begin(begin: Callable[..., Running]) -> Callable[..., Running]:
    """As elsewhere, on a server that keeps nothing of its drafters."""
    return partial(begin, drafting__persist=False)


def create(client: openai.OpenAI, epochs: int = 4, rate: float = 0.1, **knobs: Any) -> Any:
    method = {"type": "ppd", "ppd": {"cuts": 4, **knobs}}
    return client.fine_tuning.jobs.create(
        model="tiny",
        training_file=upload(client, rows(12)),
        seed=7,
        method=method,
        hyperparameters={"n_epochs": epochs},
        extra_body={"training": {"learning_rate": rate}},
    )


def losses(client: openai.OpenAI, job_id: str) -> list[float]:
    events = client.fine_tuning.jobs.list_events(job_id, limit=200).data
    found = {event.data["step"]: event.data["train_loss"] for event in events if event.type == "metrics"}
    return [found[step] for step in sorted(found)]


def test_a_job_trains_what_drafts_then_use(begin, tmp_path):
    server = begin()
    client = client_of(server)
    body = {"model": "tiny", "prompt": PROMPT, "draft": "ppd(rows=12)"}
    assert_error(server.http.post("/v1/completions", json=body), 400, "draft")
    undrafted = say(server, "tiny")

    job = create(client, epochs=8, rate=0.3)
    assert (job.method.type, job.method.supervised, job.lora) == ("ppd", None, None)
    during = [say(server, "tiny") for _ in range(3)]
    job = until(client, job.id, "succeeded", "failed")

    assert job.status == "succeeded", job.error
    assert during == [undrafted] * 3
    found = losses(client, job.id)
    assert len(found) == 40 and sum(found[-5:]) < 0.9 * sum(found[:5])
    [file] = (tmp_path / "home" / "calibration").rglob("*.safetensors")
    with safe_open(file, "pt") as stored:
        assert stored.get_tensor("embeddings").shape == (3, 64)
        assert stored.get_tensor("accuracy").shape == (3, 10)
        assert json.loads(stored.metadata()["training"])["steps"] == 40

    assert say(server, "tiny", draft="ppd(rows=12)") == undrafted
    answer = server.http.post("/v1/completions", json={**body, "temperature": 0, "ignore_eos": True}).json()
    assert answer["usage"]["completion_tokens_details"]["draft_passes"] > 0


def test_what_is_trained_is_no_model_to_be_named(begin):
    server = begin()
    client = client_of(server)
    job = until(client, create(client, epochs=1).id, "succeeded")
    assert job.fine_tuned_model is None and len(job.result_files) == 1
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.fine_tuning.jobs.checkpoints.list(job.id).data == []


def test_a_paused_job_goes_on_after_a_restart(begin):
    server = begin()
    client = client_of(server)
    job = create(client, epochs=50)
    until(client, job.id, "running")
    while steps_of(client, job.id) < 2:
        continue
    client.fine_tuning.jobs.pause(job.id)
    server.stop()
    client = client_of(begin())
    done = steps_of(client, job.id)
    client.fine_tuning.jobs.resume(job.id)
    while steps_of(client, job.id) < min(done + 2, 100):
        continue
    client.fine_tuning.jobs.cancel(job.id)
    assert until(client, job.id, "cancelled").status == "cancelled"
    events = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=300).data]
    assert any(message.startswith("Going on after step") for message in events)


def test_a_file_without_room_for_cuts_fails_the_job(begin):
    server = begin()
    client = client_of(server)
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}]}
    short = upload(client, (json.dumps(row) + "\n").encode() * 12)
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=short, method={"type": "ppd", "ppd": {"prompts": 8}}
    )
    job = until(client, job.id, "succeeded", "failed")
    assert job.error.code == "training_failed" and "longer than 9 tokens" in job.error.message


def test_the_command_has_a_server_write_answers_and_train(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path / "home"))
    model, _ = build_tiny(tmp_path, max_position_embeddings=4096)  # prompts of bytes are long
    server = start(model, drafting__persist=False)
    try:
        sizes = ["--texts", "2", "--held-out", "1", "--new-tokens", "16", "--steps", "1", "--cuts", "2"]
        done = CliRunner().invoke(app, ["train", "ppd", "--server", server.url, *sizes])
        assert done.exit_code == 0, done.output
        [job] = client_of(server).fine_tuning.jobs.list().data
        assert job.status == "succeeded" and job.method.type == "ppd" and job.validation_file
        assert say(server, "tiny", draft="ppd(rows=12)") == say(server, "tiny")
        refused = CliRunner().invoke(app, ["train", "ppd", "--server", server.url, "--evaluate"])
        assert isinstance(refused.exception, RequestError)
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"method": {"type": "ppd"}, "lora": {"r": 4}}, "lora"),
        ({"method": {"type": "ppd", "ppd": {"prompts": 9}}}, "method.ppd.prompts"),
        ({"method": {"type": "ppd", "supervised": {}}}, "method"),
        ({"method": {"type": "dpo"}}, "method.type"),
    ],
)
def test_what_does_not_go_with_it_is_refused(fields, param):
    with pytest.raises(RequestError) as caught:
        parse_job({"model": "tiny", "training_file": "file-1", **fields}).options()
    assert caught.value.param == param
