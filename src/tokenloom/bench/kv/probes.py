"""What is asked of a KV method: a prompt, the tokens that follow it, and which of those count.

The prompt is what a method may compress. All that follows is fed one token at a time, as in decoding, and so
are questions: what is dropped is chosen without knowing them (`question_in_prompt` asks for the easier way).
The first token after a prompt never counts: it is predicted by a row of the prompt, which most methods leave
alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tokenloom.bench.kv.text import Corpus
from tokenloom.errors import RequestError

# A number's digits are tokens of their own for most tokenizers.
_DIGITS = 5
# The copy probe: a block of words, of which the first tokens are the cue.
_WORDS, _CUE = 40, 8


@dataclass(frozen=True)
class Probe:
    """One text of one kind.

    Attributes:
        group: results of one group are averaged: `text`, `copy early`, `needle`, ...
        given: tokens after the prompt, `given[0]` predicted by the prompt's last row; None: what dense
            attention itself says, `new_tokens` of it.
        answers: stretches of `given` that count.
    """

    group: str
    prompt: list[int]
    given: list[int] | None
    answers: tuple[range, ...] = ()
    new_tokens: int = 0


@dataclass(frozen=True)
class Sizes:
    """How long and how many.

    Attributes:
        prompt_tokens: of every probe but copy.
        rows: teacher-forced rows of text; also the tokens of a summary.
        copy_tokens: filler of the copy probe.
        places: where its block is, as parts of that filler by name.
        depths: where needles are, as parts of the prompt.
        keys, asked: numbers hidden in a multi-key prompt, and how many of them are asked for.
        samples: probes of each kind (and place, and depth).
    """

    prompt_tokens: int = 1536
    rows: int = 128
    copy_tokens: int = 1400
    places: dict[str, float] = field(default_factory=lambda: {"early": 1 / 7, "middle": 1 / 2, "late": 6 / 7})
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    keys: int = 8
    asked: int = 4
    samples: int = 1
    question_in_prompt: bool = False


def parse_depths(text: str) -> tuple[float, ...]:
    """`0.1,0.5` -> parts of a prompt.

    Raises:
        RequestError: one is no number between 0 and 1, or there is none.
    """
    try:
        depths = tuple(float(item) for item in text.split(",") if item.strip())
    except ValueError:
        depths = ()
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise RequestError(f"depths: {text!r} is not a list of numbers from 0 to 1 such as 0.1,0.5,0.9")
    return depths


def text(corpus: Corpus, sizes: Sizes) -> list[Probe]:
    """Any text, and what comes next in it: KL to dense attention, agreement, perplexity."""
    n, rows = sizes.prompt_tokens, sizes.rows
    tokens = corpus.take(n + rows + 1)
    return [Probe("text", tokens[:n], tokens[n:], (range(1, rows + 1),))]


def copy(corpus: Corpus, sizes: Sizes) -> list[Probe]:
    """A block of random words, seen once and begun again: whoever has lost it cannot go on.

    As in TokenSelect's evaluation here: 200 tokens of filler, the block, 1,200 more (early), and the block
    again, of which the first 8 tokens do not count. `copy absent` has no first block: nothing can be known.
    All places have the same block in the same filler.
    """
    probes = []
    block = corpus.encode("".join(f" {word}" for word in corpus.words(_WORDS)))
    filler = corpus.take(sizes.copy_tokens)
    for place, part in [*sizes.places.items(), ("absent", None)]:
        if part is None:
            prompt = filler
        else:
            before = round(part * sizes.copy_tokens)
            prompt = filler[:before] + block + filler[before:]
        probes.append(Probe(f"copy {place}", prompt, block, (range(_CUE, len(block)),)))
    return probes


def needle(corpus: Corpus, sizes: Sizes) -> list[Probe]:
    """One sentence with a number in the middle of other text, at several depths."""
    probes = []
    for depth in sizes.depths:
        key, number = corpus.words(1)[0], corpus.digits(_DIGITS)
        probes.append(_hidden(corpus, sizes, "needle", {key: number}, [key], [depth]))
    return probes


def multikey(corpus: Corpus, sizes: Sizes) -> list[Probe]:
    """Many such sentences, evenly spread; some of them are asked for."""
    numbers = {key: corpus.digits(_DIGITS) for key in corpus.words(sizes.keys)}
    asked = corpus.random.sample(list(numbers), min(sizes.asked, sizes.keys))
    depths = [(i + 0.5) / sizes.keys for i in range(sizes.keys)]
    return [_hidden(corpus, sizes, "multikey", numbers, asked, depths)]


def _hidden(
    corpus: Corpus, sizes: Sizes, group: str, numbers: dict[str, str], asked: list[str], depths: list[float]
) -> Probe:
    """Numbers hidden at depths, and questions for some of them, answered one after another."""
    sentences = [corpus.encode(f"\nThe number of {key} is {number}.\n") for key, number in numbers.items()]
    given: list[int] = []
    answers = []
    for key in asked:
        question, answer = corpus.encode(f"\nThe number of {key} is "), corpus.encode(numbers[key])
        given += question
        answers.append(range(len(given), len(given) + len(answer)))
        given += answer
    within = answers[0].start - 1 if sizes.question_in_prompt else 0
    room = sizes.prompt_tokens - within - sum(map(len, sentences))
    if room < 1:
        raise RequestError(f"a prompt of {sizes.prompt_tokens} tokens has no room for {len(numbers)} numbers")
    filler, prompt, used = corpus.take(room), list[int](), 0
    for depth, sentence in zip(depths, sentences, strict=True):
        prompt += filler[used : round(depth * room)] + sentence
        used = round(depth * room)
    prompt += filler[used:] + given[:within]
    answers = [range(a.start - within, a.stop - within) for a in answers]
    return Probe(group, prompt, given[within:], tuple(answers))


def summary(corpus: Corpus, sizes: Sizes) -> list[Probe]:
    """A long answer about a long text. Dense attention's own is the reference: a method is scored by how
    likely it finds that, and by what its own answer shares with it."""
    tokenizer = corpus.tokenizer
    ask = "Write a summary of the following text, of its main points, in plain English.\n\n"
    mark = "|TEXT|"
    chat = tokenizer.render_chat([{"role": "user", "content": ask + mark}])
    before, after = (corpus.encode(part) for part in chat.split(mark))
    room = sizes.prompt_tokens - len(before) - len(after)
    if room < 1:
        raise RequestError(f"a prompt of {sizes.prompt_tokens} tokens has no room for a text to summarise")
    prompt = before + corpus.take(room) + after
    return [Probe("summary", prompt, None, (range(1, sizes.rows),), new_tokens=sizes.rows)]


KINDS: dict[str, Callable[[Corpus, Sizes], list[Probe]]] = {
    "text": text,
    "copy": copy,
    "needle": needle,
    "multikey": multikey,
    "summary": summary,
}


def build(kinds: list[str], corpus: Corpus, sizes: Sizes) -> list[Probe]:
    """All probes of these kinds.

    Raises:
        RequestError: there is no such kind, or a prompt is too short for it.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise RequestError(f"there is no probe {unknown[0]!r}; there are {', '.join(KINDS)}")
    return [probe for kind in kinds for _ in range(sizes.samples) for probe in KINDS[kind](corpus, sizes)]
