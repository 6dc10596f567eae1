"""Logs: what a request leaves in them, in both formats, and what it never does."""

import json
import logging
from types import SimpleNamespace

import httpx
import pytest

from finetune_fakes import DATA, FakeRunner, trainable, wait_until
from running import Running, settings, wait_for
from tokenloom.engine.async_engine import AsyncEngine
from tokenloom.engine.engine import Engine
from tokenloom.finetune.job_request import parse_job
from tokenloom.finetune.service import JobService
from tokenloom.finetune.store import Store
from tokenloom.logs import JsonLines, Text
from tokenloom.serve.request_record import RequestRecord, enter, leave, note_answer

SECRET = "qwxyzsecret"
CHAT = {"model": "fake", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 3}


def test_a_request_is_one_line_with_its_durations_and_tokens(serve, logged):
    server, log = serve(step_s=0.02), logged()
    answer = server.http.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "mine-1"})
    line = log.request()
    assert {
        "method": "POST",
        "route": "/v1/chat/completions",
        "status": 200,
        "model": "fake",
    }.items() <= line.items()
    assert line["request_id"] == "mine-1"
    usage = answer.json()["usage"]
    assert (line["prompt_tokens"], line["completion_tokens"]) == (usage["prompt_tokens"], 3)
    assert line["finish_reasons"] == ["length"]
    assert 0 <= line["queue_ms"] < 20 <= line["ttft_ms"] < line["total_ms"]
    assert line["total_ms"] >= 60


def test_a_stream_is_logged_when_it_is_over(serve, logged):
    server, log = serve(step_s=0.02), logged()
    server.http.post("/v1/chat/completions", json={**CHAT, "stream": True})
    line = log.request()
    assert line["completion_tokens"] == 3 and line["total_ms"] >= 60


def test_neither_prompts_nor_answers_are_logged(serve, logged):
    server, log = serve(), logged(level="debug")
    server.http.post("/v1/chat/completions", json=CHAT)
    server.http.post("/v1/completions", json={"model": "fake", "prompt": SECRET, "max_tokens": 0, "n": 99})
    server.http.post("/tokenize", json={"prompt": SECRET})
    server.engine.fail_at = 1
    server.http.post("/v1/chat/completions", json=CHAT)
    log.request(4)
    assert SECRET not in log.text
    assert "abc" not in log.text


def test_content_is_logged_where_it_is_asked_for_and_said_so(serve, logged):
    log = logged(content=True)
    server = serve(logging__content=True)
    server.http.post("/v1/chat/completions", json=CHAT)
    wait_for(lambda: '"answers":' in log.text)
    assert "logging.content is on" in log.lines[0]["message"] and log.lines[0]["level"] == "warning"
    assert SECRET in log.lines[-1]["prompt"] and log.lines[-1]["answers"] == ["abc"]


def test_every_line_of_a_request_has_its_id(serve, logged):
    server, log = serve(server__drain_timeout_s=0), logged()
    server.engine.break_at = 0
    body = {**CHAT, "stream": False}
    answer = server.http.post("/v1/chat/completions", json=body, headers={"x-request-id": "mine-2"})
    assert answer.status_code == 500
    log.request()
    assert len(log.lines) >= 2 and {line["request_id"] for line in log.lines} == {"mine-2"}
    assert any("ZeroDivisionError" in line.get("exception", "") for line in log.lines)
    assert log.request()["level"] == "error"


def test_a_refusal_is_logged_with_its_code(serve, logged):
    server, log = serve(server__api_keys=["k"]), logged()
    server.http.get("/v1/models")
    line = log.request()
    assert (line["status"], line["error"], line["route"]) == (401, "invalid_api_key", "unmatched")
    assert "prompt_tokens" not in line


def test_a_request_is_logged_with_the_id_of_its_key_and_never_the_key(serve, logged):
    server, log = serve(server__api_keys=["k-open-sesame"]), logged()
    server.http.get("/v1/models", headers={"authorization": "Bearer k-open-sesame"})
    assert log.request()["key"] == "api-1"
    assert "open-sesame" not in log.text


