"""From a JSONL file of examples to token sequences with loss weights."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from tokenloom.errors import RequestError
from tokenloom.finetune import jsonl, rows
from tokenloom.finetune.chat_spans import ChatLayout, ChatTokenizer

MAX_PROBLEMS = 20
FEW_EXAMPLES = 10


@dataclass(frozen=True)
class Sample:
    """One example. `weights[i]` is the loss weight of predicting `tokens[i]`; `weights[0]` is 0.

    Weights are 1 on what the assistant (or the completion) says, times the message's own `weight`.
    """

    tokens: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Problem:
    """What is wrong with one line (1-based; 0 means the file as a whole)."""

    line: int
    code: str
    message: str

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line else ""
        return f"{where}{self.message} ({self.code})"


@dataclass
class Report:
    """Outcome of `validate`. Counts of samples and tokens stay 0 when no tokenizer was given.

    Attributes:
        examples: rows of the file that are not blank.
        problems: the first MAX_PROBLEMS faults; `problem_count` counts them all.
        samples: examples that can be learned from; `dropped` have no token with a weight left.
        truncated: examples longer than `max_tokens`.
        tokens, trained_tokens: of one epoch, after truncation; trained ones have a weight above 0.
    """

    examples: int = 0
    problems: list[Problem] = field(default_factory=list)
    problem_count: int = 0
    samples: int = 0
    truncated: int = 0
    dropped: int = 0
    tokens: int = 0
    trained_tokens: int = 0

    @property
    def ok(self) -> bool:
        return self.problem_count == 0

    @property
    def warnings(self) -> list[str]:
        """What the owner of the file should know although it can be trained on."""
        notes = []
        if self.ok and self.examples < FEW_EXAMPLES:
            notes.append(f"only {self.examples} examples; at least {FEW_EXAMPLES} are recommended")
        if self.truncated:
            notes.append(f"{self.truncated} of {self.examples} examples are too long and were truncated")
        if self.dropped:
            notes.append(
                f"{self.dropped} of {self.examples} examples have nothing to learn and were left out"
            )
        return notes

    def summary(self) -> str:
        """The problems as one text with line numbers, for `error.message` of a job."""
        more = self.problem_count - len(self.problems)
        rest = [f"and {more} more problems"] if more else []
        return "; ".join([str(problem) for problem in self.problems] + rest)

    def add(self, line: int, code: str, message: str) -> None:
        self.problem_count += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(Problem(line, code, message))


class Samples(Sequence[Sample]):
    """Samples in flat arrays, 8 bytes a token: a list of lists would take six times the memory."""

    def __init__(self) -> None:
        self._tokens = array("i")
        self._weights = array("f")
        self._ends = array("q", [0])

    def append(self, sample: Sample) -> None:
        self._tokens.extend(sample.tokens)
        self._weights.extend(sample.weights)
        self._ends.append(len(self._tokens))

    def length(self, index: int) -> int:
        """Tokens of sample `index`."""
        return self._ends[index + 1] - self._ends[index]

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        begin, end = self._ends[index], self._ends[index + 1]
        return Sample(self._tokens[begin:end].tolist(), self._weights[begin:end].tolist())


@dataclass(frozen=True)
class Dataset:
    """The samples of a file, in its order, and how many were cut or left out."""

    samples: Samples
    truncated: int
    dropped: int


Progress = Callable[[int], None]
"""Called with the number of every line read; what it raises ends the reading."""


def validate(
    path: Path,
    tokenizer: ChatTokenizer | None = None,
    max_tokens: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Read a file of examples line by line and say what is wrong with it.

    With a tokenizer each example is also rendered and tokenised, which finds chats that the model's template
    refuses and counts samples and tokens. Memory stays bounded by the longest line.
    """
    report = Report()
    builder = SampleBuilder(tokenizer, max_tokens) if tokenizer is not None else None
    for number, line in jsonl.lines(path):
        if progress is not None:
            progress(number)
        report.examples += 1
        try:
            row = _row(line)
        except jsonl.LineError as error:
            report.add(number, error.code, str(error))
            continue
        faults = list(rows.faults(row))
        for code, message in faults:
            report.add(number, code, message)
        if faults or builder is None:
            continue
        try:
            sample = builder.build(row, report)
        except RequestError as error:
            report.add(number, error.code or "not_renderable", str(error))
            continue
        if sample is not None:
            report.samples += 1
            report.tokens += len(sample.tokens)
            report.trained_tokens += sum(weight > 0 for weight in sample.weights)
    if not report.examples:
        report.add(0, "empty_file", "the file holds no examples")
    elif builder is not None and report.ok and not report.samples:
        report.add(0, "nothing_to_learn", "no example has an assistant token with a weight above 0")
    return report


