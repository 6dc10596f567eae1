"""Prompts of five kinds, generated or taken from text that every machine has."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable

from tokenloom.bench.kv.text import read_text
from tokenloom.errors import RequestError
from tokenloom.text.tokenizer import Tokenizer

_TOPICS = (
    *("how a bicycle stays upright", "why the sky is blue", "what a mortgage is", "how bread rises"),
    *("the difference between a virus and a bacterium", "how to plan a week of meals", "what inflation does"),
    *("why leap years exist", "how a camera lens focuses", "what makes a good apology", "how tides work"),
    *("what a compiler does", "how to train for a long run", "why cats purr", "how paper is made"),
)
_ASKS = (
    "Explain {}.",
    "Tell me about {} in a few short paragraphs.",
    "A friend asks {}. Write them a letter.",
)
_NAMES = ("Ada", "Ben", "Carla", "Dmitri", "Elif", "Farid", "Grace", "Hiro", "Ines", "Jonas")
_CITIES = ("Oslo", "Lima", "Kyoto", "Accra", "Porto", "Quito", "Turin", "Perth")
_JOBS = ("baker", "nurse", "pilot", "teacher", "welder", "chemist")


def _chat(draw: random.Random) -> str:
    return draw.choice(_ASKS).format(draw.choice(_TOPICS))


def _code(draw: random.Random) -> str:
    """A function of the standard library, cut off behind its first few lines; what is before it as well."""
    source = read_text("code")
    starts = [m.start() for m in re.finditer(r"\n    def \w+\(self", source)]
    start = draw.choice(starts[3:])
    return source[max(0, start - 600) : start + draw.randrange(60, 200)]


def _summary(draw: random.Random) -> str:
    paragraphs = [p for p in read_text("docs").split("\n\n") if 300 < len(p) < 900 and "  " not in p[:40]]
    at = draw.randrange(len(paragraphs) - 2)
    return "Summarise the following text, keeping its own words:\n\n" + "\n\n".join(paragraphs[at : at + 2])


def _json(draw: random.Random) -> str:
    people = [
        {"name": n, "age": draw.randrange(20, 70), "city": draw.choice(_CITIES), "job": draw.choice(_JOBS)}
        for n in draw.sample(_NAMES, 4)
    ]
    prose = " ".join(f"{p['name']}, {p['age']}, works as a {p['job']} in {p['city']}." for p in people)
    example = json.dumps({"name": "Zoe", "age": 31, "city": "Rome", "job": "cook"})
    return f"Write each person as a line of JSON like this one:\n{example}\n\nText: {prose}\n\nJSON lines:"


def _arithmetic(draw: random.Random) -> str:
    """A chain of sums to be carried on."""
    value, step, lines = draw.randrange(5, 60), draw.randrange(3, 12), []
    for _ in range(6):
        lines.append(f"{value} + {step} = {value + step}")
        value += step
    return "Continue the chain of sums, one to a line:\n" + "\n".join(lines) + "\n"


_KINDS: dict[str, tuple[Callable[[random.Random], str], bool]] = {
    "chat": (_chat, True),
    "code": (_code, False),
    "summary": (_summary, True),
    "json": (_json, True),
    "arithmetic": (_arithmetic, False),
}
KINDS = tuple(_KINDS)


def build(tokenizer: Tokenizer, kind: str, count: int, seed: int = 0) -> list[list[int]]:
    """Different prompts of one kind, as tokens; chat, summary and json go through the chat template.

    Raises:
        RequestError: there is no such kind.
    """
    if kind not in _KINDS:
        raise RequestError(f"workload: no kind {kind!r}; there are {', '.join(KINDS)}")
    write, asked = _KINDS[kind]
    draw = random.Random(f"{kind} {seed}")
    found: list[str] = []
    while len(found) < count:
        text = write(draw)
        if asked and tokenizer.chat_template is not None:
            text = tokenizer.render_chat([{"role": "user", "content": text}])
        if text not in found:
            found.append(text)
    return [tokenizer.encode(text, add_special_tokens=False) for text in found]
