"""How a model is told of tools where its chat template does not do it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenloom.text.tokenizer import Tokenizer
from tokenloom.text.tool_calls import BEGIN, END


def knows_tools(tokenizer: Tokenizer) -> bool:
    """Whether the model's chat template does something with tools."""
    return "tools" in (tokenizer.tool_template or "")


def told_in_words(messages: Sequence[Mapping[str, Any]], tools: list[dict[str, Any]] | None) -> list[Any]:
    """A conversation for a chat template that knows nothing of tools.

    They are described in the system message, calls are in the assistant's text, results in the user's.
    """
    told: list[dict[str, Any]] = []
    after_result = False
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if after_result:
                told[-1]["content"] += f"\n{text}"
            else:
                told.append({"role": "user", "content": text})
        elif message.get("tool_calls"):
            calls = [
                f"{BEGIN}\n{json.dumps(call['function'], ensure_ascii=False)}\n{END}"
                for call in message["tool_calls"]
            ]
            text = "\n".join(filter(None, [message["content"], *calls]))
            told.append({"role": message["role"], "content": text})
        else:
            told.append(dict(message))
        after_result = message["role"] == "tool"
    if tools:
        listed = "\n".join(json.dumps(tool.get("function"), ensure_ascii=False) for tool in tools)
        words = _SYSTEM.format(tools=listed)
        if told and told[0]["role"] == "system":
            told[0]["content"] = f"{told[0]['content']}\n\n{words}"
        else:
            told.insert(0, {"role": "system", "content": words})
    return told


_SYSTEM = """These functions can be called. Each line describes one, "parameters" being its arguments' schema:
{tools}

To call one, write its name and arguments in this form, and wait for the result:
<tool_call>
{{"name": "NAME", "arguments": {{"KEY": "VALUE"}}}}
</tool_call>"""
