"""Responses that can be read again, and answered to, for as long as there is room for them.

They are kept in memory: what people wrote does not reach a disk unasked. A restart forgets them, and so does
a newer response once `limits.max_stored_responses` or `limits.max_stored_bytes` is reached.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from tokenloom.serve.errors import ApiError
from tokenloom.serve.responses.items import (
    CallOutputItem,
    FunctionCallItem,
    KeptItem,
    OutputItem,
    OutputText,
)
from tokenloom.serve.responses.protocol import ResponseObject

_OVERHEAD_BYTES = 1024
"""Of an entry and its objects, about, besides the text."""


@dataclass(frozen=True)
class StoredResponse:
    """A response with what led to it.

    Attributes:
        items: the conversation before the answer, without the instructions, which do not carry over.
    """

    response: ResponseObject
    items: tuple[KeptItem, ...]

    @property
    def size_bytes(self) -> int:
        """About what it takes, twice over where responses share a conversation."""
        items = [*self.items, *self.response.output]
        told = self.response.model_dump_json(include={"instructions", "tools", "text"})
        return 2 * len(told) + _OVERHEAD_BYTES + sum(map(_size_bytes, items))


def _size_bytes(item: KeptItem | OutputItem) -> int:
    if isinstance(item, FunctionCallItem):
        return _OVERHEAD_BYTES + 2 * len(item.arguments)
    if isinstance(item, CallOutputItem):
        return _OVERHEAD_BYTES + 2 * len(item.text)
    logprobs = sum(len(part.logprobs) for part in item.content if isinstance(part, OutputText))
    return _OVERHEAD_BYTES * (1 + logprobs) + 2 * sum(len(part.text) for part in item.content)


class ResponseStore:
    """The most recently used responses; used on one event loop."""

    def __init__(self, max_responses: int, max_bytes: int) -> None:
        self.max_responses = max_responses
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._entries: OrderedDict[str, StoredResponse] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def keeps(self) -> bool:
        """Whether anything is kept at all."""
        return self.max_responses > 0

    def put(self, entry: StoredResponse) -> None:
        """Keep a response, or a newer state of it; the ones not used for longest make room."""
        name = entry.response.id
        self._drop(name)
        self._entries[name] = entry
        self.used_bytes += entry.size_bytes
        while self._entries and (len(self) > self.max_responses or self.used_bytes > self.max_bytes):
            self._drop(next(iter(self._entries)))

    def find(self, response_id: str) -> StoredResponse | None:
        """The response if it is still kept."""
        entry = self._entries.get(response_id)
        if entry is not None:
            self._entries.move_to_end(response_id)
        return entry

    def get(self, response_id: str) -> StoredResponse:
        """Raises ApiError (404) for what is not, or no longer, kept."""
        entry = self.find(response_id)
        if entry is None:
            raise ApiError(
                404, f"no response has the id {response_id[:128]!r}, or not any longer", code="not_found"
            )
        return entry

    def delete(self, response_id: str) -> None:
        """Raises ApiError (404)."""
        self.get(response_id)
        self._drop(response_id)

    def _drop(self, response_id: str) -> None:
        entry = self._entries.pop(response_id, None)
        if entry is not None:
            self.used_bytes -= entry.size_bytes
