"""Logs: JSON lines or text for people, on standard error. A request's id is bound to all its lines.

Modules log through the standard library (`logging.getLogger("tokenloom.…")`). Values go into
`extra=fields(name=value)` rather than into the message, so that both formats can show them.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from tokenloom.config import LoggingSettings

bound: ContextVar[Mapping[str, Any] | None] = ContextVar("tokenloom_log_fields", default=None)
"""Fields of every line logged in this context: `request_id`, and `trace_id` where there is a trace."""

logger = logging.getLogger("tokenloom")

# Control characters, line ends among them: what a client sends must not look like a line of ours, nor drive
# the reader's terminal.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def fields(**values: Any) -> dict[str, Any]:
    """The `extra` of a line with these fields; those that are None are left out."""
    return {"fields": {name: value for name, value in values.items() if value is not None}}


def set_up_logging(settings: LoggingSettings) -> None:
    """Send the process's logs to standard error, in the format and from the level of the settings.

    Other libraries speak from warnings on, whatever the level.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_bind)
    handler.setFormatter(JsonLines() if settings.format == "json" else Text())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logger.setLevel(settings.level.upper())
    logging.captureWarnings(True)
    if settings.content:
        logger.warning("logging.content is on: prompts and answers are written to the log")


def _bind(record: logging.LogRecord) -> bool:
    """Put the context's fields before the line's own. A filter of the handler: it sees all loggers' lines."""
    own = getattr(record, "fields", {})
    record.fields = {**(bound.get() or {}), **own}
    return True


class JsonLines(logging.Formatter):
    """One JSON object a line: `time` (UTC), `level`, `logger`, `message`, the fields, `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in getattr(record, "fields", {}).items():
            line.setdefault(name, value)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class Text(logging.Formatter):
    """`time LEVEL logger: message name=value ...`, and a traceback on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        values = "".join(f" {name}={_shown(value)}" for name, value in getattr(record, "fields", {}).items())
        message = _CONTROL.sub(_escaped, record.getMessage())
        line = f"{_utc(record.created)} {record.levelname} {record.name}: {message}{values}"
        if record.exc_info:
            line += f"\n{self.formatException(record.exc_info)}"
        return line


def _utc(seconds: float) -> str:
    """Unix seconds as ISO 8601 in UTC, to the millisecond."""
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{int(seconds % 1 * 1000):03d}Z"


def _shown(value: Any) -> str:
    """A value as one word: quoted where it would not be one."""
    if not isinstance(value, str):
        return json.dumps(value, default=str)
    quoted = json.dumps(value, ensure_ascii=False) if re.search(r'[\s"=]', value) or not value else value
    return _CONTROL.sub(_escaped, quoted)


def _escaped(match: re.Match[str]) -> str:
    return f"\\x{ord(match[0]):02x}"
