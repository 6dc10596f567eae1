"""What one row of a training file may hold, and what is wrong with one that may not.

Three shapes exist in OpenAI's contract: chats (`messages`, `tools`), legacy completions (`prompt`,
`completion`) and preferences (`input`, `preferred_output`, `non_preferred_output`). The first two are trained
on; preferences are refused. Reason codes are those of OpenAI's data-preparation cookbook where it has one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

Fault = tuple[str, str]
"""A reason code and a sentence."""

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

_FORMATS = {
    "chat": {"messages", "tools", "functions", "parallel_tool_calls"},
    "completion": {"prompt", "completion"},
    "preference": {"input", "preferred_output", "non_preferred_output"},
}
_MESSAGE_KEYS = {"role", "content", "name", "weight", "tool_calls", "tool_call_id", "function_call"}


def faults(row: Any) -> Iterator[Fault]:
    """Everything that keeps `row` from being trained on; nothing if it is fine."""
    if not isinstance(row, dict):
        yield "data_type", f"the line must be a JSON object, not {_kind(row)}"
        return
    formats = [name for name, keys in _FORMATS.items() if keys & row.keys()]
    if len(formats) > 1:
        yield "ambiguous_format", f"the row is both a {' and a '.join(formats)} row: {_names(row)}"
    elif formats == ["preference"]:
        yield (
            "unsupported_format",
            "preference (DPO) rows are not trained on; the method is supervised and needs `messages`",
        )
    elif formats == ["completion"]:
        yield from _unknown_keys(row, "completion")
        yield from _completion_faults(row)
    else:
        yield from _unknown_keys(row, "chat")
        yield from _chat_faults(row)


def normalized(row: dict[str, Any]) -> dict[str, Any]:
    """A faultless chat row in today's spelling, ready for a chat template.

    Text parts become one string, `functions` and `function_call` become `tools` and `tool_calls`, role
    "function" becomes "tool", and `weight` stays on the message.
    """
    tools = row.get("tools")
    if tools is None and row.get("functions") is not None:
        tools = [{"type": "function", "function": function} for function in row["functions"]]
    return {"messages": [_normalized_message(message) for message in row["messages"]], "tools": tools}


def _normalized_message(message: dict[str, Any]) -> dict[str, Any]:
    message = {key: value for key, value in message.items() if value is not None}
    if isinstance(message.get("content"), list):
        message["content"] = "".join(part["text"] for part in message["content"])
    if "function_call" in message:
        message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
    if message["role"] == "function":
        message["role"] = "tool"
    message.setdefault("content", "")
    return message


def _completion_faults(row: dict[str, Any]) -> Iterator[Fault]:
    for key in ("prompt", "completion"):
        if not isinstance(row.get(key), str):
            yield "missing_key", f"`{key}` must be a string" if key in row else f"`{key}` is missing"
    if row.get("completion") == "":
        yield "missing_content", "`completion` is empty"


def _chat_faults(row: dict[str, Any]) -> Iterator[Fault]:
    for key in ("tools", "functions"):
        if row.get(key) is not None and not _is_list_of_objects(row[key]):
            yield "bad_tools", f"`{key}` must be a list of objects"
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        yield "missing_messages_list", "`messages` is missing, empty or not a list"
        return
    for index, message in enumerate(messages):
        yield from _message_faults(message, f"messages[{index}]")
    if not any(isinstance(message, dict) and message.get("role") == "assistant" for message in messages):
        yield "example_missing_assistant_message", "there is no assistant message to learn from"


def _message_faults(message: Any, where: str) -> Iterator[Fault]:
    if not isinstance(message, dict):
        yield "data_type", f"{where} must be an object, not {_kind(message)}"
        return
    calls = message.get("tool_calls") is not None or message.get("function_call") is not None
    for key in ("role", "content"):
        if key not in message and not (key == "content" and calls):
            yield "message_missing_key", f"{where} has no `{key}`"
    for key in sorted(message.keys() - _MESSAGE_KEYS):
        yield "message_unrecognized_key", f"{where} has an unknown key {key[:64]!r}"
    role = message.get("role")
    if "role" in message and role not in ROLES:
        yield "unrecognized_role", f"{where}.role is {str(role)[:64]!r}; known roles are {', '.join(ROLES)}"
    if "content" in message:
        yield from _content_faults(
            message["content"], may_be_empty=calls or role in ("tool", "function"), where=where
        )
    yield from _call_faults(message, where)
    yield from _weight_faults(message, where)


def _content_faults(content: Any, *, may_be_empty: bool, where: str) -> Iterator[Fault]:
    if isinstance(content, list):
        if not all(_is_text_part(part) for part in content):
            yield "missing_content", f"{where}.content may hold only parts of type text"
            return
        content = "".join(part["text"] for part in content)
    if not content and may_be_empty:
        return
    if not isinstance(content, str) or not content:
        yield "missing_content", f"{where}.content must be a non-empty string"


def _call_faults(message: dict[str, Any], where: str) -> Iterator[Fault]:
    calls = message.get("tool_calls")
    if calls is None:
        functions = [message["function_call"]] if message.get("function_call") is not None else []
    elif _is_list_of_objects(calls):
        functions = [call.get("function") for call in calls]
    else:
        functions = [None]
    for function in functions:
        named = isinstance(function, dict) and isinstance(function.get("name"), str)
        if not named or not isinstance(function.get("arguments"), str | dict):
            yield "bad_tool_calls", f"{where}: each call needs a function with `name` and `arguments`"
            return
    if functions and message.get("role") != "assistant":
        yield "bad_tool_calls", f"{where}: only assistant messages may call tools"


def _weight_faults(message: dict[str, Any], where: str) -> Iterator[Fault]:
    weight = message.get("weight")
    if weight is None:
        return
    if message.get("role") != "assistant":
        yield "weight_not_allowed", f"{where}.weight is allowed on assistant messages only"
    elif isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        yield "bad_weight", f"{where}.weight must be a number >= 0"


def _unknown_keys(row: dict[str, Any], form: str) -> Iterator[Fault]:
    for key in sorted(row.keys() - _FORMATS[form]):
        yield "unrecognized_key", f"unknown key {key[:64]!r} beside {', '.join(sorted(_FORMATS[form]))}"


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _names(row: dict[str, Any]) -> str:
    return ", ".join(key for keys in _FORMATS.values() for key in sorted(keys & row.keys()))


def _kind(value: Any) -> str:
    kinds = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else "an object")
