"""The `draft` field of requests, the server's own spec, and what usage and metrics say of guesses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from running import Running, assert_error, events, settings
from tokenloom import LLM, SamplingParams
from tokenloom.config import ConfigError
from tokenloom.engine.async_engine import AsyncEngine
from tokenloom.engine.engine import Engine

LOOP = "abcabcabcabcabcabc"


def build(folder: Path, **flags: Any) -> Running:
    chosen = settings(
        model__name=str(folder),
        model__dtype="float64",
        cache__kv_bytes=2**23,
        server__served_model_name="tiny",
        drafting__persist=False,
        **flags,
    )
    return Running(AsyncEngine(Engine(chosen)))


@pytest.fixture(scope="module")
def drafting(tiny_folder: Path) -> Iterator[Running]:
    running = build(tiny_folder, methods__draft="ngram(fixed=True)")
    yield running
    running.stop()


def complete(running: Running, **body: Any) -> Any:
    asked = {"model": "tiny", "prompt": LOOP, "max_tokens": 24, "temperature": 0, "ignore_eos": True, **body}
    return running.http.post("/v1/completions", json=asked)


def text(answer: Any) -> str:
    return answer.json()["choices"][0]["text"]


def details(answer: Any) -> dict[str, Any] | None:
    return answer.json()["usage"].get("completion_tokens_details")


def test_a_server_drafts_unless_a_request_says_otherwise(drafting: Running) -> None:
    by_default, off = complete(drafting), complete(drafting, draft="off")
    assert text(by_default) == text(off)
    assert details(by_default) and details(off) is None


def test_a_request_may_name_a_drafter(drafting: Running) -> None:
    messages = [{"role": "user", "content": LOOP}]
    fixed = {"model": "tiny", "messages": messages, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    spec = "token_recycling(tree=n16)+ngram(fixed=True)"
    answer = drafting.http.post("/v1/chat/completions", json={**fixed, "draft": spec})
    assert answer.json()["usage"]["completion_tokens_details"]["draft_passes"] > 0


def test_usage_says_what_became_of_guesses(drafting: Running) -> None:
    found = details(complete(drafting, prompt=[LOOP, LOOP[:5]], n=2))
    assert found is not None
    assert found["accepted_prediction_tokens"] == sum(found["accepted_by_position"])
    assert found["rejected_prediction_tokens"] > 0
    assert all(n <= found["draft_passes"] for n in found["accepted_by_position"])


def test_streams_give_the_same_text_and_usage(drafting: Running) -> None:
    whole = complete(drafting)
    streamed = complete(drafting, stream=True, stream_options={"include_usage": True})
    chunks = [json.loads(event) for event in events(streamed)[:-1]]
    assert "".join(c["choices"][0]["text"] for c in chunks if c["choices"]) == text(whole)
    assert chunks[-1]["usage"]["completion_tokens_details"] == details(whole)


def test_streamed_logprobs_are_those_of_the_whole_answer(drafting: Running) -> None:
    whole = complete(drafting, logprobs=2, draft="off").json()["choices"][0]["logprobs"]
    streamed = events(complete(drafting, logprobs=2, stream=True))[:-1]
    parts = [json.loads(event)["choices"][0]["logprobs"] for event in streamed]
    parts = [part for part in parts if part is not None]
    assert any(len(part["tokens"]) > 1 for part in parts), "no pass gave two tokens"
    for key in ("tokens", "text_offset"):
        assert [value for part in parts for value in part[key]] == whole[key]
    logprobs = [value for part in parts for value in part["token_logprobs"]]
    assert logprobs == pytest.approx(whole["token_logprobs"], abs=1e-9)


def test_metrics_count_guesses_by_position(drafting: Running) -> None:
    def metric(name: str) -> float:
        lines = drafting.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"tokenloom:{name}"))

    complete(drafting)
    accepted = metric("spec_decode_num_accepted_tokens_total")
    assert accepted == metric("spec_decode_num_accepted_tokens_per_pos_total") > 0
    assert metric("spec_decode_num_draft_tokens_total") > accepted
    assert metric("spec_decode_num_drafts_total") > 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"draft": "nosuch"}, "no method 'nosuch'"),
        ({"draft": "ngram("}, "cannot be read"),
        ({"draft": "ngram(tokens=999)"}, "tokens is 999"),
        ({"draft": "draft_model(model='/etc/passwd')"}, "drafting.models"),
        ({"draft": "ngram", "kv": "streaming(budget=16)"}, "does not go together with kv"),
        ({"draft": 5}, "draft"),
        ({"draft": "x" * 1001}, "draft"),
    ],
)
def test_faulty_specs_are_refused(drafting: Running, fields: dict[str, Any], words: str) -> None:
    assert words in assert_error(complete(drafting, **fields), 400, "draft")


def test_a_request_with_a_kv_method_is_not_drafted_for(drafting: Running) -> None:
    answer = complete(drafting, kv="streaming(budget=16)")
    assert answer.status_code == 200 and details(answer) is None


def test_the_settings_name_methods_that_go_together(tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"methods\.draft"):
        LLM(str(tiny_folder), methods__kv="streaming(budget=16)", methods__draft="ngram")
    with pytest.raises(ConfigError, match=r"methods\.draft"):
        LLM(str(tiny_folder), methods__draft="nosuch")
    with pytest.raises(ConfigError, match="the model itself has 2"):
        LLM(str(tiny_folder), methods__draft="draft_model(layers=2)", drafting__persist=False)


def test_offline_calls_take_it_too(tiny_folder: Path) -> None:
    llm = LLM(str(tiny_folder), model__dtype="float64", drafting__persist=False, cache__kv_bytes=2**23)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    plain = llm.generate(LOOP, params)[0]
    drafted = llm.generate(LOOP, params, draft="ngram(fixed=True)")[0]
    assert (plain.drafts, drafted.text) == (None, plain.text)
    assert drafted.drafts is not None and drafted.drafts.passes > 0
    pieces = list(llm.stream(LOOP, params, draft="ngram(fixed=True)"))
    assert "".join(piece.text for piece in pieces) == plain.text
    assert sum(len(piece.token_ids) for piece in pieces) == 12
