"""OpenAI's client drives fine-tuning jobs on the real engine, beside its requests."""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from typing import Any

import openai
import pytest

from running import assert_error, wait_for
from tokenloom.engine.latency_model import Features, LatencyModel
from tokenloom.finetune.jsonl import MAX_LINE_BYTES
from tokenloom.finetune.objective import SupervisedFinetuning
from tuning_server import PROMPT, client_of, create, rows, say, steps_of, until, upload

LONG = 50  # epochs; of many rows, that is more than any test waits for


def test_a_paused_job_goes_on_and_succeeds(begin):
    server = begin()
    client = client_of(server)
    job = create(client, upload(client, rows(12)), epochs=12)
    wait_for(lambda: steps_of(client, job.id) >= 2, 30)
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    wait_for(lambda: not server.engine.engine.coserver.trainings)
    done = steps_of(client, job.id)
    assert done < 36
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    assert until(client, job.id, "succeeded", "failed").status == "succeeded"
    events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
    assert sorted(e.data["step"] for e in events if e.type == "metrics") == list(range(1, 37))
    assert f"Going on after step {done}" in [event.message for event in events]


def test_a_cancelled_job_gives_everything_back(begin):
    server = begin()
    client, engine = client_of(server), server.engine.engine
    job = create(client, upload(client, rows(240)), epochs=LONG)
    wait_for(lambda: steps_of(client, job.id) >= 1, 30)
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    wait_for(lambda: not engine.coserver.trainings and engine.pool.num_used == 0)
    engine.pool.check()
    following = create(client, upload(client, rows(12)), epochs=1)
    assert until(client, following.id, "succeeded").status == "succeeded"


def test_faulty_rows_fail_the_job_with_their_lines(begin):
    server = begin()
    client = client_of(server)
    bad = rows(12) + b'{"messages": []}\nnot json\n'
    job = until(client, create(client, upload(client, bad)).id, "failed")
    assert (job.error.code, job.error.param) == ("invalid_training_file", "training_file")
    assert "line 13" in job.error.message and "line 14" in job.error.message
    assert job.trained_tokens is None
    assert say(server, "tiny")


def test_requests_get_the_same_text_while_a_job_trains(begin):
    server = begin()
    client = client_of(server)
    prompts = [f"{word} of the sea and" for word in ("wind", "storm", "boat", "sail")]
    alone = [say(server, "tiny", prompt, 40) for prompt in prompts]
    job = create(client, upload(client, rows(240)), epochs=LONG)
    wait_for(lambda: steps_of(client, job.id) >= 1, 30)
    before = server.engine.stats().training_tokens
    beside = [say(server, "tiny", prompt, 40, cache_salt="cold") for prompt in prompts]
    assert beside == alone
    assert server.engine.stats().training_tokens > before
    assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
    client.fine_tuning.jobs.cancel(job.id)


def quick_machine() -> LatencyModel:
    samples = [
        (Features(rows=n, context=n * n, head_rows=1, train_rows=n), 0.1 + n / 100) for n in (1, 8, 64)
    ]
    samples += [(Features(bwd_quanta=1, bwd_rows=n, bwd_context=n * n), 0.1 + n / 100) for n in (8, 64)]
    samples += [(Features(loss_quanta=1, loss_rows=8), 0.2), (Features(optimizer=1), 0.5)]
    return LatencyModel.fit(samples)


@pytest.mark.parametrize("profiled", [False, True])
def test_co_serving_finishes_a_job_beside_requests(begin, profiled):
    """Once with a latency model that is given, once with the profile that the server takes itself."""
    server = begin(coserve__mode="coserve")
    client = client_of(server)
    if not profiled:
        server.engine.engine.coserver.latency = quick_machine()
    alone = say(server, "tiny", max_tokens=60)
    job = create(client, upload(client, rows(12)), epochs=4)
    wait_for(lambda: server.engine.stats().training_jobs == 1)
    for salt in range(5):
        assert say(server, "tiny", max_tokens=60, cache_salt=str(salt)) == alone
    assert until(client, job.id, "succeeded", "failed").status == "succeeded"


