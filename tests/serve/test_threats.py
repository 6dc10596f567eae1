"""Abuse that no other test of a feature covers; SECURITY.md lists what covers which threat."""

import gzip
import json
import socket
import threading
import time

import pytest

from running import assert_error
from tokenloom.text import chat_template

URL = "/v1/chat/completions"
BODY = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


def chat(server, **fields):
    return server.http.post(URL, json={**BODY, **fields})


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        (URL, {"n": 4, "max_tokens": 100}),
        (URL, {"n": 2, "max_tokens": None}),
        ("/v1/completions", {"prompt": ["a"] * 4, "max_tokens": 100}),
        ("/v1/completions", {"prompt": "a" * 400, "max_tokens": 0, "echo": True, "logprobs": 1}),
    ],
)
def test_a_request_that_may_come_to_too_many_tokens_is_refused_before_any_work(serve, route, fields):
    server = serve(limits__max_total_tokens=300)
    response = server.http.post(route, json={**BODY, **fields})
    message = assert_error(response, 400, "max_tokens", "too_many_tokens")
    assert "this server allows 300" in message
    assert server.engine.calls == []


def test_prompts_to_embed_are_counted_as_well(serve):
    server = serve(limits__max_total_tokens=300)
    response = server.http.post("/v1/embeddings", json={"model": "fake", "input": ["a" * 100] * 4})
    assert_error(response, 400, "input", "too_many_tokens")


def test_a_request_within_its_tokens_is_served(serve):
    assert chat(serve(limits__max_total_tokens=300), n=2, max_tokens=100).status_code == 200


@pytest.mark.parametrize(("field", "value"), [("best_of", 21), ("n", 129), ("logprobs", 21)])
def test_caps_of_completions(shared, field, value):
    response = shared.http.post("/v1/completions", json={**BODY, "prompt": "a", field: value})
    assert f"{field}: must be at most {value - 1}" in assert_error(response, 400, field)


def test_tools_are_capped(shared):
    tool = {"type": "function", "function": {"name": "f"}}
    assert_error(chat(shared, tools=[tool] * 129), 400, "tools")


@pytest.mark.parametrize("digits", [5_000, 4_000_000])
def test_a_number_of_millions_of_digits_costs_nothing(shared, digits):
    body = b'{"model": "fake", "messages": [], "seed": ' + b"9" * digits + b"}"
    start = time.monotonic()
    response = shared.http.post(URL, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert time.monotonic() - start < 5


def test_no_address_is_looked_up_and_nothing_connected_to(serve, tmp_path, monkeypatch):
    """Whatever a request may name: images, models, files, adapters, integrations."""
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path))
    server = serve(jobs=True, coserve__mode="off")
    assert server.http.get("/health").status_code == 200  # the one connection that is needed
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **_: asked.append(arguments))
    url = "http://169.254.169.254/latest/meta-data"
    image = {"type": "image_url", "image_url": {"url": url}}
    job = {"model": url, "training_file": url, "integrations": [{"type": "wandb", "url": url}]}
    for path, body in (
        (URL, {**BODY, "messages": [{"role": "user", "content": [image]}]}),
        (URL, {**BODY, "model": url}),
        ("/v1/embeddings", {"model": url, "input": url}),
        ("/tokenize", {"model": url, "prompt": url}),
        ("/v1/load_lora_adapter", {"lora_name": url, "lora_path": url}),
        ("/v1/fine_tuning/jobs", job),
    ):
        assert 400 <= server.http.post(path, json=body).status_code < 500, path
    assert server.http.get(f"/v1/files/{url}").status_code == 404
    assert asked == []


def test_a_compressed_body_is_not_unpacked(shared):
    bomb = gzip.compress(json.dumps({**BODY, "user": "x" * 2**24}).encode())
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    response = shared.http.post(URL, content=bomb, headers=headers)
    assert_error(response, 400, None, "invalid_json")


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": "DEEP"}}},
        {"guided_json": "DEEP"},
        {"guided_regex": "(((((a{1,1000}){1,1000}){1,1000}){1,1000}){1,1000})"},
        {"guided_regex": "(a|aa)+" * 1000},
        {"guided_regex": "(" * 5000},
        {"guided_grammar": "root ::= root root | root\n" * 1000},
        {"guided_choice": ["x" * 1000] * 5000},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_hostile_grammar_costs_that_request_alone(shared, fields):
    deep: dict = {"type": "string"}
    for _ in range(60):
        deep = {"anyOf": [{"type": "array", "items": deep}, {"type": "object", "properties": {"a": deep}}]}
        if len(json.dumps(deep)) > 500_000:
            break
    body = {**BODY, **json.loads(json.dumps(fields).replace('"DEEP"', json.dumps(deep)))}
    done = threading.Event()
    slowest = 0.0

    def watch() -> None:
        nonlocal slowest
        while not done.is_set():
            start = time.monotonic()
            assert shared.http.get("/health").status_code == 200
            slowest = max(slowest, time.monotonic() - start)

    watching = threading.Thread(target=watch)
    watching.start()
    start = time.monotonic()
    response = shared.http.post(URL, json=body)
    took = time.monotonic() - start
    done.set()
    watching.join()
    assert response.status_code in (200, 400), response.text
    assert took < 15
    assert slowest < 3


def test_a_template_without_an_end_holds_up_its_own_request_alone(serve, monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.5)
    from fake_engine import FakeEngine
    from running import settings

    engine = FakeEngine(settings(), chat_template="{% for a in range(10 ** 12) %}{% endfor %}")
    server = serve(engine=engine)
    asking = threading.Thread(target=lambda: chat(server))
    asking.start()
    assert server.http.get("/v1/models").status_code == 200
    completion = {"model": "fake", "prompt": "a", "max_tokens": 1}
    assert server.http.post("/v1/completions", json=completion).status_code == 200
    asking.join(20)
    assert not asking.is_alive()
    assert_error(chat(server), 400, "messages", "chat_template_error")


@pytest.mark.parametrize("path", ["/v1/files/../../etc/passwd", "/v1/files/%2e%2e%2fjobs.sqlite/content"])
def test_ids_are_no_paths(serve, tmp_path, monkeypatch, path):
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path))
    server = serve(jobs=True, coserve__mode="off")
    response = server.http.get(path)
    assert_error(response, 404, None)
    assert str(tmp_path) not in response.text
