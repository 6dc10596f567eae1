"""/v1/fine_tuning/jobs through the official client, on a real server with a runner that pretends to train."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from finetune_server import Server, serving

from finetune_fakes import DATA, wait_until

ALWAYS = {
    "id",
    "object",
    "created_at",
    "finished_at",
    "model",
    "fine_tuned_model",
    "organization_id",
    "status",
    "hyperparameters",
    "training_file",
    "validation_file",
    "result_files",
    "trained_tokens",
    "error",
    "seed",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture(autouse=True)
def let_go(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        server: Server = request.getfixturevalue("server")
        server.runner.go.set()
        wait_until(lambda: not server.runner.running)


def upload(server: Server, data: bytes = DATA, purpose: Any = "fine-tune") -> str:
    return server.client.files.create(file=("train.jsonl", data), purpose=purpose).id


def create(server: Server, **options: Any) -> Any:
    if "training_file" not in options:
        options["training_file"] = upload(server)
    return server.client.fine_tuning.jobs.create(model=options.pop("model", "tiny"), **options)


def wait_for(server: Server, job_id: str, *statuses: str) -> Any:
    def look() -> Any:
        job = server.client.fine_tuning.jobs.retrieve(job_id)
        return job if job.status in statuses else None

    return wait_until(look)


def finished(server: Server, **options: Any) -> Any:
    return wait_for(server, create(server, **options).id, "succeeded", "failed")


def test_a_job_runs_to_its_model(server: Server) -> None:
    file_id = upload(server)
    made = create(server, training_file=file_id, suffix="mine", seed=7, metadata={"team": "a"})
    assert (made.object, made.status, made.seed, made.metadata) == (
        "fine_tuning.job",
        "validating_files",
        7,
        {"team": "a"},
    )
    job = wait_for(server, made.id, "succeeded")
    assert job.fine_tuned_model.startswith("ft:tiny:mine:")
    assert (job.trained_tokens, job.error, job.training_file) == (30, None, file_id)
    assert job.finished_at >= job.created_at
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (8, 1)
    assert job.hyperparameters.learning_rate_multiplier == 1.0
    assert job.method.supervised.hyperparameters.n_epochs == 8
    results = server.client.files.retrieve(job.result_files[0])
    assert results.purpose == "fine-tune-results"
    lines = server.client.files.content(results.id).text.splitlines()
    assert lines[0].startswith("step,train_loss,train_mean_token_accuracy,valid_loss")
    assert lines[1:] == ["1,1.0,0.5,,,,", "2,0.5,0.5,,,,", "3,0.3333333333333333,0.5,,,,"]
    assert job.fine_tuned_model in [model.name for model in server.service.models()]


def test_always_present_keys_are_there_from_the_first_answer(server: Server) -> None:
    body = {"model": "tiny", "training_file": upload(server)}
    job = httpx.post(f"{server.url}/fine_tuning/jobs", json=body).json()
    assert job.keys() >= ALWAYS
    assert job["error"] is None and job["fine_tuned_model"] is None and job["result_files"] == []


def test_extensions_are_echoed_resolved(server: Server) -> None:
    job = finished(
        server,
        hyperparameters={"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5},
        extra_body={"lora": {"r": 4, "alpha": 8}, "training": {"optimizer": "sgd", "max_seq_tokens": 100}},
    )
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (2, 4)
    assert job.lora["r"] == 4 and len(job.lora["target_modules"]) == 7
    assert (job.training["optimizer"], job.training["learning_rate"]) == ("sgd", 1e-4)
    assert job.training["max_seq_tokens"] == 100


def test_hyperparameters_are_taken_in_both_places_if_they_agree(server: Server) -> None:
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}}
    assert create(server, method=method).hyperparameters.n_epochs == 2
    assert create(server, method=method, hyperparameters={"n_epochs": 2}).hyperparameters.n_epochs == 2
    with pytest.raises(openai.BadRequestError) as caught:
        create(server, method=method, hyperparameters={"n_epochs": 3})
    assert caught.value.param == "method.supervised.hyperparameters.n_epochs"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": True}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": 257}}, "hyperparameters.batch_size"),
        ({"hyperparameters": {"learning_rate_multiplier": 0}}, "hyperparameters.learning_rate_multiplier"),
        ({"hyperparameters": {"epochs": 3}}, "hyperparameters.epochs"),
        ({"suffix": "s" * 65}, "suffix"),
        ({"suffix": "a:b"}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1}}}}, "method.type"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations"),
        ({"model": "other"}, "model"),
        ({"training_file": "file-" + "0" * 24}, "training_file"),
        ({"validation_file": "file-" + "0" * 24}, "validation_file"),
        ({"extra_body": {"lora": {"r": 0}}}, "lora.r"),
        ({"extra_body": {"lora": {"rank": 8}}}, "lora.rank"),
        ({"extra_body": {"lora": {"target_modules": ["q"]}}}, "lora.target_modules[0]"),
        ({"extra_body": {"training": {"retain": "all"}}}, "training.retain"),
        ({"extra_body": {"training": {"early_stopping_patience": 2}}}, "early_stopping_patience"),
        ({"extra_body": {"colour": "red"}}, "colour"),
    ],
)
def test_a_bad_request_names_its_field_and_makes_no_job(
    server: Server, options: dict[str, Any], param: str
) -> None:
    def newest() -> list[str]:
        return [job.id for job in server.client.fine_tuning.jobs.list(limit=1).data[:1]]

    before = newest()  # which may still run
    options.setdefault("training_file", upload(server))
    with pytest.raises(openai.BadRequestError) as caught:
        create(server, **options)
    assert caught.value.param == param
    assert newest() == before


def test_a_file_of_another_purpose_is_refused(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        create(server, training_file=upload(server, purpose="batch"))
    assert (caught.value.param, caught.value.code) == ("training_file", "wrong_purpose")


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_a_bad_file_fails_the_job_with_lines_before_any_compute(server: Server, param: str) -> None:
    bad = upload(server, DATA + b'{"messages": []}\nnot json\n')
    started = list(server.runner.started)
    job = finished(server, **{"training_file": upload(server), param: bad})
    assert (job.status, job.error.code, job.error.param) == ("failed", "invalid_training_file", param)
    assert "line 13: " in job.error.message and "line 14: invalid JSON" in job.error.message
    assert server.runner.started == started
    assert server.client.fine_tuning.jobs.list_events(job.id).data[0].level == "error"


def test_truncation_is_a_warning_event_that_says_how_many(server: Server) -> None:
    long = b'{"prompt": "a", "completion": "%s"}\n' % (b"z" * 600)
    job = finished(server, training_file=upload(server, DATA + 2 * long))
    messages = [e.message for e in server.client.fine_tuning.jobs.list_events(job.id) if e.level == "warn"]
    assert any("2 of 14 examples are too long and were truncated" in message for message in messages)


def test_events_walk_newest_first(server: Server) -> None:
    job = finished(server)
    walk = list(server.client.fine_tuning.jobs.list_events(job.id, limit=3))
    assert len({event.id for event in walk}) == len(walk)
    assert walk[-1].message.startswith("Created fine-tuning job")
    steps = [event.data for event in walk if event.type == "metrics"]
    assert [(data["step"], data["train_loss"]) for data in steps] == [(3, 1 / 3), (2, 0.5), (1, 1.0)]
    page = httpx.get(f"{server.url}/fine_tuning/jobs/{job.id}/events").json()
    assert page.keys() == {"object", "data", "has_more"}
    assert page["data"][0]["object"] == "fine_tuning.job.event" and page["data"][0]["data"] is None


def test_checkpoints_walk_newest_first(server: Server) -> None:
    job = finished(server)
    walk = list(server.client.fine_tuning.jobs.checkpoints.list(job.id, limit=2))
    assert [checkpoint.step_number for checkpoint in walk] == [3, 2, 1]
    assert walk[0].fine_tuned_model_checkpoint == f"{job.fine_tuned_model}:ckpt-step-3"
    assert (walk[0].fine_tuning_job_id, walk[0].metrics.train_loss) == (job.id, 1 / 3)
    page = httpx.get(f"{server.url}/fine_tuning/jobs/{job.id}/checkpoints").json()
    assert (page["first_id"], page["last_id"]) == (walk[0].id, walk[2].id)


def test_events_of_another_job_are_no_cursor(server: Server) -> None:
    one, two = finished(server), finished(server)
    event = server.client.fine_tuning.jobs.list_events(one.id).data[0]
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.fine_tuning.jobs.list_events(two.id, after=event.id)
    assert caught.value.param == "after"


def test_old_checkpoints_are_deleted_with_their_folders(server: Server) -> None:
    job = finished(server, extra_body={"training": {"save_total_limit": 1}})
    assert [c.step_number for c in server.client.fine_tuning.jobs.checkpoints.list(job.id)] == [3]
    assert [path.name for path in server.service.store.jobs.get(job.id).checkpoint_dir.iterdir()] == ["3"]


def test_pause_and_resume_go_on_where_the_job_was(server: Server) -> None:
    server.runner.go.clear()
    made = create(server)
    wait_for(server, made.id, "running")
    assert server.client.fine_tuning.jobs.pause(made.id).status == "paused"
    wait_until(lambda: made.id not in server.runner.running)
    assert server.client.fine_tuning.jobs.retrieve(made.id).status == "paused"
    assert server.client.fine_tuning.jobs.resume(made.id).status == "queued"
    server.runner.go.set()
    job = wait_for(server, made.id, "succeeded")
    assert server.runner.started.count(job.id) == 2
    assert len(list(server.client.fine_tuning.jobs.checkpoints.list(job.id))) == 3


def test_resume_before_the_runner_has_stopped_never_runs_the_job_twice_at_once(server: Server) -> None:
    server.runner.go.clear()
    made = create(server)
    for _ in range(5):
        wait_for(server, made.id, "running")
        server.client.fine_tuning.jobs.pause(made.id)
        server.client.fine_tuning.jobs.resume(made.id)
    server.runner.go.set()
    assert wait_for(server, made.id, "succeeded", "failed").status == "succeeded"
    assert server.runner.most_running == 1


def test_a_queued_job_waits_its_turn_and_can_be_paused_and_cancelled(server: Server) -> None:
    server.runner.go.clear()
    first = create(server)
    wait_for(server, first.id, "running")
    second, third = create(server), create(server)
    wait_for(server, second.id, "queued")
    wait_for(server, third.id, "queued")
    assert server.client.fine_tuning.jobs.pause(second.id).status == "paused"
    assert server.client.fine_tuning.jobs.cancel(second.id).status == "cancelled"
    server.runner.go.set()
    wait_for(server, third.id, "succeeded")
    assert second.id not in server.runner.started


def test_a_running_job_is_cancelled(server: Server) -> None:
    server.runner.go.clear()
    made = create(server)
    wait_for(server, made.id, "running")
    job = server.client.fine_tuning.jobs.cancel(made.id)
    assert job.status == "cancelled" and job.finished_at is not None
    wait_until(lambda: made.id not in server.runner.running)
    assert server.client.fine_tuning.jobs.retrieve(made.id).fine_tuned_model is None


@pytest.mark.parametrize("action", ["cancel", "pause", "resume"])
def test_a_job_that_is_over_cannot_be_changed(server: Server, action: str) -> None:
    job = finished(server)
    with pytest.raises(openai.BadRequestError, match="is succeeded and cannot become"):
        getattr(server.client.fine_tuning.jobs, action)(job.id)


def test_a_running_job_cannot_be_resumed(server: Server) -> None:
    server.runner.go.clear()
    made = create(server)
    wait_for(server, made.id, "running")
    with pytest.raises(openai.BadRequestError, match="is running and cannot become queued"):
        server.client.fine_tuning.jobs.resume(made.id)


def test_a_file_in_use_cannot_be_deleted(server: Server) -> None:
    server.runner.go.clear()
    training, validation = upload(server), upload(server)
    made = create(server, training_file=training, validation_file=validation)
    for file_id in (training, validation):
        with pytest.raises(openai.BadRequestError, match=made.id) as caught:
            server.client.files.delete(file_id)
        assert caught.value.code == "file_in_use"
    server.runner.go.set()
    wait_for(server, made.id, "succeeded")
    assert server.client.files.delete(training).deleted


def test_jobs_walk_newest_first_and_by_metadata(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        file_id = upload(server)
        made = [
            create(
                server, training_file=file_id, metadata={"odd": str(i % 2), "a'\"b": "c"} if i < 5 else None
            ).id
            for i in range(7)
        ]
        jobs = server.client.fine_tuning.jobs
        assert [job.id for job in jobs.list(limit=2)] == made[::-1]
        assert [job.id for job in jobs.list(limit=1, metadata={"odd": "1"})] == [made[3], made[1]]
        assert [job.id for job in jobs.list(metadata={"odd": "1", "a'\"b": "c"})] == [made[3], made[1]]
        assert not list(jobs.list(metadata={"odd": "1", "x": "y"}))
        assert not list(jobs.list(metadata={"odd": "\0"}))
        none = httpx.get(f"{server.url}/fine_tuning/jobs", params={"metadata": "null"}).json()
        assert [job["id"] for job in none["data"]] == made[:4:-1]


def test_the_same_key_with_the_same_request_makes_one_job(server: Server) -> None:
    file_id = upload(server)
    made: list[str] = []

    def post() -> None:
        made.append(create(server, training_file=file_id, extra_headers={"Idempotency-Key": "job-1"}).id)

    threads = [threading.Thread(target=post) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 6 and len(set(made)) == 1
    with pytest.raises(openai.BadRequestError) as caught:
        create(server, training_file=file_id, seed=1, extra_headers={"Idempotency-Key": "job-1"})
    assert caught.value.code == "idempotency_key_reused"


@pytest.mark.parametrize("path", ["", "/events", "/checkpoints"])
def test_unknown_jobs_are_a_404(server: Server, path: str) -> None:
    for job_id in ("ftjob-" + "0" * 24, "x", "%00"):
        response = httpx.get(f"{server.url}/fine_tuning/jobs/{job_id}{path}")
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("path", ["checkpoints/x/permissions", "alpha/graders/run"])
def test_what_is_not_offered_is_a_plain_404(server: Server, path: str) -> None:
    assert httpx.get(f"{server.url}/fine_tuning/{path}").status_code == 404


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"model": NaN}', b'"x"'])
def test_a_body_that_is_no_object_is_a_400(server: Server, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{server.url}/fine_tuning/jobs", content=body, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}


def test_the_openapi_document_describes_the_extensions(server: Server) -> None:
    schemas = server.app.openapi()["components"]["schemas"]
    assert "lora" in schemas["CreateJob"]["properties"] and "r" in schemas["LoraOptions"]["properties"]


def test_deleted_models_are_not_served_any_more(server: Server) -> None:
    job = finished(server)
    checkpoint = f"{job.fine_tuned_model}:ckpt-step-2"
    directory = server.service.store.jobs.get(job.id).directory
    server.service.delete_model(job.fine_tuned_model)
    server.service.delete_model(checkpoint)
    names = [model.name for model in server.service.models() if model.job_id == job.id]
    assert names == [f"{job.fine_tuned_model}:ckpt-step-1", f"{job.fine_tuned_model}:ckpt-step-3"]
    assert not (directory / "adapter").exists() and not (directory / "checkpoints" / "2").exists()
    assert server.client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model == job.fine_tuned_model
