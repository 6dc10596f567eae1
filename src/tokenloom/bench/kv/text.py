"""Text that every machine has: Python's own documentation and sources, as tokens."""

from __future__ import annotations

import random
import re
import sysconfig
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

from tokenloom.errors import RequestError
from tokenloom.text.tokenizer import Tokenizer

_CODE = (
    "argparse",
    "ast",
    "dataclasses",
    "difflib",
    "inspect",
    "pathlib",
    "statistics",
    "textwrap",
    "typing",
)
_ENOUGH_CHARACTERS = 500_000


def read_text(source: str) -> str:
    """The text of a source, at most half a million characters of it.

    Args:
        source: docs: Python's language reference, as `help()` has it; code: modules of its standard library;
            anything else is a file's path. The first two differ between Python versions.

    Raises:
        RequestError: there is no such file, or it is not text.
    """
    if source == "docs":
        return "\n\n".join(topics[name] for name in sorted(topics))[:_ENOUGH_CHARACTERS]
    if source == "code":
        library = Path(sysconfig.get_path("stdlib"))
        found = [path for name in _CODE for path in [library / f"{name}.py"] if path.exists()]
        return "\n\n".join(path.read_text("utf-8") for path in found)[:_ENOUGH_CHARACTERS]
    try:
        return Path(source).read_text("utf-8")[:_ENOUGH_CHARACTERS]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"text: {source} is none of docs, code or a readable file: {error}") from error


class Corpus:
    """A text in tokens, of which each call takes another stretch."""

    def __init__(self, tokenizer: Tokenizer, source: str = "docs", seed: int = 0) -> None:
        self.tokenizer = tokenizer
        self.tokens = self.encode(read_text(source))
        self.random = random.Random(seed)
        seen = Counter(re.findall(r"\b[a-z]{5,11}\b", read_text("docs")))
        self._words = sorted(word for word, count in seen.items() if count >= 2)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def take(self, count: int) -> list[int]:
        """So many tokens from somewhere in the text; a text that is too short starts again."""
        start = self.random.randrange(max(1, len(self.tokens) - count))
        times = -(-(start + count) // len(self.tokens))
        return (self.tokens * times)[start : start + count]

    def words(self, count: int) -> list[str]:
        """Different words, which say nothing together."""
        return self.random.sample(self._words, count)

    def digits(self, count: int) -> str:
        return "".join(self.random.choice("0123456789") for _ in range(count))