def load_samples(path: Path, tokenizer: ChatTokenizer, max_tokens: int) -> Dataset:
    """Tokenise a file of examples; longer ones are cut to `max_tokens`, those without a target left out.

    Raises RequestError with the line number at the first faulty row (run `validate` for all of them).
    """
    builder, counts, samples = SampleBuilder(tokenizer, max_tokens), Report(), Samples()
    for number, line in jsonl.lines(path):
        try:
            row = _row(line)
            fault = next(rows.faults(row), None)
            if fault is not None:
                raise jsonl.LineError(*fault)
            sample = builder.build(row, counts)
        except (jsonl.LineError, RequestError) as error:
            raise RequestError(f"line {number}: {error}", code="invalid_training_file") from error
        if sample is not None:
            samples.append(sample)
    return Dataset(samples, counts.truncated, counts.dropped)


class SampleBuilder:
    """Turns faultless rows into samples for one model."""

    def __init__(self, tokenizer: ChatTokenizer, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._layout = ChatLayout(tokenizer)

    def build(self, row: dict[str, Any], counts: Report) -> Sample | None:
        """The sample of one row, or None if nothing in it is left to learn; cuts and drops go to `counts`.

        Raises RequestError if the chat template refuses the row.
        """
        tokens, weights = self._completion(row) if "prompt" in row else self._chat(row)
        if len(tokens) > self._max_tokens:
            counts.truncated += 1
            tokens, weights = tokens[: self._max_tokens], weights[: self._max_tokens]
        weights[:1] = [0.0] * len(weights[:1])
        if not any(weights):
            counts.dropped += 1
            return None
        return Sample(tokens, weights)

    def _completion(self, row: dict[str, Any]) -> tuple[list[int], list[float]]:
        prompt = self._tokenizer.encode(row["prompt"])
        answer = self._tokenizer.encode(row["completion"], add_special_tokens=False)
        if self._tokenizer.eos_token_id is not None:
            answer.append(self._tokenizer.eos_token_id)
        return prompt + answer, [0.0] * len(prompt) + [1.0] * len(answer)

    def _chat(self, row: dict[str, Any]) -> tuple[list[int], list[float]]:
        chat = rows.normalized(row)
        text = self._layout.render(chat["messages"], chat["tools"])
        tokens = self._encode(text)
        weights = [0.0] * len(tokens)
        # The whole is tokenised at once, as a server tokenises a conversation. A token that reaches over the
        # beginning of a span (a line break that merged with the answer's first space) counts as learned.
        for span in self._layout.spans(text, chat["messages"], chat["tools"]):
            start = _common_prefix(tokens, self._encode(text[: span.start]))
            if start >= self._max_tokens:  # all that follows will be cut off
                break
            end = _common_prefix(tokens, self._encode(text[: span.end]))
            weights[start:end] = [span.weight] * (end - start)
        return tokens, weights

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)  # the template wrote the bos token


def _row(line: bytes | jsonl.LineError) -> Any:
    if isinstance(line, jsonl.LineError):
        raise line
    return jsonl.parse(line)


def _common_prefix(whole: list[int], part: list[int]) -> int:
    for index, (a, b) in enumerate(zip(whole, part, strict=False)):
        if a != b:
            return index
    return min(len(whole), len(part))
