"""Over HTTP a random model answers in the form that is asked for."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from running import Running, assert_error, events

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Oslo", "Rome"]},
        "people": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "people"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}
MESSAGES = [{"role": "user", "content": "hi"}]


def chat(server: Running, **fields: Any) -> Any:
    body = {"model": server.engine.model_name, "messages": MESSAGES, "max_tokens": 300, "seed": 1, **fields}
    return server.http.post("/v1/chat/completions", json=body)


def complete(server: Running, **fields: Any) -> Any:
    body = {"model": server.engine.model_name, "prompt": "hi", "max_tokens": 300, "seed": 1, **fields}
    return server.http.post("/v1/completions", json=body)


def test_chat_answers_fit_the_schema(real: Running) -> None:
    answer = chat(real, response_format=FORMAT, n=2).json()
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)


def test_streamed_answers_fit_the_schema_and_are_the_same(real: Running) -> None:
    whole = chat(real, response_format=FORMAT).json()["choices"][0]["message"]["content"]
    chunks = [json.loads(event) for event in events(chat(real, response_format=FORMAT, stream=True))[:-1]]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert text == whole
    jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_json": SCHEMA}, r'\s*\{.*"city".*\}\s*'),
        ({"guided_json": json.dumps(SCHEMA)}, r'\s*\{.*"city".*\}\s*'),
        ({"guided_regex": "[a-c]{3}-\\d{2}"}, r"[a-c]{3}-\d{2}"),
        ({"guided_choice": ["left", "right"]}, "left|right"),
        ({"guided_grammar": 'root ::= "x" [0-9] "y"'}, r"x\dy"),
        ({"structured_outputs": {"regex": "z{2}"}}, "zz"),
        ({"structured_outputs": {"choice": ["up"]}}, "up"),
        ({"response_format": FORMAT}, r'\s*\{.*"city".*\}\s*'),
    ],
)
def test_completions_too(real: Running, fields: dict[str, Any], pattern: str) -> None:
    for choice in complete(real, prompt=["a", "b"], **fields).json()["choices"]:
        assert re.fullmatch(pattern, choice["text"], re.DOTALL)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
            "response_format.json_schema.name",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"type": "x"}},
                }
            },
            "response_format.json_schema.schema",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "strict": True, "schema": {"not": {}}},
                }
            },
            "response_format.json_schema.schema",
        ),
        ({"guided_json": 5}, "guided_json"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_regex": "a" * 70000}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_grammar": "start: x"}, "guided_grammar"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.regex"),
    ],
)
def test_what_cannot_be_is_a_400_that_names_the_field(
    real: Running, fields: dict[str, Any], param: str
) -> None:
    assert param in assert_error(chat(real, **fields), 400, param)
    assert_error(complete(real, **fields), 400, param)


def test_a_schema_that_is_too_deep_is_refused(real: Running) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(40):
        schema = {"type": "object", "properties": {"a": schema}}
    assert "levels deep" in assert_error(chat(real, guided_json=schema), 400, "guided_json")


def test_a_grammar_that_gets_too_complex_is_the_requests_own_fault(real: Running) -> None:
    grammar = 'start: "b" ' + '"a"? ' * 2500
    assert_error(chat(real, guided_grammar=grammar), 400, "guided_grammar")


def test_the_official_client_parses_into_a_model(real: Running) -> None:
    class Place(BaseModel, extra="forbid"):
        city: Literal["Oslo", "Rome"]
        people: int = Field(ge=1, le=9)

    client = openai.OpenAI(base_url=f"{real.url}/v1", api_key="none")
    answer = client.chat.completions.parse(
        model="tiny", messages=[{"role": "user", "content": "hi"}], response_format=Place, max_tokens=300
    )
    assert isinstance(answer.choices[0].message.parsed, Place)
