"""What PPD is trained on: the model's own greedy answers, to prompts that every machine can make.

In a greedy answer the teacher's next steps from any cut are the text itself, so nothing has to be decoded a
second time.
"""

from __future__ import annotations

import random
import re
import sysconfig
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenloom.engine.engine import Engine
from tokenloom.engine.request import Request
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.text.tokenizer import Tokenizer

STREAMS = 24
"""Answers written together."""
REPEATED, MOST_REPEATED = 8, 0.25
"""An answer is left out where more than this share of its n-grams, so long, stood in it before: who foretells
loops has learned nothing."""

# None of them is read by `tokenloom bench drafting` or `bench kv`: what is learned is not tested on itself.
_MODULES = (
    *("pickletools", "_pydecimal", "optparse", "turtle", "tarfile", "_pyio", "threading", "random", "shutil"),
    *(
        "logging/__init__",
        "unittest/case",
        "unittest/mock",
        "subprocess",
        "zipfile",
        "csv",
        "heapq",
        "smtplib",
    ),
    *(
        "email/message",
        "http/server",
        "http/cookiejar",
        "configparser",
        "calendar",
        "fractions",
        "contextlib",
    ),
    *("asyncio/streams", "asyncio/queues", "collections/__init__", "functools", "gettext", "locale", "pdb"),
)
_SUBJECTS = (
    *("a volcano", "a lighthouse", "democracy", "the water cycle", "a beehive", "jazz", "the printing press"),
    *("gravity", "a glacier", "chess", "a rainforest", "photosynthesis", "a symphony orchestra", "recycling"),
    *(
        "the human heart",
        "a library",
        "electricity",
        "a submarine",
        "the Roman Empire",
        "vaccines",
        "an opera",
    ),
    *("solar power", "a marathon", "the Silk Road", "magnets", "a coral reef", "poetry", "a telescope"),
    *("insurance", "the stock market", "a garden", "meditation", "a bridge", "the alphabet", "earthquakes"),
    *("a hospital", "friendship", "the moon", "tea", "a railway", "robots", "a museum", "soap", "a database"),
    *(
        "machine learning",
        "a desert",
        "the violin",
        "a constitution",
        "migration of birds",
        "a wedding",
        "salt",
    ),
)
_ASKS = (
    *("What is {}?", "Explain {} to a child.", "Write a short story about {}.", "Why does {} matter?"),
    *(
        "List five facts about {}.",
        "Write a poem about {}.",
        "Describe {} in one paragraph.",
        "Who needs {}?",
    ),
    *(
        "Compare {} with {}.",
        "Give me three tips about {}.",
        "Write a dialogue about {} and {}.",
        "Define {}.",
    ),
    *("What is the history of {}?", "Write an email about {} to a colleague.", "How would you teach {}?"),
)
_READS = (
    *("Summarise this text:\n\n{}", "Explain in your own words:\n\n{}", "Rewrite this for beginners:\n\n{}"),
    *("What is the main point of the following?\n\n{}", "Turn this into a list of points:\n\n{}"),
)
_NAMES = ("Kofi", "Lena", "Marco", "Noor", "Otto", "Priya", "Rosa", "Sven", "Tariq", "Uma")
_THINGS = ("apples", "books", "chairs", "stamps", "bricks", "tickets", "eggs", "lamps")


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt and what the model answered: `tokens[start:]` is the answer."""

    tokens: list[int]
    start: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to be carried on, or what a user says in a chat."""

    text: str
    chat: bool

    def tokens(self, tokenizer: Tokenizer) -> list[int]:
        text = self.text
        if self.chat and tokenizer.chat_template is None:
            text = f"{text}\n"
        elif self.chat:
            text = tokenizer.render_chat([{"role": "user", "content": text}])
        return tokenizer.encode(text, add_special_tokens=False)


def prompts(count: int, seed: int, held_out: bool = False) -> list[Prompt]:
    """Different prompts: questions, texts to work on, and texts and sources to be carried on.

    held_out: from subjects and sources of which none are in prompts that are not.
    """
    draw = random.Random(f"ppd {seed} {held_out}")
    subjects, sources = _part(_SUBJECTS, held_out), _part(_sources(), held_out)
    prose = [_plain(part) for source in sources for part in re.findall(r'"""(.*?)"""', source, re.S)]
    prose = [part for part in prose if 200 < len(part) < 900]
    kinds: list[Callable[[], Prompt]] = [
        lambda: Prompt(draw.choice(_ASKS).format(*draw.sample(subjects, 2)), True),
        lambda: Prompt(draw.choice(_READS).format(draw.choice(prose)), True),
        lambda: Prompt(_counting(draw), True),
        lambda: Prompt(_piece(draw, draw.choice(sources), 700), False),
        lambda: Prompt(_piece(draw, draw.choice(prose), 200), False),
    ]
    shares = (4, 2, 1, 2, 1)
    found: dict[Prompt, None] = {}
    while len(found) < count:
        found[draw.choices(kinds, shares)[0]()] = None
    return list(found)


def _part(items: Sequence[str], held_out: bool) -> list[str]:
    """Every fifth is held out."""
    return [item for i, item in enumerate(items) if (i % 5 == 4) == held_out]


def _sources() -> list[str]:
    library = Path(sysconfig.get_path("stdlib"))
    files = [library / f"{name}.py" for name in _MODULES]
    return [path.read_text("utf-8") for path in files if path.exists()]


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _counting(draw: random.Random) -> str:
    name, other = draw.sample(_NAMES, 2)
    a, b, thing = draw.randrange(3, 40), draw.randrange(2, 20), draw.choice(_THINGS)
    return draw.choice(
        (
            f"{name} has {a} {thing} and buys {b} more. How many {thing} are there now? Show each step.",
            f"{name} has {a} {thing} and {other} has {b}. Who has more, and by how many?",
            f"Write the names {name}, {other} and their {a} and {b} {thing} as a JSON list.",
            f"Count from {a} to {a + b}.",
        )
    )


def _piece(draw: random.Random, text: str, length: int) -> str:
    start = draw.randrange(max(1, len(text) - length))
    return text[start : start + draw.randrange(length // 2, length)]


def answers(
    engine: Engine,
    count: int,
    new_tokens: int,
    seed: int,
    held_out: bool = False,
    most_prompt: int = 320,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Sample]:
    """Greedy answers to `count` prompts, less those that repeat themselves.

    Args:
        new_tokens: most tokens of an answer. held_out: see `prompts`.
        most_prompt: of a longer prompt the last tokens stand for it.
        progress: told how many prompts are answered.
    """
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens)
    most_prompt = max(1, min(most_prompt, engine.max_model_len - new_tokens))
    waiting = [prompt.tokens(engine.tokenizer)[-most_prompt:] for prompt in prompts(count, seed, held_out)]
    running: dict[str, Request] = {}
    found: list[Sample] = []
    done = 0
    while waiting or running:
        while waiting and len(running) < STREAMS:
            request = Request(f"ppd-{len(waiting)}", waiting.pop(), params)
            engine.add(request)
            running[request.request_id] = request
        for output in engine.step():
            if output.finished:
                request = running.pop(output.request_id)
                tokens = request.sequences[0].tokens
                done += 1
                progress(done)
                if repeated(tokens[len(request.prompt) :]) <= MOST_REPEATED:
                    found.append(Sample(list(tokens), len(request.prompt)))
    return found


def repeated(tokens: Sequence[Hashable]) -> float:
    """Share of the n-grams of 8 that were there before."""
    grams = [tuple(tokens[i : i + REPEATED]) for i in range(len(tokens) - REPEATED + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
