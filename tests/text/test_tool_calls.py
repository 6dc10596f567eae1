"""Tool calls are found in text, however it is cut into pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenloom.text.tool_calls import CallPiece, Piece, ToolCallParser, ToolFormat

NAMES = ("weather", "add")
HERMES: dict[str, tuple[str, str, list[tuple[str, str]]]] = {
    "one": ('<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', "", [("add", '{"a": 1}')]),
    "text around": (
        'I ask.\n<tool_call>{"name": "add", "arguments": {}}</tool_call> Done',
        "I ask.\n Done",
        [("add", "{}")],
    ),
    "two": (
        '<tool_call>{"name":"add","arguments":{"a":[1,{"b":"}"}]}}</tool_call>\n'
        '<tool_call>{"name":"weather","arguments":{"city":"a\\"b</tool_call>"}}</tool_call>\n',
        "",
        [("add", '{"a":[1,{"b":"}"}]}'), ("weather", '{"city":"a\\"b</tool_call>"}')],
    ),
    "list": (
        '<tool_call>[{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {}}]</tool_call>',
        "",
        [("add", '{"a": 1}'), ("add", "{}")],
    ),
    "arguments first": (
        '<tool_call>{"arguments": {"a": 1}, "id": 7, "name": "add"}</tool_call>',
        "",
        [("add", '{"a": 1}')],
    ),
    "arguments as a string": (
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>',
        "",
        [("add", '{"a": 1}')],
    ),
    "no arguments": ('<tool_call>{"name": "add"}</tool_call>', "", [("add", "{}")]),
    "unknown function": (
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        [],
    ),
    "no json": ("<tool_call>add(1)</tool_call>", "<tool_call>add(1)</tool_call>", []),
    "no call": ("a <tool_cal", "a <tool_cal", []),
    "only space": (" \n", " \n", []),
    "cut in the arguments": ('<tool_call>{"name": "add", "arguments": {"a": [', "", [("add", '{"a": [')]),
    "cut in the name": ('<tool_call>{"name": "ad', '<tool_call>{"name": "ad', []),
}
LLAMA3: dict[str, tuple[str, str, list[tuple[str, str]]]] = {
    "one": ('{"name": "add", "parameters": {"a": 1}}', "", [("add", '{"a": 1}')]),
    "two": (
        '\n{"name": "add", "parameters": {}}; {"name": "weather", "parameters": {"c": "x"}}\n',
        "",
        [("add", "{}"), ("weather", '{"c": "x"}')],
    ),
    "text": ('It is {"name": "add", "parameters": {}}', 'It is {"name": "add", "parameters": {}}', []),
    "other json": ('{"answer": [1, {}], "b": null}', '{"answer": [1, {}], "b": null}', []),
    "broken json": ('{"name" "add"} x', '{"name" "add"} x', []),
}
CASES = [("hermes", *case) for case in HERMES.values()] + [("llama3", *case) for case in LLAMA3.values()]
IDS = [f"hermes {name}" for name in HERMES] + [f"llama3 {name}" for name in LLAMA3]


def joined(pieces: list[Piece]) -> tuple[str, list[tuple[str, str]]]:
    """The text, and name and arguments of each call; a name comes first and once."""
    text, calls = "", dict[int, tuple[str, str]]()
    for piece in pieces:
        if isinstance(piece, CallPiece):
            assert (piece.name is None) == (piece.index in calls)
            name, arguments = calls.get(piece.index, (piece.name or "", ""))
            calls[piece.index] = (name, arguments + piece.arguments)
        else:
            assert piece
            text += piece
    return text, [calls[i] for i in range(len(calls))]


def parse(form: ToolFormat, parts: list[str], **options: Any) -> list[Piece]:
    parser = ToolCallParser(form, NAMES, **options)
    return [piece for part in parts for piece in parser.push(part)] + parser.finish()


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES, ids=IDS)
def test_calls_and_text(form: ToolFormat, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert joined(parse(form, [text])) == (content, calls)


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES, ids=IDS)
@settings(max_examples=15)
@given(data=st.data())
def test_pieces_of_any_size_give_the_same(
    form: ToolFormat, text: str, content: str, calls: list[tuple[str, str]], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, len(text)), max_size=8)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert joined(parse(form, parts)) == (content, calls)


def test_arguments_come_as_they_are_written() -> None:
    parser = ToolCallParser("hermes", NAMES)
    seen = [parser.push(part) for part in ('<tool_call>{"name": "add", ', '"arguments": {"a"', ": 12", "}}")]
    assert seen == [
        [CallPiece(0, "add")],
        [CallPiece(0, None, '{"a"')],
        [CallPiece(0, None, ": 12")],
        [CallPiece(0, None, "}")],
    ]


def test_further_calls_are_left_out() -> None:
    _, calls = joined(parse("hermes", [HERMES["two"][0]], most=1))
    assert [name for name, _ in calls] == ["add"]


@settings(max_examples=40)
@given(
    st.dictionaries(
        st.text(max_size=5), st.text(max_size=5) | st.lists(st.none() | st.integers(), max_size=3)
    ),
    st.text("ab<{}/", max_size=10),
)
def test_any_arguments_come_through(arguments: dict[str, Any], before: str) -> None:
    text = before + "<tool_call>" + json.dumps({"name": "add", "arguments": arguments}) + "</tool_call>"
    content, [(_, found)] = joined(parse("hermes", list(text)))
    assert (content, json.loads(found)) == (before, arguments)
