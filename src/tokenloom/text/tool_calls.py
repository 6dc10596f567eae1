"""Tool calls found in a model's text, piece by piece as it comes.

Two ways to write them are known. `hermes` (Hermes, Qwen): `<tool_call>{"name": ..., "arguments": {...}}
</tool_call>` anywhere in the text, once for each call, or a list of objects between the tags. `llama3`: the
whole text is such an object, with `parameters`, or several with semicolons between them.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

ToolFormat = Literal["hermes", "llama3"]

BEGIN, END = "<tool_call>", "</tool_call>"
_ARGUMENTS = ("arguments", "parameters")


@dataclass(slots=True)
class CallPiece:
    """What call number `index` gained: at first its name, then pieces of its arguments' JSON text."""

    index: int
    name: str | None = None
    arguments: str = ""


Piece = str | CallPiece


class ToolCallParser:
    """Splits one answer into its text and its calls.

    However the text is cut into pieces, the joined result is the same. What turns out to be no call of a
    known function is text. White space before the first call, and between calls, is no text.

    Args:
        names: the functions that were offered.
        most: further calls are left out; None keeps all.
    """

    def __init__(self, form: ToolFormat, names: Collection[str], most: int | None = None) -> None:
        self.form, self.names, self.most = form, frozenset(names), most
        self.num_calls = 0
        self._at_edge = True  # no text was shown since the beginning or the last call
        self._space = ""  # white space that is text only if text follows
        self._held = ""  # what may be the beginning of a tag
        self._raw = ""  # what was read since the last call or text
        self._object: _ObjectReader | None = None
        self._mode: Literal["text", "calls", "plain"] = "text" if form == "hermes" else "calls"

    def push(self, text: str) -> list[Piece]:
        """The pieces that `text` brings."""
        pieces: list[Piece] = []
        while text:
            if self._mode == "calls":
                text = self._read_calls(text, pieces)
            elif self._mode == "plain" or self.form == "llama3":
                text = self._show(text, pieces)
            else:
                text = self._find_tag(text, pieces)
        return pieces

    def finish(self) -> list[Piece]:
        """What is left when no more text comes."""
        pieces: list[Piece] = []
        reader = self._object
        if self._mode == "calls" and (reader is None or reader.name is None):
            self._give_back(pieces)
        self._show(self._held, pieces)
        if not self.num_calls and self._space:
            pieces.append(self._space)
        self._held = self._space = ""
        return pieces

    def _find_tag(self, text: str, pieces: list[Piece]) -> str:
        text = self._held + text
        before, tag, after = text.partition(BEGIN)
        if tag:
            self._held, self._mode, self._raw = "", "calls", BEGIN
            self._show(before, pieces)
            return after
        keep = next((n for n in range(len(BEGIN) - 1, 0, -1) if text.endswith(BEGIN[:n])), 0)
        self._held = text[len(text) - keep :]
        return self._show(text[: len(text) - keep], pieces)

    def _show(self, text: str, pieces: list[Piece]) -> str:
        text = self._space + text
        if self._at_edge and text.isspace():
            self._space = text
        elif text:
            pieces.append(text)
            self._space, self._at_edge = "", False
        return ""

    def _read_calls(self, text: str, pieces: list[Piece]) -> str:
        for i, character in enumerate(text):
            self._raw += character
            if self._object is not None:
                self._object.push(character)
                if self._object.done or self._object.broken:
                    self._report(pieces)
                    ended = self._end_call(pieces)
                    if not ended:
                        return text[i + 1 :]
            elif character == "{":
                self._object = _ObjectReader()
                self._object.push(character)
            elif self.form == "hermes" and self._raw.endswith(END):
                self._mode, self._raw = "text", ""
                return text[i + 1 :]
            elif not self._between(character):
                self._give_back(pieces)
                return text[i + 1 :]
        self._report(pieces)
        return ""

    def _between(self, character: str) -> bool:
        """Whether this may stand before, between or after the objects."""
        if character.isspace():
            return True
        if self.form == "llama3":
            return character == ";" and self.num_calls > 0
        return character in "[,]" or END.startswith(self._raw[self._raw.rfind("<") :])

    def _report(self, pieces: list[Piece]) -> None:
        """Pass on what is known of the call that is being read."""
        reader = self._object
        if reader is None or reader.name is None or reader.name not in self.names:
            return
        name = None if reader.reported else reader.name
        arguments = reader.take_arguments()
        if (name is not None or arguments) and (self.most is None or self.num_calls < self.most):
            pieces.append(CallPiece(self.num_calls, name, arguments))
        reader.reported = True
        self._space, self._at_edge = "", True

    def _end_call(self, pieces: list[Piece]) -> bool:
        reader, self._object = self._object, None
        assert reader is not None
        if not reader.reported:
            self._give_back(pieces)
            return False
        if self.most is None or self.num_calls < self.most:
            if not reader.has_arguments:
                pieces.append(CallPiece(self.num_calls, None, "{}"))
            self.num_calls += 1
        self._raw = ""
        return True

    def _give_back(self, pieces: list[Piece]) -> None:
        """What looked like a call is text."""
        raw, self._raw, self._object = self._raw, "", None
        self._mode = "text" if self.form == "hermes" else "plain"
        self._show(raw, pieces)


