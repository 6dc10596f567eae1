"""What a model with tools may write: every text is fed to the grammar byte by byte."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tiny_models import CHAT_TEMPLATE, EOS_ID, SPECIAL_TOKENS, tiny_tokenizer
from tokenloom.config import LimitSettings
from tokenloom.errors import RequestError
from tokenloom.serve.response_format import StructuredFields
from tokenloom.serve.tools import ToolUse, tool_format, tool_use
from tokenloom.serve.tools_protocol import Tool, ToolChoice
from tokenloom.structured import Grammars, Source
from tokenloom.structured.grammar import GrammarProcessor
from tokenloom.text.tokenizer import Tokenizer

LIMITS = LimitSettings()
NO_FORMAT = StructuredFields()
ADD = {
    "name": "add",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    },
}


def tokenizer(template: str = CHAT_TEMPLATE) -> Tokenizer:
    return Tokenizer(tiny_tokenizer(), {"eos_token": "<|im_end|>"}, {"default": template}, "tiny")


TOKENIZER = tokenizer()
GRAMMARS = Grammars(TOKENIZER, TOKENIZER.vocab_size, (EOS_ID,), LIMITS)


def use(choice: ToolChoice = "auto", parallel: bool = True, form: Any = "hermes", **change: Any) -> ToolUse:
    tools = [Tool(type="function", function={**ADD, **change})]  # type: ignore[arg-type]
    found = tool_use(tools, choice, parallel, TOKENIZER, form)
    assert found is not None
    return found


def fits(source: Source | None, text: str) -> bool:
    """Whether the text is a whole answer under the grammar."""
    assert source is not None
    processor = GRAMMARS.compile(source).processor()
    assert isinstance(processor, GrammarProcessor)
    try:
        for token in [*text.encode(), EOS_ID]:
            complete = processor.accept(token)
    except RequestError:
        return False
    return complete


def call(arguments: str, name: str = "add") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def test_nothing_is_enforced_where_no_call_must_be_right() -> None:
    assert use(strict=None).source(NO_FORMAT, LIMITS) is None


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("just text, even <tool", True),
        ("text " + call('{"a": 1}') + " more", True),
        (call('{"a": 1}') + "\n" + call('{"a": -2}'), True),
        (call('{"a": "1"}'), False),
        (call('{"b": 1}'), False),
        (call("{}"), False),
        (call('{"a": 1}', name="sub"), False),
        ("<tool_call>nonsense</tool_call>", False),
    ],
)
def test_a_strict_function_may_be_left_out_but_not_called_wrongly(text: str, right: bool) -> None:
    assert fits(use().source(NO_FORMAT, LIMITS), text) == right


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (call('{"a": 1}'), True),
        ("text " + call('{"a": 1}'), False),
        ("", False),
        (call('{"a": 1}') * 3, True),
    ],
)
def test_required_is_calls_and_nothing_else(text: str, right: bool) -> None:
    assert fits(use("required").source(NO_FORMAT, LIMITS), text) == right


def test_no_second_call_where_they_may_not_be_parallel() -> None:
    for choice, again in (("required", False), ("auto", True)):
        source = use(choice, parallel=False).source(NO_FORMAT, LIMITS)  # type: ignore[arg-type]
        assert fits(source, call('{"a": 1}'))
        # After the call of `auto` comes text, and what stands there is not read as a call.
        assert fits(source, call('{"a": 1}') * 2) == again


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("text", True),
        ('{"name": "add", "parameters": {"a": 1}}', True),
        ('{"name": "add", "parameters": {"a": 1}}; {"name": "add", "parameters": {"a": 2}}', True),
        ('{"name": "add", "parameters": {}}', False),
        ('{"other": 1}', False),
    ],
)
def test_the_llama3_form(text: str, right: bool) -> None:
    assert fits(use(form="llama3").source(NO_FORMAT, LIMITS), text) == right


def test_parameters_that_are_not_given_are_none() -> None:
    source = use("required", parameters=None).source(NO_FORMAT, LIMITS)
    assert fits(source, call("{}")) and not fits(source, call('{"a": 1}'))


def test_a_tag_that_is_a_special_token_is_that_token() -> None:
    special = replace(use("required"), tag_is_special=True).source(NO_FORMAT, LIMITS)
    assert special is not None and "call: <tool_call> body" in special.text
    assert not any(token == "<tool_call>" for token in SPECIAL_TOKENS)
    with pytest.raises(RequestError):  # which the tiny vocabulary does not have
        GRAMMARS.compile(special)


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (CHAT_TEMPLATE, "hermes"),
        ("{{ tools }}<tool_call>", "hermes"),
        ('{{ tools }}{"name": function name, "parameters": dictionary}', "llama3"),
        ("{{ tools }}<|python_tag|>", "llama3"),
    ],
)
def test_the_form_is_the_templates(template: str, form: str) -> None:
    assert tool_format(tokenizer(template), "auto") == form


def test_the_schemas_of_all_tools_together_have_a_limit() -> None:
    with pytest.raises(RequestError, match="tools: their schemas"):
        many = [
            Tool(type="function", function={"name": f"f{i}", "parameters": {"const": "x" * 10000}})  # type: ignore[arg-type]
            for i in range(15)
        ]
        found = tool_use(many, "required", None, TOKENIZER, "auto")
        assert found is not None
        found.source(NO_FORMAT, LIMITS)
