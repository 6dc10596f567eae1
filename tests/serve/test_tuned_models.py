"""Models that jobs made: what is told of them, who is answered by them, and when they go."""

from __future__ import annotations

import csv
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

import tokenloom.serve.models
from running import Running, assert_error, wait_for
from tuning_server import client_of, create, rows, say, start, until, upload

LONG = 50  # epochs; of many rows, that is more than any test waits for


@pytest.fixture(scope="module")
def tuned(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server with room for two adapters, and a finished job of four epochs with three checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENLOOM_HOME", str(tmp_path_factory.mktemp("home")))
        server = start(tiny_folder, adapters__max_loaded=2)
        client = client_of(server)
        job = create(client, upload(client, rows(12)), epochs=4, suffix="sailor")
        job = until(client, job.id, "succeeded", "failed")
        assert job.status == "succeeded", job.error
        yield server, client, job
        server.stop()


def names(client: openai.OpenAI) -> list[str]:
    return [model.id for model in client.models.list()]


def checkpoints(client: openai.OpenAI, job: Any) -> list[Any]:
    return client.fine_tuning.jobs.checkpoints.list(job.id).data


def loaded(server: Running) -> list[str]:
    return [adapter.name for adapter in server.engine.engine.adapters.list()]


def test_a_finished_job_tells_what_it_did(tuned):
    _, client, job = tuned
    assert job.fine_tuned_model.startswith("ft:tiny:sailor:")
    assert job.trained_tokens > 0 and job.error is None
    events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
    losses = {e.data["step"]: e.data["train_loss"] for e in events if e.type == "metrics"}
    assert sorted(losses) == list(range(1, 13))
    assert losses[12] < losses[1]
    assert [c.step_number for c in checkpoints(client, job)] == [12, 9, 6]


def test_the_result_file_has_a_row_for_each_step(tuned):
    _, client, job = tuned
    table = csv.DictReader(io.StringIO(client.files.content(job.result_files[0]).text))
    assert [int(row["step"]) for row in table] == list(range(1, 13))


def test_a_fine_tuned_model_answers_as_itself(tuned):
    _, client, job = tuned
    messages = [{"role": "user", "content": "what of the sea?"}]
    fields = {"messages": messages, "temperature": 0, "max_tokens": 12}
    answers = {}
    for name in ("tiny", job.fine_tuned_model, checkpoints(client, job)[-1].fine_tuned_model_checkpoint):
        answer = client.chat.completions.create(model=name, **fields)
        assert answer.model == name
        answers[name] = answer.choices[0].message.content
    assert len(set(answers.values())) == 3
    vectors = [
        client.embeddings.create(model=name, input="the sea").data[0].embedding
        for name in ("tiny", job.fine_tuned_model)
    ]
    assert vectors[0] != vectors[1]


def test_fine_tuned_models_are_listed_with_their_base(tuned):
    _, client, job = tuned
    wanted = [job.fine_tuned_model, *(c.fine_tuned_model_checkpoint for c in checkpoints(client, job))]
    assert names(client)[0] == "tiny" and set(names(client)) == {"tiny", *wanted}
    assert len(names(client)) == len(wanted) + 1
    card = client.models.retrieve(job.fine_tuned_model)
    assert (card.root, card.parent, card.created) == (card.id, "tiny", job.finished_at)


def test_only_the_models_used_last_stay_loaded(tuned):
    server, client, job = tuned
    three = [c.fine_tuned_model_checkpoint for c in checkpoints(client, job)]
    texts = [say(server, name) for name in three]
    assert set(loaded(server)) == set(three[1:])
    assert say(server, three[0]) == texts[0]
    assert set(loaded(server)) == {three[0], three[2]}


def test_requests_that_come_together_load_a_model_once(tuned, monkeypatch):
    server, _, job = tuned
    server.engine.engine.adapters.remove(job.fine_tuned_model)
    load, calls, go = tokenloom.serve.models.load_adapter, [], threading.Event()

    def slow(*arguments: Any) -> Any:
        calls.append(arguments)
        assert go.wait(10)
        return load(*arguments)

    monkeypatch.setattr(tokenloom.serve.models, "load_adapter", slow)
    texts: list[str] = []
    threads = [
        threading.Thread(target=lambda: texts.append(say(server, job.fine_tuned_model))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: bool(calls))
    assert say(server, "tiny")  # the event loop does not wait for the loading
    go.set()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len(set(texts)) == 1 and len(texts) == 4


def test_models_of_nobody_are_not_found(tuned):
    server, _, _ = tuned
    for name in ("ft:tiny:sailor:000", "nobody"):
        body = {"model": name, "prompt": "a"}
        assert_error(server.http.post("/v1/completions", json=body), 404, "model", "model_not_found")
        assert_error(server.http.get(f"/v1/models/{name}"), 404, "model", "model_not_found")
        assert_error(server.http.delete(f"/v1/models/{name}"), 404, "model", "model_not_found")
        assert_error(server.http.post("/tokenize", json=body), 404, "model", "model_not_found")
    assert_error(server.http.delete("/v1/models/tiny"), 400, "model")


def test_tokens_can_be_asked_of_a_fine_tuned_model(tuned):
    server, _, job = tuned
    body = {"model": job.fine_tuned_model, "prompt": "the sea"}
    assert server.http.post("/tokenize", json=body).status_code == 200


def test_metrics_tell_of_training(tuned):
    server, _, job = tuned
    say(server, job.fine_tuned_model)
    lines = dict(
        line.rsplit(" ", 1) for line in server.http.get("/metrics").text.splitlines() if line[0] != "#"
    )

    def value(name: str) -> float:
        return float(lines[f'tokenloom:{name}{{model_name="tiny"}}'])

    assert value("finetune_steps_total") == 12
    assert value("finetune_tokens_total") == value("finetune_rows_total") > 0
    assert value("finetune_restarts_total") == value("finetune_jobs_running") == 0
    assert value("finetune_loss") > 0
    assert value("kv_blocks_training") == 0
    assert float(lines[f'tokenloom:model_requests_total{{model_name="{job.fine_tuned_model}"}}']) > 0
    assert any(f'adapter_info{{model_name="{job.fine_tuned_model}",version="' in line for line in lines)
    assert 'model_name="nobody"' not in "".join(lines)


def test_a_deleted_model_is_gone_and_its_checkpoints_stay(begin):
    server = begin()
    client = client_of(server)
    job = create(client, upload(client, rows(12)), epochs=1)
    job = until(client, job.id, "succeeded")
    assert say(server, job.fine_tuned_model)
    deleted = client.models.delete(job.fine_tuned_model)
    assert (deleted.id, deleted.deleted) == (job.fine_tuned_model, True)
    assert loaded(server) == []
    body = {"model": job.fine_tuned_model, "prompt": "a"}
    assert_error(server.http.post("/v1/completions", json=body), 404, "model", "model_not_found")
    [checkpoint] = checkpoints(client, job)
    assert names(client) == ["tiny", checkpoint.fine_tuned_model_checkpoint]
    assert say(server, checkpoint.fine_tuned_model_checkpoint)


def test_a_checkpoint_of_a_job_at_work_can_be_used_but_not_deleted(begin):
    server = begin()
    client = client_of(server)
    job = create(
        client,
        upload(client, rows(240)),
        epochs=LONG,
        training={"checkpoint_every_steps": 2, "save_total_limit": 1000},
    )
    wait_for(lambda: bool(checkpoints(client, job)), 30)
    name = checkpoints(client, job)[-1].fine_tuned_model_checkpoint
    assert say(server, name)
    assert_error(server.http.delete(f"/v1/models/{name}"), 400, "model", "model_in_use")
    client.fine_tuning.jobs.cancel(job.id)
