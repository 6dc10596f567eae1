"""POST /v1/completions over the fake engine."""

import json

import pytest

from running import assert_error, events, wait_for

URL = "/v1/completions"


def complete(server, **fields):
    return server.http.post(URL, json={"model": "fake", **fields})


def test_an_answer_has_openais_shape(shared):
    body = complete(shared, prompt="hey", max_tokens=2).json()
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-")
    assert body["choices"] == [
        {"index": 0, "text": "ab", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    assert body["usage"]["prompt_tokens"] == 2  # "he" and "y"


def test_sixteen_tokens_unless_told_otherwise(shared):
    assert complete(shared, prompt="x").json()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", [[97, 98]]),
        (["a", "b"], [[97], [98]]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
def test_the_four_forms_of_a_prompt(serve, prompt, ids):
    server = serve()
    body = complete(server, prompt=prompt, max_tokens=1, n=2).json()
    assert [call.prompt for call in server.engine.calls] == ids
    assert [c["index"] for c in body["choices"]] == list(range(2 * len(ids)))
    assert [c["text"] for c in body["choices"]] == ["a", "b"] * len(ids)
    assert body["usage"]["prompt_tokens"] == sum(map(len, ids))


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("logprobs", [None, 1])
def test_chunks_put_together_are_the_answer(shared, echo, logprobs):
    fields = {"prompt": ["hey", "you"], "n": 2, "max_tokens": 3, "echo": echo, "logprobs": logprobs}
    whole = complete(shared, **fields).json()
    data = events(complete(shared, stream=True, stream_options={"include_usage": True}, **fields))
    assert data[-1] == "[DONE]"
    chunks = [json.loads(item) for item in data[:-1]]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        if logprobs is not None:
            for key, values in choice["logprobs"].items():
                assert [v for c in mine if c["logprobs"] for v in c["logprobs"][key]] == values


def test_logprobs_are_parallel_lists(shared):
    lists = complete(shared, prompt="hey", max_tokens=2, logprobs=2).json()["choices"][0]["logprobs"]
    assert lists == {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"a": -0.5, "b": -1.5}, {"b": -0.5, "c": -1.5}],
        "text_offset": [0, 1],
    }


def test_echo_puts_the_prompt_before_the_text_and_its_tokens_before_the_lists(shared):
    choice = complete(shared, prompt="hey", max_tokens=1, logprobs=1, echo=True).json()["choices"][0]
    assert choice["text"] == "heya"
    assert choice["logprobs"]["tokens"] == ["he", "y", "a"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert choice["logprobs"]["text_offset"] == [0, 2, 3]


def test_max_tokens_0_scores_the_prompt_alone(shared):
    body = complete(shared, prompt="hey", max_tokens=0, logprobs=0, echo=True).json()
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("hey", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5]
    assert choice["logprobs"]["top_logprobs"] == [None, {"y": -0.5}]
    assert body["usage"]["completion_tokens"] == 0


def test_tokens_that_are_no_text_are_spelled_in_bytes_and_offsets_count_characters(shared):
    euro = list("€".encode())
    choice = complete(shared, prompt=[*euro, 97], max_tokens=1, logprobs=1, echo=True).json()["choices"][0]
    assert choice["text"] == "€aa"
    assert choice["logprobs"]["tokens"] == ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "a", "a"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 0, 1, 2]


def test_prompt_logprobs_are_given_beside_the_choice(shared):
    choice = complete(shared, prompt=[97, 98], max_tokens=1, prompt_logprobs=0).json()["choices"][0]
    assert choice["prompt_logprobs"] == [None, {"98": {"logprob": -0.5, "decoded_token": "b"}}]


@pytest.mark.parametrize(("best_of", "n", "status"), [(1, 1, 200), (2, 2, 200), (1, 2, 200), (3, 2, 400)])
def test_best_of_must_not_ask_for_a_choice(shared, best_of, n, status):
    assert complete(shared, prompt="a", best_of=best_of, n=n, max_tokens=1).status_code == status


def test_suffix_is_refused(shared):
    assert "suffix" in assert_error(complete(shared, prompt="a", suffix="b"), 400, "suffix")


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (None, "prompt"),
        (5, "prompt"),
        ({}, "prompt"),
        ([], "prompt"),
        ([1, "a"], "prompt[1]"),
        (["a", 1], "prompt[1]"),
        ([-1], "prompt[0]"),
        ([True], "prompt[0]"),
        ([1.5], "prompt[0]"),
        ([[1], ["a"]], "prompt[1][0]"),
        ([[1], 2], "prompt[1]"),
        ([2**40], "prompt[0]"),
    ],
)
def test_other_prompts_are_refused(shared, prompt, param):
    assert assert_error(complete(shared, prompt=prompt), 400, param).startswith(param)


def test_too_many_prompts(serve):
    server = serve(limits__max_prompts=2)
    assert "at most 2" in assert_error(complete(server, prompt=["a", "b", "c"]), 400, "prompt")


def test_a_prompt_that_is_refused_takes_the_others_back(serve):
    server = serve()
    too_long = [1] * (server.engine.max_model_len + 1)
    response = complete(server, prompt=[[1], [2], too_long])
    assert "513 tokens" in assert_error(response, 400, "prompt", "context_length_exceeded")
    assert sorted(server.engine.aborted) == sorted(call.request_id for call in server.engine.calls)
    assert server.engine.running == 0


def test_a_client_that_leaves_aborts_every_prompt(serve):
    server = serve(step_s=0.01)
    body = {"model": "fake", "prompt": ["a", "b", "c"], "stream": True, "max_tokens": 500}
    with server.http.stream("POST", URL, json=body) as response:
        lines = response.iter_lines()
        next(lines)
    wait_for(lambda: len(server.engine.aborted) == 3)
