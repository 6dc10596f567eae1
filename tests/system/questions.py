"""Questions with one right answer each, asked over HTTP: greedy, of many kinds; how they are compared."""

from __future__ import annotations

import argparse
import inspect
import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

MODEL, ADAPTER = "smollm2-135m-instruct", "crew"
KV_METHODS = ("snapkv(budget=96)", "streaming(budget=96)", "kivi", "tokenselect(budget=96)")
DRAFTS = ("ngram", "token_recycling+ngram")
ASKS = (
    "Name three rivers and say where they end.",
    "What is a lighthouse for?",
    "Write a short note to a friend who is ill.",
    "List the planets from the sun outwards.",
    "Explain to a child why the sky is blue.",
    "Count from one to twenty in words.",
    "How does one boil an egg?",
    "What did sailors use before they had clocks?",
)
VECTOR_TOLERANCE = 1e-3
"""Of an embedding's numbers, relative to the largest: sums of float32 in another order."""


@dataclass(frozen=True)
class Question:
    """One request: its kind, the route and the body."""

    kind: str
    path: str
    body: dict[str, Any]


@dataclass
class Answer:
    """What came back. Tokens as text; `gaps[i]`: by how much the model preferred token i to the next best."""

    tokens: list[str] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    vector: list[float] = field(default_factory=list)
    finish_reason: str | None = None


class Refused(Exception):
    """The server did not take the request."""

    def __init__(self, status: int, retry_after: str | None, text: str) -> None:
        super().__init__(f"{status}: {text[:200]}")
        self.status, self.retry_after = status, retry_after


class BrokeOff(Exception):
    """An answer had begun, and did not come to its end."""


def questions() -> list[Question]:
    """All of them, in a fixed order; the same on every machine with the same Python."""
    found = []
    texts = _texts()
    for i, text in enumerate(texts):
        found.append(_completion("completion", text, 24 + 8 * (i % 4)))
    for i, ask in enumerate(ASKS):
        body = {"messages": [{"role": "user", "content": ask}], "max_tokens": 24 + 8 * (i % 4)}
        found.append(Question("chat", "/v1/chat/completions", {**_COMMON, **_CHAT_LOGPROBS, **body}))
    for i, spec in enumerate(DRAFTS):
        for text in texts[i::3]:
            found.append(_completion("draft", text, 40, draft=spec))
    for i, spec in enumerate(KV_METHODS):
        for text in texts[len(texts) // 2 :][i::3]:
            found.append(_completion("kv", text, 32, kv=spec))
    for text in texts[::2]:
        found.append(_completion("adapter", text, 24, model=ADAPTER))
    for text in texts[::3]:
        found.append(Question("embedding", "/v1/embeddings", {"model": MODEL, "input": text}))
    return found


_COMMON = {"model": MODEL, "temperature": 0, "ignore_eos": True}
_CHAT_LOGPROBS = {"logprobs": True, "top_logprobs": 2}


def _completion(kind: str, text: str, max_tokens: int, **fields: Any) -> Question:
    body = {**_COMMON, "logprobs": 2, "prompt": text, "max_tokens": max_tokens, **fields}
    return Question(kind, "/v1/completions", body)


def _texts() -> list[str]:
    """Short prompts and long ones: plain text that every Python has."""
    source = " ".join((inspect.getdoc(module) or "") for module in (random, json, argparse))
    words = (source * 4).split()
    draw = random.Random(7)
    texts = []
    for length in (6, 12, 20, 40, 80, 160, 240, 320, 400):
        start = draw.randrange(len(words) - length)
        texts.append(" ".join(words[start : start + length]))
    return texts


async def ask(client: httpx.AsyncClient, question: Question) -> Answer:
    """The whole answer at once. Raises Refused."""
    response = await client.post(question.path, json=question.body)
    if response.status_code != 200:
        raise Refused(response.status_code, response.headers.get("retry-after"), response.text)
    body, answer = response.json(), Answer()
    if question.kind == "embedding":
        answer.vector = body["data"][0]["embedding"]
    else:
        _take(answer, body["choices"][0])
    return answer


async def stream(client: httpx.AsyncClient, question: Question) -> AsyncIterator[Answer]:
    """The answer as it grows, the same object each time. Raises Refused, and BrokeOff if no end came."""
    answer, ended = Answer(), False
    body = {**question.body, "stream": True}
    async with client.stream("POST", question.path, json=body) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode(errors="replace")
            raise Refused(response.status_code, response.headers.get("retry-after"), text)
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line:
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise BrokeOff(json.dumps(event["error"]))
                if event["choices"]:
                    _take(answer, event["choices"][0])
                    yield answer
    if not ended or answer.finish_reason is None:
        raise BrokeOff(f"the stream ended after {len(answer.tokens)} tokens without an end")


def _take(answer: Answer, choice: dict[str, Any]) -> None:
    answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
    entries = choice.get("logprobs") or {}
    if "content" in entries:
        for entry in entries["content"] or []:
            answer.tokens.append(entry["token"])
            answer.gaps.append(_gap([top["logprob"] for top in entry["top_logprobs"]]))
    elif entries:
        answer.tokens += entries["tokens"]
        answer.gaps += [_gap(list((top or {}).values())) for top in entries["top_logprobs"]]


def _gap(logprobs: list[float]) -> float:
    first, second = (*sorted(logprobs, reverse=True), float("-inf"), float("-inf"))[:2]
    return first - second


def same(expected: Answer, got: Answer) -> float | None:
    """None if the answers agree; else how sure the model was of the first token that differs (the difference
    of log-probabilities to its next best), or infinity where no rounding can explain it."""
    if expected.vector or got.vector:
        if len(expected.vector) != len(got.vector):
            return float("inf")
        largest = max(map(abs, expected.vector))
        worst = max(abs(a - b) for a, b in zip(expected.vector, got.vector, strict=True))
        return None if worst <= VECTOR_TOLERANCE * largest else float("inf")
    if expected.tokens == got.tokens:
        return None if expected.finish_reason == got.finish_reason else float("inf")
    for want, have, gap in zip(expected.tokens, got.tokens, expected.gaps, strict=False):
        if want != have:
            return gap
    return float("inf")  # one is the beginning of the other
