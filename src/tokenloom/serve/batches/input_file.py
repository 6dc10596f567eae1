"""Reading the input file of a batch: one request a line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenloom.finetune.jsonl import LineError, lines, parse
from tokenloom.serve.batches.records import Endpoint, LineFault

MAX_CUSTOM_ID = 512
MAX_FAULTS = 50
"""Of one file; more are not looked for."""
_NOT_HERE = {"stream": "a batch is not streamed", "background": "a batch is in the background already"}


@dataclass(frozen=True)
class Line:
    """A request of the file, with its 1-based line number."""

    number: int
    custom_id: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Checked:
    """What a whole file holds. `model` is the one that all lines name, if it is one."""

    total: int
    model: str | None
    faults: list[LineFault]


def check(path: Path, endpoint: Endpoint, max_lines: int) -> Checked:
    """Check the form of every line. What is in the bodies is checked when their turn comes.

    Raises OSError if the file cannot be read.
    """
    faults: list[LineFault] = []
    seen: dict[str, int] = {}
    models: set[str] = set()
    for number, line in lines(path):
        try:
            request = _request(number, line, endpoint)
            if request.custom_id in seen:
                raise _Fault(
                    "duplicate_custom_id",
                    f"custom_id: {request.custom_id!r} is that of line {seen[request.custom_id]}, too",
                    "custom_id",
                )
            seen[request.custom_id] = number
            if len(seen) > max_lines:
                faults.append(_whole("too_many_lines", f"the file has more than {max_lines} requests"))
                break
            models.add(str(request.body.get("model")))
        except _Fault as fault:
            faults.append(LineFault(code=fault.code, line=number, message=str(fault), param=fault.param))
            if len(faults) == MAX_FAULTS:
                break
    if not seen and not faults:
        faults.append(_whole("empty_file", "the file holds no request"))
    return Checked(len(seen), models.pop() if len(models) == 1 else None, faults)


def requests(path: Path, endpoint: Endpoint) -> Iterator[Line]:
    """The requests of a file that has been checked. Raises OSError, or ValueError if it is another by now."""
    for number, line in lines(path):
        yield _request(number, line, endpoint)


class _Fault(ValueError):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


def _whole(code: str, message: str) -> LineFault:
    return LineFault(code=code, line=None, message=message, param=None)


def _request(number: int, line: bytes | LineError, endpoint: Endpoint) -> Line:
    if isinstance(line, LineError):
        raise _Fault(line.code, str(line))
    try:
        value = parse(line)
    except LineError as error:
        raise _Fault(error.code, str(error)) from None
    if not isinstance(value, dict):
        raise _Fault("invalid_line", "the line must be a JSON object")
    custom_id, body = value.get("custom_id"), value.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        raise _Fault("missing_custom_id", "custom_id: must be a string that is not empty", "custom_id")
    if len(custom_id) > MAX_CUSTOM_ID:
        raise _Fault("invalid_custom_id", f"custom_id: has more than {MAX_CUSTOM_ID} characters", "custom_id")
    if value.get("method") != "POST":
        raise _Fault("invalid_method", "method: must be POST", "method")
    if value.get("url") != endpoint:
        raise _Fault("mismatched_url", f"url: must be {endpoint}, the endpoint of the batch", "url")
    if not isinstance(body, dict):
        raise _Fault("invalid_body", "body: must be an object", "body")
    for name, why in _NOT_HERE.items():
        if body.get(name):
            raise _Fault("invalid_body", f"body.{name}: {why}", f"body.{name}")
    return Line(number, custom_id, body)
