"""What bad input gets: the right status, the field's name, and all four keys of OpenAI's error object."""

import httpx
import pytest

from running import assert_error
from tokenloom.errors import EngineBusyError, EngineStoppedError, RequestError

URL = "/v1/chat/completions"
BODY = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
JSON = {"content-type": "application/json"}


def chat(server, **fields):
    return server.http.post(URL, json={**BODY, **fields})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.5),
        ("temperature", -0.1),
        ("temperature", "0.5"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.1),
        ("n", 0),
        ("n", 129),
        ("n", 1.5),
        ("n", "2"),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 10**30),
        ("max_completion_tokens", 0),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {str(i): 0 for i in range(1025)}),
        ("logit_bias", [1]),
        ("logprobs", 1),
        ("top_logprobs", 21),
        ("top_logprobs", 2),
        ("stop", 5),
        ("stop", ["a"] * 17),
        ("seed", 2**64),
        ("seed", 0.5),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("top_k", -1),
        ("min_p", 1),
        ("repetition_penalty", 0),
        ("min_tokens", 2),
        ("stop_token_ids", [1] * 257),
        ("prompt_logprobs", 21),
        ("priority", "high"),
        ("cache_salt", ""),
        ("metadata", {str(i): "x" for i in range(17)}),
        ("model", ""),
        ("messages", []),
        ("messages", "hi"),
        ("messages", None),
    ],
)
def test_a_value_out_of_range_or_of_the_wrong_type_is_named(shared, field, value):
    response = chat(shared, **{field: value})
    assert response.status_code == 400
    param = response.json()["error"]["param"]
    assert param.partition(".")[0] == field
    assert assert_error(response, 400, param).startswith(field)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": []}, "messages[0].content"),
        ({"role": "wizard", "content": "a"}, "messages[0].role"),
        ({"content": "a"}, "messages[0].role"),
        ("hi", "messages[0]"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1"}}]},
            "messages[0].content[0].type",
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio"}]},
            "messages[0].content[1].type",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
    ],
)
def test_a_bad_message_is_named_by_its_path(shared, message, param):
    response = chat(shared, messages=[message])
    assert assert_error(response, 400, param).startswith(param)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy"}),
        ("reasoning_effort", "high"),
        ("chat_template", "{{ messages }}"),
        ("best_of", 2),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(shared, field, value):
    message = assert_error(chat(shared, **{field: value}), 400, field, "unsupported_parameter")
    assert message.startswith(field)


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"tools": [], "tool_choice": "auto"},
        {"modalities": ["text"]},
        {"parallel_tool_calls": True, "service_tier": "auto", "store": False, "made_up": [1]},
    ],
)
def test_what_asks_for_nothing_is_taken(shared, fields):
    assert chat(shared, **fields).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"model": "fake", "temperature": NaN}',
        b'{"model": "fake", "temperature": Infinity}',
        b'{"model": "fake", "temperature": -Infinity}',
        b'{"model": "\xff"}',
        b'{"model": "\\ud800"}',
        b'{"model": ' + b"[" * 100_000,
        b'{"model": ' + b"[" * 1000 + b"]" * 1000 + b"}",
        b"[" + b"{}," * 300_000 + b"{}]",
        b"\xef\xbb\xbf{}",
    ],
    ids=lambda body: repr(body[:40]),
)
def test_what_is_not_strict_json_is_refused(shared, body):
    assert_error(shared.http.post(URL, content=body, headers=JSON), 400, None, "invalid_json")


def test_a_number_beyond_floats_is_not_finite(shared):
    body = b'{"model": "fake", "messages": [{"role": "user", "content": "a"}], "temperature": 1e999}'
    message = assert_error(shared.http.post(URL, content=body, headers=JSON), 400, "temperature")
    assert "finite" in message


@pytest.mark.parametrize("body", [b"[]", b"5", b'"x"', b"null"])
def test_a_body_must_be_an_object(shared, body):
    response = shared.http.post(URL, content=body, headers=JSON)
    assert response.status_code == 400
    assert "body" in assert_error(response, 400, None)


