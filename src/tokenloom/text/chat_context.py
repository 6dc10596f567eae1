"""Where the first messages of a conversation end in its prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

from tokenloom.errors import RequestError
from tokenloom.text.tokenizer import Tokenizer


def context_tokens(
    tokenizer: Tokenizer,
    render: Callable[[list[Any]], str],
    messages: Sequence[Any],
    upto: int,
    prompt: list[int],
) -> int:
    """How many tokens of a prompt are there whatever comes after the first `upto` messages.

    Args:
        render: messages to text, with no generation prompt.
        prompt: the tokens of all messages, with whatever follows them.

    Raises:
        RequestError: (param "compress_upto") there are not so many messages.
    """
    if not 1 <= upto <= len(messages):
        raise RequestError(
            f"compress_upto: it is {upto}; in a conversation of {len(messages)} messages it is from 1 to "
            f"{len(messages)}",
            param="compress_upto",
        )
    first = tokenizer.encode(render(list(messages[:upto])), add_special_tokens=False)
    same = takewhile(lambda pair: pair[0] == pair[1], zip(first, prompt, strict=False))
    return sum(1 for _ in same)