class _ObjectReader:
    """Reads one JSON object, a character at a time, for its name and the text of its arguments."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.has_arguments = self.reported = self.done = self.broken = False
        self._arguments = ""
        self._key = ""
        self._state: Literal["open", "key", "colon", "value", "comma"] = "open"
        self._value = ""
        self._depth = 0
        self._in_string = self._escaped = False

    def take_arguments(self) -> str:
        """The text of the arguments since the last time."""
        text, self._arguments = self._arguments, ""
        return text

    def push(self, character: str) -> None:
        """Read on, until `done` or `broken`."""
        if self._value:
            self._read_value(character)
        elif not character.isspace():
            self._begin(character)

    def _begin(self, character: str) -> None:
        state = self._state
        if state == "open" and character == "{":
            self._state = "key"
        elif (state == "key" and character == '"') or (state == "value" and character not in ",:]}"):
            self._start_value(character)
        elif state == "colon" and character == ":":
            self._state = "value"
        elif state == "comma" and character == ",":
            self._state = "key"
        elif state in ("key", "comma") and character == "}":
            self.done = True
        else:
            self.broken = True

    def _start_value(self, character: str) -> None:
        self._value = character
        self._in_string, self._escaped = character == '"', False
        self._depth = int(character in "{[")
        if self._streams:
            self.has_arguments = True
            self._arguments += character

    def _read_value(self, character: str) -> None:
        if self._in_string:
            self._take(character)
            if self._escaped or character == "\\":
                self._escaped = not self._escaped
            elif character == '"':
                self._in_string = False
                if self._depth == 0:
                    self._end_value()
        elif self._depth == 0 and (character in ",}" or character.isspace()):
            self._end_value()  # of a number or a word, by what comes after it
            self.push(character)
        else:
            self._take(character)
            self._in_string = character == '"'
            self._depth += (character in "{[") - (character in "]}")
            if self._depth == 0 and character in "]}":
                self._end_value()

    def _take(self, character: str) -> None:
        self._value += character
        if self._streams:
            self._arguments += character

    @property
    def _streams(self) -> bool:
        """Arguments are passed on as they come, unless they are a string that holds them."""
        return self._state == "value" and self._key in _ARGUMENTS and self._value[0] != '"'

    def _end_value(self) -> None:
        text, self._value = self._value, ""
        if self._state == "key":
            self._key, self._state = str(_decoded(text)), "colon"
            return
        self._state = "comma"
        if self._key == "name":
            self.name = str(_decoded(text))
        elif self._key in _ARGUMENTS and text[0] == '"':
            self.has_arguments = True
            self._arguments += str(_decoded(text))


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
