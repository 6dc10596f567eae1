"""Where the assistant speaks in a rendered chat, for any chat template.

A template is a program, so nothing in its output marks who wrote what. The conversation is therefore
rendered in prefixes: the text up to the generation prompt of message i must be a beginning of the whole,
and so must the text up to the end of message i. What lies between them is what the model would have to
write at that turn, its end-of-turn token included. White space after that token belongs to nobody.

Some templates rewrite earlier turns (they drop old reasoning, or trim). Where a prefix does not match, the
content of the message is searched in the whole text, from the end of the message before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from tokenloom.errors import RequestError


class ChatTokenizer(Protocol):
    """What finetuning asks of a tokenizer (`tokenloom.text.tokenizer.Tokenizer` has it all)."""

    @property
    def special_ids(self) -> frozenset[int]: ...

    @property
    def eos_token_id(self) -> int | None: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str: ...

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str: ...


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a rendered chat that are learned with `weight`."""

    start: int
    end: int
    weight: float


class ChatLayout:
    """Renders chats and finds the assistant's spans in them."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        names = [tokenizer.decode([index], skip_special_tokens=False) for index in tokenizer.special_ids]
        longest_first = sorted(filter(None, names), key=lambda name: (-len(name), name))
        special = "|".join(re.escape(name) for name in longest_first) or r"(?!)"
        self._end_of_turn = re.compile(rf"\s*(?:{special})")
        self._ends_special = re.compile(rf"(?:{special})\Z")

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        """The whole conversation as text.

        Raises RequestError if the template fails, or leaves out the tools or the tool calls.
        """
        plain = [_without_weight(message) for message in messages]
        text = self._tokenizer.render_chat(plain, tools, add_generation_prompt=False)
        if tools and text == self._tokenizer.render_chat(plain, None, add_generation_prompt=False):
            raise RequestError("the model's chat template does not render tools", param="tools")
        if any("tool_calls" in message for message in plain):
            silent = [{**message, "tool_calls": None} for message in plain]
            try:
                ignored = text == self._tokenizer.render_chat(silent, tools, add_generation_prompt=False)
            except RequestError:  # it cares so much that it fails without them
                ignored = False
            if ignored:
                raise RequestError("the model's chat template does not render tool calls", param="messages")
        return text

    def spans(
        self, text: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> Iterator[Span]:
        """Spans of the assistant messages with a weight above 0, left to right, in `text` as rendered."""
        cursor = 0
        for index, message in enumerate(messages):
            assistant = message["role"] == "assistant"
            weight = float(message.get("weight", 1)) if assistant else 0.0
            found = self._by_prefix(text, messages, tools, index) if weight > 0 else None
            if found is None or found[0] < cursor:
                found = self._by_search(text, message, cursor)
            if found is None:
                continue
            cursor = found[1]
            if weight > 0:
                yield Span(found[0], found[1], weight)

    def _by_prefix(
        self, text: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, index: int
    ) -> tuple[int, int] | None:
        plain = [_without_weight(message) for message in messages[: index + 1]]
        try:
            before = self._tokenizer.render_chat(plain[:-1], tools, add_generation_prompt=True)
            after = self._tokenizer.render_chat(plain, tools, add_generation_prompt=False)
        except RequestError:
            return None
        if not (len(before) < len(after) and after.startswith(before) and text.startswith(after)):
            return None
        end = len(after.rstrip())
        ends_turn = self._ends_special.search(after[len(before) : end])
        return len(before), end if ends_turn else len(after)

    def _by_search(self, text: str, message: dict[str, Any], cursor: int) -> tuple[int, int] | None:
        content = message["content"].strip()
        start = text.find(content, cursor) if content else -1
        if start < 0:
            return None
        end = start + len(content)
        end_of_turn = self._end_of_turn.match(text, end)
        return start, end_of_turn.end() if end_of_turn else end


def _without_weight(message: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key != "weight"}