def test_another_content_type_is_refused(shared):
    response = shared.http.post(URL, content=b"{}", headers={"content-type": "text/plain"})
    assert_error(response, 415, None)


def test_nul_bytes_are_text(shared):
    assert chat(shared, messages=[{"role": "user", "content": "a\0b"}]).status_code == 200


def test_an_unknown_model(shared):
    message = assert_error(chat(shared, model="gpt-9"), 404, "model", "model_not_found")
    assert "gpt-9" in message


@pytest.mark.parametrize("path", ["/v1", "/v1/chat", "/v1/chat/completions/", "/docs", "/v2/models"])
def test_an_unknown_route(shared, path):
    assert path in assert_error(shared.http.get(path), 404, None, "route_not_found")


def test_the_wrong_method(shared):
    response = shared.http.get(URL)
    assert_error(response, 405, None, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_a_prompt_beyond_the_context_names_the_messages(shared):
    response = chat(shared, messages=[{"role": "user", "content": "x" * 600}])
    assert "512" in assert_error(response, 400, "messages", "context_length_exceeded")


@pytest.mark.parametrize(
    ("limit", "fields", "param"),
    [
        ({"limits__max_n": 2}, {"n": 3}, "n"),
        ({"limits__max_logprobs": 1}, {"logprobs": True, "top_logprobs": 2}, "logprobs"),
        ({"limits__max_logprobs": 1}, {"prompt_logprobs": 2}, "prompt_logprobs"),
        ({"limits__max_tokens": 5}, {"max_tokens": 6}, "max_tokens"),
    ],
)
def test_configured_limits(serve, limit, fields, param):
    assert "at most" in assert_error(chat(serve(**limit), **fields), 400, param)


def test_the_configured_max_tokens_is_also_the_default(serve):
    server = serve(limits__max_tokens=5)
    assert server.http.post(URL, json={**BODY, "max_tokens": None}).json()["usage"]["completion_tokens"] == 5


def test_a_full_queue_says_when_to_come_back(serve):
    server = serve()
    server.engine.refuse = EngineBusyError("the queue is full", retry_after_s=2.5)
    response = chat(server)
    assert_error(response, 429, None, "queue_full")
    assert response.headers["retry-after"] == "3"


def test_a_stopped_engine_says_when_to_come_back(serve):
    server = serve()
    server.engine.refuse = EngineStoppedError("the server is shutting down")
    response = chat(server)
    assert_error(response, 503, None, "engine_stopped")
    assert 0 < int(response.headers["retry-after"]) <= 120


def test_the_engines_own_complaint_keeps_its_field(serve):
    server = serve()
    server.engine.refuse = RequestError("n is 9; this server runs at most 4", param="n")
    assert "at most 4" in assert_error(chat(server), 400, "n")


def test_a_body_over_the_limit_by_content_length(serve):
    server = serve(limits__max_body_bytes=2048)
    big = chat(server, messages=[{"role": "user", "content": "x" * 4096}])
    assert "2048" in assert_error(big, 413, None, "request_too_large")


def test_a_chunked_body_over_the_limit_is_not_read_to_its_end(serve):
    server = serve(limits__max_body_bytes=100_000)
    sent = 0

    def chunks():
        nonlocal sent
        for _ in range(2000):
            sent += 1
            yield b" " * 65536

    with httpx.Client(base_url=server.url) as client:
        response = client.post(URL, content=chunks(), headers=JSON)
    assert_error(response, 413, None, "request_too_large")
    assert sent < 2000
    assert server.engine.calls == []


def test_a_chunked_body_within_the_limit_is_read(shared):
    import json

    text = json.dumps(BODY).encode()
    response = shared.http.post(URL, content=(text[i : i + 7] for i in range(0, len(text), 7)), headers=JSON)
    assert response.status_code == 200


def test_the_server_goes_on_after_bad_input(shared):
    for body in (b"{", b'{"model": ' + b"[" * 100_000, b"\xff"):
        shared.http.post(URL, content=body, headers=JSON)
    assert chat(shared).status_code == 200
