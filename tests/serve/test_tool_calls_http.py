"""Tools over HTTP: what the model is told, what it is held to, and what becomes of its calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from running import Running, assert_error, events, settings
from scripted_engine import ScriptedEngine

ARGUMENTS = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"city": {"enum": ["Oslo", "Rome"]}},
}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Rain?", "parameters": ARGUMENTS},
}
TIME = {"type": "function", "function": {"name": "time"}}
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'
PIECES = [
    "Let me ",
    "see.\n<tool",
    "_call>\n",
    '{"name": "wea',
    'ther", "argum',
    'ents": {"city": ',
    '"Oslo"',
    "}}\n</tool_call>",
]


def chat(server: Running, **fields: Any) -> Any:
    body = {"model": server.engine.model_name, "messages": MESSAGES, "tools": [WEATHER, TIME], **fields}
    return server.http.post("/v1/chat/completions", json={"max_tokens": 400, "seed": 3, **body})


@pytest.fixture
def scripted(serve: Callable[..., Running]) -> Callable[..., Running]:
    return lambda pieces, **flags: serve(engine=ScriptedEngine(settings(**flags), pieces=pieces))


# -- finding calls ----------------------------------------------------------------------------------------


def test_a_call_in_the_text_becomes_one(scripted: Callable[..., Running]) -> None:
    [choice] = chat(scripted(PIECES)).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see.\n"
    [call] = choice["message"]["tool_calls"]
    assert call["id"].startswith("call_") and call["type"] == "function"
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}


def test_an_answer_that_is_only_calls_has_no_content(scripted: Callable[..., Running]) -> None:
    message = chat(scripted([CALL, "\n", CALL])).json()["choices"][0]["message"]
    assert message["content"] is None and len(message["tool_calls"]) == 2


def test_parallel_calls_can_be_refused(scripted: Callable[..., Running]) -> None:
    message = chat(scripted([CALL, CALL]), parallel_tool_calls=False).json()["choices"][0]["message"]
    assert len(message["tool_calls"]) == 1


def test_an_answer_without_calls_is_as_it_was(scripted: Callable[..., Running]) -> None:
    [choice] = chat(scripted(["no ", "call"])).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("no call", "stop")
    assert "tool_calls" not in choice["message"]


def test_a_cut_call_says_length(scripted: Callable[..., Running]) -> None:
    [choice] = chat(scripted(PIECES), max_tokens=6).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": '


def test_no_tools_no_calls(scripted: Callable[..., Running]) -> None:
    for fields in ({"tool_choice": "none"}, {"tools": None}):
        assert chat(scripted([CALL]), **fields).json()["choices"][0]["message"]["content"] == CALL


def test_streamed_calls_come_in_pieces_with_their_logprobs(scripted: Callable[..., Running]) -> None:
    response = chat(scripted(PIECES), stream=True, logprobs=True)
    chunks = [json.loads(event)["choices"][0] for event in events(response)[:-1]]
    deltas = [chunk["delta"] for chunk in chunks]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Let me see.\n"
    pieces = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert pieces[0]["function"] == {"name": "weather", "arguments": ""} and pieces[0]["id"]
    assert [piece["function"]["arguments"] for piece in pieces[1:]] == ['{"city": ', '"Oslo"', "}"]
    assert all(piece["index"] == 0 and "id" not in piece for piece in pieces[1:])
    assert chunks[-1]["finish_reason"] == "tool_calls"
    scored = [entry["token"] for chunk in chunks for entry in (chunk["logprobs"] or {}).get("content", ())]
    assert len(scored) == len(PIECES)


def test_the_llama3_form(scripted: Callable[..., Running]) -> None:
    server = scripted(['{"name": "time", ', '"parameters": {}}'], server__tool_format="llama3")
    message = chat(server).json()["choices"][0]["message"]
    assert message["tool_calls"][0]["function"] == {"name": "time", "arguments": "{}"}


# -- what the model is told -------------------------------------------------------------------------------


def test_a_template_without_tools_tells_of_them_in_words(scripted: Callable[..., Running]) -> None:
    server = scripted(["x"])
    server.engine.max_model_len = 4096
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Rain?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "time", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
        {"role": "tool", "tool_call_id": "call_2", "content": "later"},
    ]
    assert chat(server, messages=messages).status_code == 200
    prompt = server.engine.tokenizer.decode(server.engine.calls[-1].prompt, skip_special_tokens=False)
    system, user, assistant, results, rest = prompt.split("<|im_end|>\n")
    assert system.startswith("<|im_start|>system\nBe kind.\n\n") and json.dumps(ARGUMENTS) in system
    assert user == "<|im_start|>user\nRain?"
    assert assistant == '<|im_start|>assistant\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    assert results == (
        "<|im_start|>user\n<tool_response>\nnoon\n</tool_response>\n<tool_response>\nlater\n</tool_response>"
    )
    assert rest == "<|im_start|>assistant\n"


# -- what it is held to -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["hermes", "llama3"])
def test_a_named_function_is_called_with_arguments_that_fit(
    roomy: Running, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roomy.engine.settings.server, "tool_format", form)
    choice_of_tool = {"type": "function", "function": {"name": "weather"}}
    fields = {"tool_choice": choice_of_tool, "parallel_tool_calls": False}
    [choice] = chat(roomy, **fields).json()["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    jsonschema.validate(json.loads(call["function"]["arguments"]), ARGUMENTS)


def test_required_calls_some_function_in_a_stream_too(roomy: Running) -> None:
    fields = {"tool_choice": "required", "parallel_tool_calls": False}
    whole = chat(roomy, **fields).json()["choices"][0]["message"]["tool_calls"][0]["function"]
    chunks = [json.loads(event)["choices"][0] for event in events(chat(roomy, stream=True, **fields))[:-1]]
    pieces = [call["function"] for chunk in chunks for call in chunk["delta"].get("tool_calls", ())]
    assert pieces[0]["name"] == whole["name"]
    assert "".join(piece["arguments"] for piece in pieces) == whole["arguments"]
    schema = {"weather": ARGUMENTS, "time": {"maxProperties": 0}}[whole["name"]]
    jsonschema.validate(json.loads(whole["arguments"]), schema)


def test_tools_beside_a_format(roomy: Running) -> None:
    schema = {"enum": [1, 22, 333]}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    for choice in chat(roomy, response_format=form, n=6, parallel_tool_calls=False).json()["choices"]:
        message = choice["message"]
        if message["content"] is not None:
            jsonschema.validate(json.loads(message["content"]), schema)
        else:
            assert message["tool_calls"][0]["function"]["name"] in ("weather", "time")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tool_choice": {"type": "function", "function": {"name": "rm"}}}, "tool_choice.function.name"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        (
            {
                "tools": [TIME, {"type": "function", "function": {"name": "x", "parameters": {"type": "y"}}}],
                "tool_choice": "required",
            },
            "tools",
        ),
        ({"guided_regex": "a"}, "guided_regex"),
    ],
)
def test_what_cannot_be_is_a_400_that_names_the_field(
    roomy: Running, fields: dict[str, Any], param: str
) -> None:
    assert_error(chat(roomy, **fields), 400, param)


# -- the official client ----------------------------------------------------------------------------------


class Weather(BaseModel, extra="forbid"):
    days: int = Field(ge=1, le=7)


def test_the_official_client_parses_calls(roomy: Running) -> None:
    client = openai.OpenAI(base_url=f"{roomy.url}/v1", api_key="none")
    answer = client.chat.completions.parse(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}],
        tools=[openai.pydantic_function_tool(Weather)],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=300,
    )
    [call] = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Weather)


def test_the_official_client_streams_calls(scripted: Callable[..., Running]) -> None:
    client = openai.OpenAI(base_url=f"{scripted(PIECES).url}/v1", api_key="none")
    with client.chat.completions.stream(
        model="fake", messages=[{"role": "user", "content": "hi"}], tools=[WEATHER]
    ) as stream:
        seen = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in seen and "tool_calls.function.arguments.done" in seen
    [call] = final.choices[0].message.tool_calls or []
    assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": "Oslo"}
