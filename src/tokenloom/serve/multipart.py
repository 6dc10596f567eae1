"""Uploads: a multipart form whose file goes to disk while it comes in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from tokenloom.serve.errors import ApiError

MAX_FIELDS = 16
MAX_FIELD_BYTES = 4096
_WRITE_BYTES = 2**20


@dataclass
class Form:
    """What a form held besides the bytes of its file; `filename` is None if it had no file."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None


async def read_form(
    content_type: str, body: AsyncIterator[bytes], file_field: str, write: Callable[[bytes], None]
) -> Form:
    """Read a form, handing the bytes of its file part to `write`, on a thread, as they arrive.

    Raises ApiError (400) if the body is no whole form with at most one file; and what `write` raises.
    """
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise ApiError(400, "content-type: must be multipart/form-data with a boundary", code="invalid_form")
    reader = _FormReader(file_field)
    try:
        parser = MultipartParser(options[b"boundary"], reader.callbacks())  # type: ignore[arg-type]
        async for chunk in body:
            parser.write(chunk)
            if reader.file_bytes >= _WRITE_BYTES:
                await asyncio.to_thread(write, reader.take())
        parser.finalize()
    except FormParserError as error:
        raise ApiError(400, f"the request body is not a valid form: {error}", code="invalid_form") from None
    if not reader.complete:
        raise ApiError(400, "the request body ends before the form does", code="invalid_form")
    await asyncio.to_thread(write, reader.take())
    return reader.form


async def discard(body: AsyncIterator[bytes], max_bytes: int) -> None:
    """Read what the client still sends, so that it gets to see the answer; give up after `max_bytes`."""
    async for chunk in body:
        max_bytes -= len(chunk)
        if max_bytes < 0:
            return


class _FormReader:
    """Collects what the parser calls out. It never waits: the file's bytes are taken from it in between."""

    def __init__(self, file_field: str) -> None:
        self.form = Form()
        self.complete = False
        self.file_bytes = 0
        self._file_field = file_field
        self._file: list[bytes] = []
        self._in_file = False
        self._name = ""
        self._value = b""
        self._header = b""
        self._header_value = b""
        self._disposition = b""

    def callbacks(self) -> dict[str, Callable[..., None]]:
        names = ("part_begin", "part_data", "part_end", "header_field", "header_value", "header_end")
        return {f"on_{name}": getattr(self, name) for name in (*names, "headers_finished", "end")}

    def take(self) -> bytes:
        data = b"".join(self._file)
        self._file.clear()
        self.file_bytes = 0
        return data

    def part_begin(self) -> None:
        self._header = self._header_value = self._disposition = self._value = b""

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header = self._header_value = b""

    def headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        self._in_file = self._name == self._file_field
        if self._in_file:
            if self.form.filename is not None:
                raise ApiError(400, f"{self._name}: only one file can be sent", param=self._name)
            self.form.filename = options.get(b"filename", b"").decode("utf-8", "replace")
        elif len(self.form.fields) >= MAX_FIELDS:
            raise ApiError(400, f"the form has more than {MAX_FIELDS} fields", code="invalid_form")

    def part_data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._file.append(data[start:end])
            self.file_bytes += end - start
            return
        self._value += data[start:end]
        if len(self._value) > MAX_FIELD_BYTES:
            name = self._name[:64]
            raise ApiError(400, f"{name}: is longer than {MAX_FIELD_BYTES} bytes", param=name)

    def part_end(self) -> None:
        if not self._in_file:
            self.form.fields[self._name[:64]] = self._value.decode("utf-8", "replace")

    def end(self) -> None:
        self.complete = True
