"""Tools: what holds a model's calls to their schemas, and how they are found in its answer."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tokenloom.config import LimitSettings
from tokenloom.errors import RequestError
from tokenloom.serve.response_format import StructuredFields
from tokenloom.serve.tools_protocol import (
    FunctionCall,
    FunctionDefinition,
    FunctionDelta,
    NamedTool,
    Tool,
    ToolCall,
    ToolCallDelta,
    ToolChoice,
)
from tokenloom.structured.spec import Source, checked_schema, quoted
from tokenloom.text.tokenizer import Tokenizer
from tokenloom.text.tool_calls import BEGIN, END, CallPiece, ToolCallParser, ToolFormat

MAX_FORCED_CALLS = 16
"""How many calls `tool_choice: required` allows in one answer: a weak model would not stop by itself."""

_TEXT = r"/(.|\n)*/"


def tool_format(tokenizer: Tokenizer, wanted: ToolFormat | Literal["auto"]) -> ToolFormat:
    """How the model writes calls: as the settings say, or (`auto`) as its chat template shows them."""
    if wanted != "auto":
        return wanted
    template = tokenizer.tool_template or ""
    if BEGIN not in template and ("<|python_tag|>" in template or '"parameters"' in template):
        return "llama3"
    return "hermes"


@dataclass(frozen=True)
class ToolUse:
    """What a request with tools wants of its answer."""

    tools: list[Tool]
    choice: ToolChoice
    parallel: bool
    form: ToolFormat
    tag_is_special: bool
    """`<tool_call>` is a token that is left out of the text unless special tokens are asked for."""

    @property
    def offered(self) -> list[dict[str, Any]]:
        """For the chat template."""
        return [tool.model_dump(exclude_unset=True) for tool in self.tools]

    @property
    def functions(self) -> list[FunctionDefinition]:
        """Those that may be called."""
        named = self.choice.function.name if isinstance(self.choice, NamedTool) else None
        return [tool.function for tool in self.tools if named in (None, tool.function.name)]

    @property
    def forced(self) -> bool:
        return self.choice == "required" or isinstance(self.choice, NamedTool)

    def source(self, fields: StructuredFields, limits: LimitSettings) -> Source | None:
        """What the answer must look like; None if nothing has to be enforced.

        Calls are held to the functions' schemas where one must be made, where a function is `strict`, or
        where the answer has a format besides.

        Raises:
            RequestError: a function's parameters are no schema, or another field does not go with tools.
        """
        content = None if self.forced else self._content(fields, limits)
        if content is None and not self.forced and not any(f.strict for f in self.functions):
            return None
        calls, rules = self._rules(limits)
        if self.forced:
            rules = [f"start: {calls}", *rules]
        elif content is not None:
            rules = [f"start: content | {calls}", f"content: %json {content}", *rules]
        elif self.form == "llama3":
            rules = [f"start: TEXT | {calls}", r"TEXT: /([^ \n\r\t{](.|\n)*)?/", *rules]
        else:
            # The lazy head ends at the first tag: from there on only a call fits.
            many = "*" if self.parallel else "?"
            rules = [f"start: (found){many} tail", f"tail: {_TEXT}", *rules]
            rules += [f"found: head body {quoted(END)}", rf"head[lazy]: /(.|\n)*{BEGIN}/"]
            if self.tag_is_special:
                rules[-1] = f"head: {_TEXT} {BEGIN}"
        text = "\n".join(rules)
        if len(text.encode()) > 2 * limits.max_grammar_bytes:
            raise RequestError(
                f"tools: their schemas have over {2 * limits.max_grammar_bytes} bytes together", param="tools"
            )
        return Source(text, "tools")

    def _content(self, fields: StructuredFields, limits: LimitSettings) -> str | None:
        """The schema of an answer that is no call."""
        wanted = fields.structured
        if wanted is None:
            return None
        structured, names = wanted
        param = next(iter(names.values()))
        schema = {"type": "object"} if structured.json_object else structured.json
        if not isinstance(schema, Mapping):
            raise RequestError(f"{param}: does not go together with tools", param=param)
        return json.dumps(checked_schema(schema, limits, param, strict=structured.strict))

    def _rules(self, limits: LimitSettings) -> tuple[str, list[str]]:
        """One or more calls, and the rules of Lark that this needs."""
        key = "arguments" if self.form == "hermes" else "parameters"
        rules = [r"GAP: /\n{0,2}/", "body: GAP object GAP" if self.form == "hermes" else "body: object"]
        rules.append("object: " + " | ".join(f"f{i}" for i in range(len(self.functions))))
        for i, function in enumerate(self.functions):
            before = json.dumps({"name": function.name})[:-1] + f', "{key}": '
            rules.append(f'f{i}: {quoted(before)} a{i} "}}"')
            rules.append(f"a{i}: %json {self._schema(function, limits)}")
        more = f"{{0,{MAX_FORCED_CALLS - 1}}}"
        if self.form == "llama3":
            return "body" + (f' ("; " body){more}' if self.parallel else ""), rules
        tag = BEGIN if self.tag_is_special else quoted(BEGIN)
        rules.append(f"call: {tag} body {quoted(END)}")
        return "call" + (f" (GAP call){more}" if self.parallel else ""), rules

    def _schema(self, function: FunctionDefinition, limits: LimitSettings) -> str:
        index = next(i for i, tool in enumerate(self.tools) if tool.function is function)
        schema = function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}
        param = f"tools[{index}].function.parameters"
        return json.dumps(checked_schema(schema, limits, param, strict=bool(function.strict)))


def tool_use(
    tools: list[Tool] | None,
    choice: ToolChoice | None,
    parallel: bool | None,
    tokenizer: Tokenizer,
    form: ToolFormat | Literal["auto"],
) -> ToolUse | None:
    """What is wanted of the answer; None where no tool is to be used.

    form: `server.tool_format`.

    Raises:
        RequestError: `tool_choice` asks for a function that is not among the tools.
    """
    if not tools:
        if choice == "required" or isinstance(choice, NamedTool):
            raise RequestError("tool_choice: needs tools to choose from", param="tool_choice")
        return None
    if choice == "none":
        return None
    names = [tool.function.name for tool in tools]
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise RequestError(
            f"tool_choice: {choice.function.name!r} is not among the tools", param="tool_choice.function.name"
        )
    special = tokenizer.backend.token_to_id(BEGIN) in tokenizer.special_ids
    return ToolUse(tools, choice or "auto", parallel is not False, tool_format(tokenizer, form), special)


class CallWriter:
    """Finds the calls in one choice's text and writes them as OpenAI does."""

    def __init__(self, use: ToolUse) -> None:
        names = [function.name for function in use.functions]
        self._parser = ToolCallParser(use.form, names, None if use.parallel else 1)
        self.called = False

    def push(self, text: str, *, last: bool = False) -> list[str | ToolCallDelta]:
        """Text and pieces of calls that `text` brings; `last`: no more comes."""
        pieces = self._parser.push(text)
        if last:
            pieces += self._parser.finish()
        return [piece if isinstance(piece, str) else self._delta(piece) for piece in pieces]

    def _delta(self, piece: CallPiece) -> ToolCallDelta:
        self.called = True
        if piece.name is None:
            return ToolCallDelta(index=piece.index, function=FunctionDelta(arguments=piece.arguments))
        return ToolCallDelta(
            index=piece.index,
            id=f"call_{uuid.uuid4().hex[:24]}",
            type="function",
            function=FunctionDelta(name=piece.name, arguments=piece.arguments),
        )


def read_calls(use: ToolUse, text: str) -> tuple[str, list[ToolCall]]:
    """The text of a whole answer, and its calls."""
    content, calls = "", list[ToolCall]()
    for piece in CallWriter(use).push(text, last=True):
        if isinstance(piece, str):
            content += piece
        elif piece.id is not None:
            function = FunctionCall(name=piece.function.name or "", arguments=piece.function.arguments or "")
            calls.append(ToolCall(id=piece.id, type="function", function=function))
        else:
            calls[-1].function.arguments += piece.function.arguments or ""
    return content, calls
