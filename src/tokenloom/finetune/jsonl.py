"""Reading JSON Lines that strangers wrote: one line at a time, in bounded memory, as strict JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

MAX_LINE_BYTES = 8 * 2**20
MAX_DEPTH = 64


class LineError(Exception):
    """A line that cannot be read. `code` is a short machine-readable reason."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def lines(path: Path) -> Iterator[tuple[int, bytes | LineError]]:
    """Lines of a file with their 1-based numbers; blank lines are counted and left out.

    A line over MAX_LINE_BYTES is skipped without being held in memory and comes as a LineError.
    """
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                _skip_line(file)
                yield number, LineError("line_too_long", f"the line is longer than {MAX_LINE_BYTES} bytes")
            elif line.strip():
                yield number, line


def parse(line: bytes) -> Any:
    """The JSON value of one line.

    Raises LineError with code "wrong_encoding" (not UTF-8, or half a surrogate pair), "invalid_json",
    "not_finite" (NaN, Infinity, numbers beyond float64) or "too_deep" (over MAX_DEPTH levels).
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        utf16 = line.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in line
        hint = "; the file looks like UTF-16, save it as UTF-8" if utf16 else ""
        raise LineError("wrong_encoding", f"not valid UTF-8 at byte {error.start + 1}{hint}") from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_float)
    except json.JSONDecodeError as error:
        raise LineError("invalid_json", f"invalid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:  # an integer of thousands of digits
        raise LineError("invalid_json", f"invalid JSON: {error}") from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    if "\\u" in text:
        _check_surrogates(value)
    return value


def _skip_line(file: BinaryIO) -> None:
    while chunk := file.readline(MAX_LINE_BYTES):
        if chunk.endswith(b"\n"):
            return


def _refuse_constant(name: str) -> NoReturn:
    raise LineError("not_finite", f"{name} is not a JSON number")


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise LineError("not_finite", f"the number {digits[:32]} is too large")
    return value


def _too_deep() -> LineError:
    return LineError("too_deep", f"objects and arrays are nested more than {MAX_DEPTH} levels deep")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [item for item in level if isinstance(item, dict | list)]
        if not level:
            return
        level = [i for item in level for i in (item.values() if isinstance(item, dict) else item)]
    raise _too_deep()


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise LineError(
            "wrong_encoding", "a \\u escape is half of a surrogate pair, which is not text"
        ) from None
