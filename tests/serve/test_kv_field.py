"""The `kv` field of requests, and the server's own spec."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from running import Running, assert_error, settings
from tokenloom.engine.async_engine import AsyncEngine
from tokenloom.engine.engine import Engine

LONG = "the cat sat on the other mat and then again " * 6


def complete(running: Running, **body: Any) -> Any:
    return running.http.post("/v1/completions", json={"model": "tiny", "max_tokens": 8, **body})


@pytest.fixture(scope="module")
def streaming(tiny_folder: Path) -> Iterator[Running]:
    """A server that keeps few tokens unless a request says otherwise."""
    chosen = settings(
        model__name=str(tiny_folder),
        model__dtype="float64",
        cache__kv_bytes=2**23,
        server__served_model_name="tiny",
        methods__kv="streaming(budget=16)",
    )
    running = Running(AsyncEngine(Engine(chosen)))
    yield running
    running.stop()


def scores(running: Running, **body: Any) -> list[float]:
    asked = {"prompt": LONG, "temperature": 0, "logprobs": 1, "ignore_eos": True, **body}
    return complete(running, **asked).json()["choices"][0]["logprobs"]["token_logprobs"]


def test_a_request_may_name_a_method(real: Running) -> None:
    assert scores(real, kv="streaming(budget=16)") != scores(real)
    assert scores(real, kv="streaming(budget=2000)") == scores(real, kv="off") == scores(real)


def test_a_server_has_one_unless_a_request_says_otherwise(streaming: Running, real: Running) -> None:
    close = pytest.approx  # the backends differ
    assert scores(streaming) == close(scores(real, kv="streaming(budget=16)"), abs=1e-9)
    assert scores(streaming, kv="off") == close(scores(real), abs=1e-9)
    snapkv = "snapkv(budget=20, window=8)"
    assert scores(streaming, kv=snapkv) == close(scores(real, kv=snapkv), abs=1e-9)


def test_the_openai_client_sends_it_beside_its_own_fields(real: Running) -> None:
    client = openai.OpenAI(base_url=f"{real.url}/v1", api_key="none")
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": LONG}],
        max_tokens=8,
        extra_body={"kv": "snapkv(budget=20, window=8)"},
    )
    assert answer.usage is not None and answer.usage.completion_tokens == 8


@pytest.mark.parametrize(
    ("kv", "words"),
    [
        ("nosuch", "no method 'nosuch'"),
        ("snapkv(", "cannot be read"),
        ("snapkv+streaming", "do not go together"),
        ("int8", "the server's cache is not in 8 bits"),
        ("tokenselect(chunk=5000)", "chunk=5000 rows"),
        (5, "kv"),
        ("x" * 1001, "kv"),
    ],
)
def test_faulty_specs_are_refused(real: Running, kv: Any, words: str) -> None:
    assert words in assert_error(complete(real, prompt=LONG, kv=kv), 400, "kv")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "kv": kv}
    assert words in assert_error(real.http.post("/v1/chat/completions", json=body), 400, "kv")


def test_many_methods_at_once_give_what_each_gives_alone(real: Running) -> None:
    from concurrent.futures import ThreadPoolExecutor

    specs = ["off", "streaming(budget=16)", "snapkv(budget=20, window=8)", "quest(budget=16, page=4)"]
    alone = [scores(real, kv=spec) for spec in specs]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda i: scores(real, kv=specs[i % 4]), range(12)))
    assert together == alone * 3


def test_a_context_is_compressed_before_the_question(real: Running) -> None:
    """By tokens of a prompt, and by messages of a conversation."""
    spec = "snapkv(budget=20, window=8)"
    marked = scores(real, kv=spec, compress_upto=40)
    assert marked != scores(real, kv=spec)
    context = [{"role": "system", "content": LONG}, {"role": "user", "content": LONG}]
    question = {"role": "user", "content": "where was the cat"}

    def chat(**body: Any) -> Any:
        asked = {"model": "tiny", "max_tokens": 6, "temperature": 0, "logprobs": True, "kv": spec, **body}
        answer = real.http.post("/v1/chat/completions", json={"messages": [*context, question], **asked})
        return answer.json()["choices"][0]["logprobs"]["content"]

    assert chat(compress_upto=2) != chat()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"kv": "snapkv", "compress_upto": 4000}, "compress_upto: it is 4000; "),
        ({"kv": "quest", "compress_upto": 1}, "needs a kv method that compresses"),
        ({"compress_upto": 1}, "needs a kv method that compresses"),
        ({"kv": "snapkv", "compress_upto": 0}, "compress_upto"),
        ({"kv": "snapkv", "compress_upto": "2"}, "compress_upto"),
    ],
)
def test_a_context_that_makes_no_sense_is_refused(real: Running, body: Any, words: str) -> None:
    assert words in assert_error(complete(real, prompt=LONG, **body), 400, "compress_upto")
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], **body}
    assert words in assert_error(real.http.post("/v1/chat/completions", json=chat), 400, "compress_upto")
