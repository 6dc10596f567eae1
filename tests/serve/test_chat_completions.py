"""POST /v1/chat/completions over the fake engine."""

import json

import pytest

from fake_engine import FakeEngine
from running import assert_error, events, settings, wait_for

URL = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]


def chat(server, **fields):
    return server.http.post(URL, json={"model": "fake", "messages": HELLO, **fields})


def test_an_answer_has_openais_shape(shared):
    body = chat(shared, max_tokens=3).json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == "fake"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "abc", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]


def test_usage_counts_the_prompt_once_and_all_choices(shared):
    body = chat(shared, max_tokens=3, n=2).json()
    prompt = len(shared.engine.calls[-1].prompt)
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 6,
        "total_tokens": prompt + 6,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_chunks_put_together_are_the_answer(shared):
    fields = {"max_tokens": 5, "n": 2, "seed": 3}
    whole = chat(shared, **fields).json()["choices"]
    data = events(chat(shared, stream=True, **fields))
    assert data[-1] == "[DONE]"
    chunks = [json.loads(item) for item in data[:-1]]
    for choice in whole:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
        assert mine[-1]["delta"] == {}
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["length"]
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert len({c["id"] for c in chunks}) == 1
    assert all("usage" not in c for c in chunks)


def test_include_usage_adds_a_last_chunk_without_choices(shared):
    usage = chat(shared, max_tokens=4).json()["usage"]
    response = chat(shared, max_tokens=4, stream=True, stream_options={"include_usage": True})
    chunks = [json.loads(item) for item in events(response)[:-1]]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == usage
    assert all(c["usage"] is None for c in chunks[:-1])
    assert response.headers["content-type"].startswith("text/event-stream")


def test_logprobs_carry_token_bytes_and_alternatives(shared):
    body = chat(shared, max_tokens=1, logprobs=True, top_logprobs=2).json()
    assert body["choices"][0]["logprobs"]["content"] == [
        {
            "token": "a",
            "bytes": [97],
            "logprob": -0.5,
            "top_logprobs": [
                {"token": "a", "bytes": [97], "logprob": -0.5},
                {"token": "b", "bytes": [98], "logprob": -1.5},
            ],
        }
    ]


def test_streamed_logprobs_are_those_of_the_answer(shared):
    fields = {"max_tokens": 3, "logprobs": True, "top_logprobs": 1}
    whole = chat(shared, **fields).json()["choices"][0]["logprobs"]["content"]
    chunks = [json.loads(item)["choices"][0] for item in events(chat(shared, stream=True, **fields))[:-1]]
    assert [e for c in chunks if c["logprobs"] for e in c["logprobs"]["content"]] == whole


def test_prompt_logprobs_name_every_prompt_token_after_the_first(shared):
    body = chat(shared, max_tokens=1, prompt_logprobs=1).json()
    prompt = shared.engine.calls[-1].prompt
    assert body["prompt_logprobs"][0] is None
    assert [next(iter(entry)) for entry in body["prompt_logprobs"][1:]] == [str(t) for t in prompt[1:]]


def test_every_sampling_field_reaches_the_engine(shared):
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 2,
        "stop": ["x", "y"],
        "seed": 7,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {"5": -100},
        "max_completion_tokens": 4,
        "max_tokens": 9,
        "logprobs": True,
        "top_k": 3,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "min_tokens": 1,
        "ignore_eos": True,
        "stop_token_ids": [4],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "prompt_logprobs": 2,
        "priority": -3,
        "cache_salt": "tenant",
        "user": "me",
        "metadata": {"a": "b"},
    }
    assert chat(shared, **fields).status_code == 200
    call = shared.engine.calls[-1]
    params = call.params
    assert (call.priority, call.cache_salt) == (-3, "tenant")
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 3, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.5, -0.5, 1.1)
    assert (params.n, params.seed, params.max_tokens, params.min_tokens) == (2, 7, 4, 1)
    assert (params.stop, params.stop_token_ids) == (("x", "y"), (4,))
    assert (params.include_stop, params.ignore_eos, params.skip_special_tokens) == (True, True, False)
    assert (params.logit_bias, params.logprobs, params.prompt_logprobs) == ({5: -100.0}, 0, 2)


