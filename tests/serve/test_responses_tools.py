"""Tools and formats of /v1/responses, as OpenAI's client sends and reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from running import Running, assert_error, settings
from scripted_engine import ScriptedEngine

ARGUMENTS = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Oslo", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "name": "weather", "description": "Rain?", "parameters": ARGUMENTS}
TIME = {"type": "function", "name": "time"}
CALL = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
PIECES = [
    "Let me ",
    "see.\n<tool",
    '_call>\n{"name": "wea',
    'ther", "arguments": {"city": ',
    '"Oslo"',
    "}}\n</tool_call>",
]
NESTED = json.loads('{"properties": ' * 40 + "{}" + "}" * 40)
OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "noon"}


def past_call(call_id: str) -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": "time", "arguments": "{}"}


class Client:
    """OpenAI's client of a server."""

    def __init__(self, server: Running) -> None:
        self.server = server
        self.openai = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    def create(self, given: Any = "hi", **fields: Any) -> Any:
        fields = {"tools": [WEATHER, TIME], "max_output_tokens": 300, "extra_body": {"seed": 3}, **fields}
        return self.openai.responses.create(model=self.server.engine.model_name, input=given, **fields)

    def prompt(self) -> str:
        engine = self.server.engine
        return engine.tokenizer.decode(engine.calls[-1].prompt, skip_special_tokens=False)


@pytest.fixture
def scripted(serve: Callable[..., Running]) -> Iterator[Callable[..., Client]]:
    """A client of an engine that answers with these pieces."""
    clients: list[Client] = []

    def start(*pieces: str) -> Client:
        engine = ScriptedEngine(settings(), pieces=list(pieces))
        engine.max_model_len = 4096
        clients.append(Client(serve(engine=engine)))
        return clients[-1]

    yield start
    for client in clients:
        client.openai.close()


@pytest.fixture
def held(roomy: Running) -> Iterator[Client]:
    """A client of a random model, whose answers make sense only where they are held to a form."""
    client = Client(roomy)
    yield client
    client.openai.close()


# -- calls in an answer -----------------------------------------------------------------------------------


def test_a_call_is_an_item_of_the_output_after_the_text(scripted):
    response = scripted(*PIECES).create()
    message, call = response.output
    assert (message.type, message.content[0].text) == ("message", "Let me see.\n")
    assert (call.type, call.name, call.arguments) == ("function_call", "weather", '{"city": "Oslo"}')
    assert call.id.startswith("fc_") and call.call_id.startswith("call_")
    assert {response.status, message.status, call.status} == {"completed"}


def test_an_answer_of_calls_alone_has_no_message(scripted):
    response = scripted(CALL, "\n", CALL, "\n").create()
    assert [item.type for item in response.output] == ["function_call", "function_call"]
    assert len({item.call_id for item in response.output}) == 2


def test_parallel_calls_can_be_refused(scripted):
    client = scripted(CALL, CALL)
    response = client.create(parallel_tool_calls=False)
    assert [item.type for item in response.output] == ["function_call"]
    assert response.parallel_tool_calls is False


def test_an_answer_without_calls_is_a_message(scripted):
    response = scripted("no ", "call").create()
    assert response.output_text == "no call"
    assert [item.type for item in response.output] == ["message"]


def test_a_cut_call_is_incomplete(scripted):
    response = scripted(*PIECES).create(max_output_tokens=4)
    assert (response.status, response.output[-1].status) == ("incomplete", "incomplete")
    assert response.output[-1].arguments == '{"city": '


@pytest.mark.parametrize("fields", [{"tool_choice": "none"}, {"tools": []}])
def test_no_tools_no_calls(scripted, fields):
    assert scripted(CALL).create(**fields).output_text == CALL


def test_what_was_asked_for_is_told(scripted):
    client = scripted("x")
    named = {"type": "function", "name": "weather"}
    form = {"type": "json_schema", "name": "a", "schema": {"type": "object"}}
    response = client.create(tool_choice="auto", text={"format": form})
    assert response.tool_choice == "auto"
    assert response.tools[0].parameters == ARGUMENTS and response.tools[1].name == "time"
    assert response.text.format.schema_ == {"type": "object"}
    assert client.openai.responses.retrieve(response.id) == response
    assert client.create(tool_choice=named).tool_choice.name == "weather"


# -- events -----------------------------------------------------------------------------------------------


