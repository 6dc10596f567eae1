"""The process that chat templates run in: Jinja's sandbox, a limit of memory, and nothing worth stealing.

Run as a file of its own by `template_worker.py`. It imports no more than it needs, nothing of tokenloom,
reads one JSON object per line (`source`, `variables`), and answers each with another (`text` or `error`). How
long it may take is the parent's business: a template can loop in more ways than can be counted from inside.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_MEMORY_BYTES = 1 << 29
MAX_OUTPUT_CHARACTERS = 4 << 20
READY = b"ready\n"


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training masks; here its body is plain text."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    # Jinja's own range() is short of what a conversation of many messages needs.
    environment.globals["range"] = range
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


_ENVIRONMENT = _environment()
_compiled = lru_cache(16)(_ENVIRONMENT.from_string)


def render(source: str, variables: dict[str, Any]) -> dict[str, str]:
    """The rendered text, or the error that a client may see."""
    try:
        text = _compiled(source).render(variables)
        text.encode("utf-8")
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"the model's chat template does not compile: {error} (line {error.lineno})"}
    except UnicodeEncodeError:
        return {"error": "the messages hold a lone surrogate, which is not text"}
    except MemoryError:
        return {"error": f"the model's chat template needs over {MAX_MEMORY_BYTES >> 20} MiB of memory"}
    except Exception as error:  # a template can fail in any way Python can
        problem = str(error)[:1000] or type(error).__name__
        return {"error": f"the model's chat template refused the messages: {problem}"}
    if len(text) > MAX_OUTPUT_CHARACTERS:
        return {"error": f"the model's chat template wrote over {MAX_OUTPUT_CHARACTERS} characters"}
    return {"text": text}


def main() -> None:
    limits = {
        resource.RLIMIT_AS: MAX_MEMORY_BYTES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
    }
    for limit, most in limits.items():
        with contextlib.suppress(ValueError, OSError):  # macOS refuses some
            resource.setrlimit(limit, (most, most))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    answers.write(READY)
    answers.flush()
    for line in requests:
        asked = json.loads(line)
        answers.write(json.dumps(render(asked["source"], asked["variables"])).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