def test_fields_left_out_or_null_take_openais_defaults(shared):
    chat(shared, temperature=None, n=None, stop=None, max_tokens=1)
    params = shared.engine.calls[-1].params
    assert (params.temperature, params.n, params.stop, params.logprobs) == (1.0, 1, (), None)


def test_parts_are_joined_and_developer_becomes_system(shared):
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c"},
        {"role": "tool", "content": "d", "tool_call_id": "1"},
    ]
    chat(shared, messages=messages, max_tokens=1)
    text = shared.engine.tokenizer.decode(shared.engine.calls[-1].prompt, skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n"
        "<|im_start|>assistant\nc<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nd\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_without_a_generation_prompt(shared):
    chat(shared, add_generation_prompt=False, max_tokens=1)
    text = shared.engine.tokenizer.decode(shared.engine.calls[-1].prompt, skip_special_tokens=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"


def test_a_template_that_knows_developer_and_tools_gets_them(serve):
    template = (
        "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}{% for m in messages %}"
        "{{ 'DEV' if m.role == 'developer' else m.role }}:{{ m.content }}"
        "{% for call in m.tool_calls or [] %}({{ call.function.arguments.x }}){% endfor %};{% endfor %}"
    )
    server = serve(engine=FakeEngine(settings(), chat_template=template))
    messages = [
        {"role": "developer", "content": "a"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 5}'}}
            ],
        },
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert chat(server, messages=messages, tools=tools, max_tokens=1).status_code == 200
    assert server.engine.tokenizer.decode(server.engine.calls[-1].prompt) == "[f]DEV:a;assistant:(5);"
    assert chat(server, tools=tools, tool_choice="none", max_tokens=1).status_code == 200
    assert server.engine.tokenizer.decode(server.engine.calls[-1].prompt) == "user:hi;"


def test_a_client_that_leaves_a_stream_aborts_its_request(serve):
    server = serve(step_s=0.01)
    body = {"model": "fake", "messages": HELLO, "stream": True}
    with server.http.stream("POST", URL, json=body) as response:
        lines = response.iter_lines()
        next(lines)
        [call] = server.engine.calls
        assert server.engine.running == 1
    wait_for(lambda: server.engine.aborted == [call.request_id])
    assert server.engine.running == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_gives_up_waiting_aborts_its_request(serve, stream):
    import httpx

    server = serve(step_s=0.5)
    with pytest.raises(httpx.ReadTimeout):
        server.http.post(
            URL, json={"model": "fake", "messages": HELLO, "n": 2, "stream": stream}, timeout=0.1
        )
    wait_for(lambda: len(server.engine.aborted) == 1)
    assert server.engine.running == 0


def test_a_failure_before_the_first_byte_has_a_status(serve):
    server = serve()
    server.engine.fail_at = 0
    message = assert_error(chat(server, stream=True), 500, None, "generation_failed")
    assert "engine failed" in message
    assert_error(chat(server), 500, None, "generation_failed")


def test_a_failure_in_the_middle_is_an_error_event(serve):
    server = serve()
    server.engine.fail_at = 2
    response = chat(server, stream=True)
    data = events(response)
    assert response.status_code == 200
    assert data[-1] == "[DONE]"
    error = json.loads(data[-2])["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == "generation_failed"


def test_an_unforeseen_failure_tells_nothing_but_the_request_id(serve):
    server = serve()
    server.engine.break_at = 0
    response = server.http.post(
        URL, json={"model": "fake", "messages": HELLO}, headers={"x-request-id": "mine-1"}
    )
    message = assert_error(response, 500, None, "internal_error")
    assert "mine-1" in message and "secret" not in message and "ZeroDivision" not in message
    server.engine.break_at = 1
    assert "secret" not in chat(server, stream=True).text