def test_a_stream_tells_of_text_and_call_in_openais_events(scripted):
    client = scripted(*PIECES)
    events = list(client.create(stream=True))
    assert [event.type.removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    added, done, final = events[9], events[13], events[-1].response
    assert (added.item.name, added.item.arguments, added.item.status) == ("weather", "", "in_progress")
    pieces = [event.delta for event in events if event.type.endswith("arguments.delta")]
    assert "".join(pieces) == done.arguments == '{"city": "Oslo"}'
    assert {event.output_index for event in events[9:15]} == {1}
    assert {event.item_id for event in events[10:14]} == {final.output[1].id}
    assert events[14].item == final.output[1]
    assert final.output[1].call_id == added.item.call_id
    assert client.openai.responses.retrieve(final.id) == final


def test_the_clients_stream_helper_reads_calls(scripted):
    client = scripted(*PIECES)
    with client.openai.responses.stream(model="fake", input="hi", tools=[WEATHER]) as stream:
        seen = [event.type for event in stream]
        final = stream.get_final_response()
    assert seen.count("response.function_call_arguments.done") == 1
    assert json.loads(final.output[-1].arguments) == {"city": "Oslo"}


def test_logprobs_of_text_come_with_it(scripted):
    events = list(scripted(*PIECES).create(stream=True, top_logprobs=1))
    [message, _] = events[-1].response.output
    told = [len(event.logprobs) for event in events if event.type == "response.output_text.delta"]
    assert sum(told) == len(message.content[0].logprobs) == 2


# -- calls and their outputs in the input -----------------------------------------------------------------

TOLD = (
    'assistant\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call><|im_end|>\n'
    "<|im_start|>user\n<tool_response>\nnoon\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
)


def test_the_output_of_a_call_answers_it(scripted):
    client = scripted("x")
    client.create([{"role": "user", "content": "Time?"}, past_call("call_1"), OUTPUT])
    assert client.prompt().endswith("user\nTime?<|im_end|>\n<|im_start|>" + TOLD)


def test_a_call_of_a_kept_response_is_answered_by_its_id(scripted):
    client = scripted(CALL)
    first = client.create("Time?")
    output = {
        **OUTPUT,
        "call_id": first.output[0].call_id,
        "output": [{"type": "input_text", "text": "noon"}],
    }
    second = client.create([output], previous_response_id=first.id)
    assert client.prompt().endswith(TOLD)
    items = client.openai.responses.input_items.list(second.id, order="asc").data
    assert [item.type for item in items] == ["message", "function_call", "function_call_output"]
    assert (items[1].id, items[1].call_id) == (first.output[0].id, first.output[0].call_id)


def test_output_with_calls_can_be_sent_back_as_input(scripted):
    client = scripted("Wait.", CALL, CALL)
    first = client.create("Time?")
    outputs = [{**OUTPUT, "call_id": item.call_id} for item in first.output[1:]]
    client.create([*[item.model_dump() for item in first.output], *outputs])
    turns = client.prompt().split("<|im_end|>\n<|im_start|>")
    said, results = turns[-3:-1]
    assert said.startswith("assistant\nWait.\n<tool_call>") and said.count("<tool_call>") == 2
    assert results.count("noon") == 2


# -- what an answer is held to ----------------------------------------------------------------------------


def test_a_named_function_is_called_with_arguments_that_fit(held):
    choice = {"type": "function", "name": "weather"}
    response = held.create(tool_choice=choice, parallel_tool_calls=False)
    [call] = response.output
    assert (call.name, response.status) == ("weather", "completed")
    jsonschema.validate(json.loads(call.arguments), ARGUMENTS)


def test_a_required_call_is_streamed_as_it_is_whole(held):
    fields = {"tool_choice": "required", "parallel_tool_calls": False}
    [whole] = held.create(**fields).output
    [streamed] = list(held.create(stream=True, **fields))[-1].response.output
    assert (streamed.name, streamed.arguments) == (whole.name, whole.arguments)


@pytest.mark.parametrize("tools", [[], [TIME]])
def test_text_fits_its_schema(held, tools):
    form = {"type": "json_schema", "name": "args", "schema": ARGUMENTS, "strict": True}
    response = held.create(text={"format": form}, tools=tools, tool_choice="none")
    jsonschema.validate(json.loads(response.output_text), ARGUMENTS)


def test_text_is_some_json_object(held):
    response = held.create(tools=[], text={"format": {"type": "json_object"}}, max_output_tokens=60)
    assert response.output_text.lstrip().startswith("{")


class Weather(BaseModel, extra="forbid"):
    days: int = Field(ge=1, le=7)


def test_the_official_client_parses_answers_and_calls(held):
    common = {"model": held.server.engine.model_name, "input": "hi", "max_output_tokens": 300}
    answer = held.openai.responses.parse(text_format=Weather, **common)
    assert isinstance(answer.output_parsed, Weather)
    tool = {"type": "function", "name": "Weather", "strict": True, "parameters": Weather.model_json_schema()}
    called = held.openai.responses.parse(
        tools=[tool], tool_choice="required", parallel_tool_calls=False, **common
    )
    assert Weather.model_validate_json(called.output[0].arguments)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "a", "strict": "yes"}]}, "tools[0].strict"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice.type"),
        ({"tool_choice": {"type": "function", "name": "rm"}}, "tool_choice.name"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        (
            {
                "tools": [TIME, {"type": "function", "name": "x", "strict": True, "parameters": {"not": {}}}],
                "tool_choice": "required",
            },
            "tools",
        ),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        (
            {
                "text": {
                    "format": {"type": "json_schema", "name": "a", "strict": True, "schema": {"not": {}}}
                },
                "tools": [],
            },
            "text.format.schema",
        ),
        (
            {"tools": [{**TIME, "parameters": NESTED}], "tool_choice": "required"},
            "tools[0].parameters",
        ),
        ({"input": [OUTPUT]}, "input"),
        ({"input": [past_call("call_1") | {"arguments": "{"}]}, "input"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "b"}]}, "input[0].arguments"),
    ],
)
def test_what_cannot_be_is_a_400_that_names_the_field(held, fields, param):
    body = {"model": held.server.engine.model_name, "input": "hi", "tools": [WEATHER], **fields}
    message = assert_error(held.server.http.post("/v1/responses", json=body), 400, param)
    assert "function." not in message and "response_format" not in message
