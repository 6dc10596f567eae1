"""Token ids to text, a few at a time, never cutting a character."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence

from tokenloom.errors import RequestError

_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Turns the ids of one sequence into text as they come.

    The texts that `push` returns and the one of `finish`, put together, are what `Tokenizer.decode` gives for
    all the ids at once. Bytes that are not UTF-8 become U+FFFD, one for each broken sequence, as in Unicode's
    recommended practice. With `strip_space`, one space at the very beginning is dropped (SentencePiece models
    put it there).
    """

    def __init__(self, token_bytes: Mapping[int, bytes], *, strip_space: bool = False) -> None:
        self._token_bytes = token_bytes
        self._decode = _new_utf8_decoder("replace").decode
        self._strip_space = strip_space

    def push(self, ids: Sequence[int]) -> str:
        """Text that `ids` complete. Raises RequestError for an id outside the vocabulary."""
        token_bytes = self._token_bytes
        try:
            text = self._decode(b"".join([token_bytes[token] for token in ids]))
        except KeyError as error:
            raise RequestError(f"token id {error.args[0]} is not in the vocabulary") from None
        return self._without_first_space(text) if self._strip_space else text

    def finish(self) -> str:
        """The rest: U+FFFD if the last character is incomplete, otherwise nothing."""
        text = self._decode(b"", True)
        return self._without_first_space(text) if self._strip_space else text

    def _without_first_space(self, text: str) -> str:
        if not text:
            return text
        self._strip_space = False
        return text.removeprefix(" ")
