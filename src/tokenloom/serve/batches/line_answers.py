"""Answers as lines of an output file, and lines that have none yet."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenloom.serve.batches import input_file
from tokenloom.serve.batches.inner_app import Reply
from tokenloom.serve.batches.input_file import Line
from tokenloom.serve.batches.records import BatchRecord, LineAnswer, LineFault, Tokens

UNREADABLE = LineFault(
    code="file_unreadable", line=None, message="the file cannot be read on the server", param=None
)


class InputLostError(Exception):
    """The input file cannot be read any more, or is another one than was checked."""


def unanswered(path: Path, batch: BatchRecord, answered: set[int]) -> Iterator[Line]:
    """The lines of a batch but those with the numbers `answered`. Raises InputLostError."""
    try:
        for line in input_file.requests(path, batch.endpoint):
            if line.number not in answered:
                yield line
    except (OSError, ValueError) as error:
        raise InputLostError from error


def answer_of(line: Line, reply: Reply) -> LineAnswer:
    """The answer that a route gave."""
    response = {"status_code": reply.status, "request_id": reply.request_id, "body": reply.body}
    ok = reply.status == 200
    return LineAnswer(line.number, ok, _text(line, response, None), _tokens(reply.body if ok else {}))


def given_up(line: Line, code: str, message: str) -> LineAnswer:
    """The answer to a line that was never asked."""
    text = _text(line, None, {"code": code, "message": message})
    return LineAnswer(line.number, False, text, _tokens({}))


def _text(line: Line, response: dict[str, Any] | None, error: dict[str, str] | None) -> str:
    return json.dumps(
        {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": line.custom_id,
            "response": response,
            "error": error,
        },
        ensure_ascii=False,
    )


def _tokens(body: dict[str, Any]) -> Tokens:
    """What an answer counted, in the words of chat completions or of responses."""
    usage = body.get("usage") or {}
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    return Tokens(
        input=usage.get("prompt_tokens", usage.get("input_tokens", 0)),
        cached=details.get("cached_tokens", 0),
        output=usage.get("completion_tokens", usage.get("output_tokens", 0)),
    )