def giant_rows() -> bytes:
    """Lines of just under, and over, the longest that is read, between good ones."""
    lines = []
    for size in (MAX_LINE_BYTES - 200, MAX_LINE_BYTES + 200):
        text = "the boat is at sea " * (size // 19)
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
        lines.append(json.dumps({"messages": messages}).encode() + b"\n")
    return rows(6) + lines[0] + lines[1] + rows(6)


def test_poisoned_jobs_cost_a_running_chat_nothing(begin, monkeypatch):
    """Giant lines, then a loss that becomes NaN, beside a stream whose targets are generous."""
    server = begin(coserve__mode="coserve", slo__ttft_ms=2000, slo__tpot_ms=100)
    server.engine.engine.coserver.latency = quick_machine()
    client = client_of(server)
    alone = say(server, "tiny", max_tokens=400)
    outcomes, stop = [], threading.Event()

    def chat() -> None:
        while not stop.is_set():
            times, text = [time.monotonic()], ""
            stream = client.completions.create(
                model="tiny",
                prompt=PROMPT,
                max_tokens=400,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            for chunk in stream:
                times.append(time.monotonic())
                text += chunk.choices[0].text if chunk.choices else ""
            ttft_s, tpot_s = times[1] - times[0], (times[-1] - times[1]) / 399
            outcomes.append((text == alone, ttft_s <= 2, tpot_s <= 0.1))

    chatting = threading.Thread(target=chat)
    chatting.start()
    try:
        giant = until(client, create(client, upload(client, giant_rows())).id, "failed", "succeeded")
        assert (giant.status, giant.error.code) == ("failed", "invalid_training_file")
        assert "line 7: " in giant.error.message and "line 8: the line is longer" in giant.error.message
        honest, calls = SupervisedFinetuning.backward, itertools.count()

        def poisoned(self: Any, *args: Any) -> Any:
            sums, gradient = honest(self, *args)
            return sums, gradient * (math.nan if next(calls) > 8 else 1)

        monkeypatch.setattr(SupervisedFinetuning, "backward", poisoned)
        job = until(client, create(client, upload(client, rows(12)), epochs=LONG).id, "failed", "succeeded")
        assert job.status == "failed" and "step" in job.error.message
        assert server.engine.stats().training_tokens > 0
    finally:
        stop.set()
        chatting.join()
    assert outcomes and all(all(outcome) for outcome in outcomes)


def test_a_restarted_server_goes_on_with_its_jobs(begin):
    server = begin()
    client = client_of(server)
    file = upload(client, rows(12))
    job, second = create(client, file, epochs=20), create(client, file, epochs=1)
    wait_for(lambda: steps_of(client, job.id) >= 2, 30)
    server.stop()
    server = begin()
    client = client_of(server)
    assert until(client, job.id, "succeeded", "failed").status == "succeeded"
    assert until(client, second.id, "succeeded", "failed").status == "succeeded"
    events = client.fine_tuning.jobs.list_events(job.id, limit=1000).data
    assert sorted(e.data["step"] for e in events if e.type == "metrics") == list(range(1, 61))
    assert any(event.message.startswith("Going on after step") for event in events)


def test_without_training_files_are_kept_and_jobs_refused(begin):
    server = begin(coserve__mode="off")
    client = client_of(server)
    file = upload(client, rows(12))
    with pytest.raises(openai.BadRequestError, match=r"coserve\.mode is off") as refused:
        create(client, file)
    assert refused.value.code == "training_off"
    assert client.fine_tuning.jobs.list().data == []
    assert client.files.retrieve(file).bytes == len(rows(12))


def test_a_job_waits_while_training_is_off(begin):
    server = begin()
    client = client_of(server)
    job = create(client, upload(client, rows(12)), epochs=20)
    wait_for(lambda: steps_of(client, job.id) >= 1, 30)
    server.stop()
    server = begin(coserve__mode="off")
    client = client_of(server)
    assert say(server, "tiny")
    assert client.fine_tuning.jobs.retrieve(job.id).status == "queued"
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"


def test_a_second_server_on_the_same_home_serves_without_jobs(begin, tmp_path, caplog):
    first = begin()
    second = begin()
    assert say(second, "tiny") == say(first, "tiny")
    for method, path in (
        ("GET", "/v1/files"),
        ("POST", "/v1/files"),
        ("DELETE", "/v1/files/file-1"),
        ("POST", "/v1/fine_tuning/jobs"),
        ("GET", "/v1/fine_tuning/jobs/ftjob-1/events"),
    ):
        message = assert_error(second.http.request(method, path), 503, None, "store_unavailable")
        assert "in use by another tokenloom process" in message and str(tmp_path) not in message
    assert "in use by another" in caplog.text
    assert [model["id"] for model in second.http.get("/v1/models").json()["data"]] == ["tiny"]
    first.stop()


def test_uploads_have_a_limit_of_their_own(begin):
    server = begin(limits__max_body_bytes=2048, jobs__max_file_bytes=2**20)
    client = client_of(server)
    assert client.files.retrieve(upload(client, rows(100))).bytes > 8192
    with pytest.raises(openai.APIStatusError) as large:
        upload(client, b"x" * (2**20 + 1))
    assert large.value.status_code == 413
    body = {"model": "tiny", "prompt": "x" * 4096}
    assert_error(server.http.post("/v1/completions", json=body), 413, None, "request_too_large")
    assert_error(
        server.http.post("/v1/fine_tuning/jobs", json={"model": "x" * 4096}), 413, None, "request_too_large"
    )


def test_examples_are_no_longer_than_training_has_memory_for(begin):
    server = begin(cache__kv_bytes=2**19)
    client, engine = client_of(server), server.engine.engine
    long = rows(12).replace(b"is wide", b"is " + b"wide and " * 60 + b"wide")
    job = create(client, upload(client, long), epochs=1, training={"max_seq_tokens": 512})
    job = until(client, job.id, "succeeded", "failed")
    assert job.status == "succeeded", job.error
    assert 8 <= job.training["max_seq_tokens"] < engine.max_model_len