def test_a_client_that_goes_away_is_logged_as_such(serve, logged):
    server, log = serve(step_s=5), logged()
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/v1/chat/completions", json=CHAT, timeout=0.1)
    line = log.request()
    assert (line["status"], line["finish_reasons"]) == (499, ["abort"])


def test_successful_probes_are_debug_lines(serve, logged):
    server, log = serve(), logged()
    server.http.get("/health")
    server.http.get("/v1/models")
    assert log.request()["route"] == "/v1/models"
    assert len(log.lines) == 1


def test_the_engines_requests_carry_the_id_of_the_clients(serve):
    server = serve()
    for _ in range(2):
        server.http.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "mine-3"})
    first, second = (call.request_id for call in server.engine.calls)
    assert first.startswith("mine-3-") and second.startswith("mine-3-") and first != second


def test_what_a_request_leaves_behind_is_not_its_own():
    record = RequestRecord("r", "POST")
    token = enter(record)
    note_answer(SimpleNamespace(request="during"))
    record.ended_s = record.started_s
    note_answer(SimpleNamespace(request="after"))
    leave(token)
    note_answer(SimpleNamespace(request="elsewhere"))
    assert record.runs == ["during"]


def test_a_record_follows_its_answer_to_another_run_of_the_loop():
    record, answer = RequestRecord("r", "POST"), SimpleNamespace(request="first")
    token = enter(record)
    note_answer(answer)
    leave(token)
    answer.request = "second"  # what a loop that is started again does
    assert record.runs == ["second"]


def test_events_of_jobs_are_lines_with_the_jobs_id(logged, tmp_path):
    log, store, runner = logged(level="debug"), Store(tmp_path), FakeRunner()
    service = JobService(store, runner, trainable())
    service.start()
    file = service.create_file([DATA], "train.jsonl")
    job = service.create_job(parse_job({"model": "tiny", "training_file": file.id}))
    wait_until(lambda: store.jobs.get(job.id).status == "succeeded")
    service.stop()
    store.close()
    lines = [line for line in log.lines if line.get("job") == job.id]
    assert any("The job has started" in line["message"] for line in lines)
    steps = [line["level"] for line in lines if "training loss" in line["message"]]
    assert steps == ["debug"] * 3
    assert "hello" not in log.text  # what the rows say


def test_the_engine_says_when_it_begins_drains_and_ends(tiny_folder, logged):
    log = logged()
    flags = {"model__name": str(tiny_folder), "model__dtype": "float64", "cache__kv_bytes": 2**20}
    server = Running(AsyncEngine(Engine(settings(**flags))))
    server.stop()
    said = [line["message"] for line in log.lines if line["logger"] == "tokenloom.engine"]
    assert said == ["the engine loop runs", "draining", "the engine loop ended"]


def record(text, **values):
    """A line of the first quarter second of 1970."""
    made = logging.LogRecord("tokenloom.x", logging.INFO, "f", 1, text, (), None)
    made.created = 0.25
    made.fields = values
    return made


def test_text_is_one_line_whatever_a_client_sends():
    line = Text().format(record("hi\nERROR forged", model='a b\n\x1b[2J"', tokens=3, empty=""))
    assert line == (
        "1970-01-01T00:00:00.250Z INFO tokenloom.x: hi\\x0aERROR forged "
        'model="a b\\n\\u001b[2J\\"" tokens=3 empty=""'
    )


def test_json_lines_keep_their_own_keys():
    line = json.loads(JsonLines().format(record("hi", message="forged", level="forged", n=1)))
    assert line == {
        "time": "1970-01-01T00:00:00.250Z",
        "level": "info",
        "logger": "tokenloom.x",
        "message": "hi",
        "n": 1,
    }


def test_lines_below_the_level_are_left_out(logged):
    log = logged(level="warning")
    logging.getLogger("tokenloom.engine").info("quiet")
    logging.getLogger("tokenloom.engine").warning("loud")
    logging.getLogger("httpx").info("foreign")
    assert [line["message"] for line in log.lines] == ["loud"]
