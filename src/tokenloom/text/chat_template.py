"""Chat templates: the Jinja programs that models bring along to lay out a conversation.

They come with the model, not from clients, and still run in Jinja's immutable sandbox with a budget of time
and output, because a model file is a stranger's file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tokenloom.errors import RequestError

MAX_OUTPUT_CHARACTERS = 4 << 20
MAX_SECONDS = 2.0
MAX_RANGE = 100_000

_BUDGET = "tokenloom_budget"


class ChatTemplate:
    """One template. It is compiled when first used: a broken one does not keep a model from loading."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._compiled: jinja2.Template | None = None

    def render(self, **variables: Any) -> str:
        """The laid-out conversation. Raises RequestError (param "messages") if the template fails."""
        try:
            if self._compiled is None:
                self._compiled = _ENVIRONMENT.from_string(self.source)
            budget, pieces = _Budget(), []
            for piece in self._compiled.generate({**variables, _BUDGET: budget.check}):
                budget.spend(len(piece))
                pieces.append(piece)
            text = "".join(pieces)
            text.encode("utf-8")
        except jinja2.TemplateSyntaxError as error:
            raise _refusal(
                f"the model's chat template does not compile: {error} (line {error.lineno})"
            ) from error
        except UnicodeEncodeError as error:
            raise _refusal("the messages hold a lone surrogate, which is not text") from error
        except Exception as error:  # a template can fail in any way Python can
            raise _refusal(
                f"the model's chat template refused the messages: {error or type(error).__name__}"
            ) from error
        return text


class _Budget:
    """What one rendering may use."""

    def __init__(self) -> None:
        self._deadline = time.monotonic() + MAX_SECONDS
        self._characters = MAX_OUTPUT_CHARACTERS

    def spend(self, characters: int) -> None:
        self._characters -= characters
        if self._characters < 0:
            raise jinja2.TemplateError(f"output is over {MAX_OUTPUT_CHARACTERS} characters")
        self.check()

    def check(self) -> str:
        if time.monotonic() > self._deadline:
            raise jinja2.TemplateError(f"it ran for more than {MAX_SECONDS:g} seconds")
        return ""


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training masks; here its body is plain text."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, whose loops and repetitions also obey the budget."""

    intercepted_binops = frozenset(["*", "**"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        # A loop that prints nothing gives control back only at its end, so each turn looks at the clock.
        for loop in template.find_all(nodes.For):
            check = nodes.Call(nodes.Name(_BUDGET, "load"), [], [], None, None)
            loop.body.insert(0, nodes.Output([check]).set_lineno(loop.lineno))
        return template

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise jinja2.TemplateError("the ** operator is not available")
        for items, times in ((left, right), (right, left)):
            if isinstance(items, str | list | tuple) and len(items) * times > MAX_OUTPUT_CHARACTERS:
                raise jinja2.TemplateError(f"a repetition is over {MAX_OUTPUT_CHARACTERS} items")
        return super().call_binop(context, operator, left, right)


def _refusal(message: str) -> RequestError:
    return RequestError(message, param="messages", code="chat_template_error")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _range(*arguments: int) -> range:
    numbers = range(*arguments)
    if len(numbers) > MAX_RANGE:
        raise jinja2.TemplateError(f"range() is over {MAX_RANGE} numbers")
    return numbers


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["range"] = _range
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


_ENVIRONMENT = _environment()


def plain_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages without the keys whose value is None, which templates print as "None" or fail on.

    Raises RequestError if `messages` is not a list of objects.
    """
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise RequestError("messages must be a list of objects", param="messages")
    return [{key: value for key, value in message.items() if value is not None} for message in messages]
