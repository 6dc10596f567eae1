"""What a grammar may cost, and how its request hears that it costs too much."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch

from grammar_rig import answer, ask, build_engine, run, tiny_files
from tokenloom.config import load_settings
from tokenloom.engine.engine import Engine
from tokenloom.errors import RequestError
from tokenloom.structured import Source, Structured, grammars_of
from tokenloom.structured import grammar as grammar_module
from tokenloom.structured.grammar import MAX_CACHED, Grammars

DEEP: dict[str, Any] = {"type": "string"}
for _ in range(20):
    DEEP = {"type": "object", "properties": {"a": DEEP}}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return build_engine(tiny_files(tmp_path_factory.mktemp("tiny")))


def grammars(engine: Engine, **limits: Any) -> Grammars:
    chosen = load_settings({f"limits.{name}": value for name, value in limits.items()}).limits
    return Grammars(engine.tokenizer, engine.config.vocab_size, engine.end_tokens, chosen)


@pytest.mark.parametrize(
    ("wanted", "param", "words"),
    [
        (Structured(json={"type": "strin"}), "json", "strin"),
        (Structured(json="{'a'"), "json", "not valid JSON"),
        (Structured(json=[1]), "json", "must be a JSON schema"),  # type: ignore[arg-type]
        (Structured(json={"not": {"type": "null"}}), "json", "not"),
        (Structured(json={"$ref": "http://127.0.0.1:9/schema"}), "json", "does not fetch"),
        (Structured(json={"$ref": "#"}), "json", "NoExtension"),
        (Structured(json=DEEP), "json", "32 levels deep"),
        (Structured(json={"enum": ["x" * 70000]}), "json", "at most 65536"),
        (Structured(json={"const": "\ud800"}), "json", "hex escape"),
        (Structured(regex="(a"), "regex", "regex"),
        (Structured(regex="a(?=b)"), "regex", "regex"),
        (Structured(regex="a" * 70000), "regex", "at most 65536"),
        (Structured(regex="\ud800"), "regex", "lone surrogate"),
        (Structured(choice=[]), "choice", "at least one"),
        (Structured(grammar="start: nope"), "grammar", "nope"),
        (Structured(grammar="root ::= ((("), "grammar", "GBNF"),
        (Structured(grammar="start: A\nA: /a+/ & /(a|b)*/"), "grammar", "'&' is not allowed"),
        (Structured(grammar="start: " + "(" * 20000), "grammar", "nested"),
        (Structured(grammar="start: " + '"a"? ' * 10000), "grammar", "too big"),
        (Structured(), "structured", "exactly one"),
        (Structured(regex="a", choice=["a"]), "regex", "exactly one"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    engine: Engine, wanted: Structured, param: str, words: str
) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        grammars_of(engine).compile(wanted)
    assert caught.value.param == param and len(str(caught.value)) < 400


def test_keywords_that_cannot_be_enforced_are_ignored_unless_strict(engine: Engine) -> None:
    wanted = Structured(json={"enum": [1], "not": {"type": "null"}}, strict=False)
    assert answer(engine, wanted).text.strip() == "1"


def test_a_long_chain_of_rules_does_not_overflow_the_stack(engine: Engine) -> None:
    chain = "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(5000)) + '\nr5000: "ab"'
    wide = grammars(engine, max_grammar_bytes=2**17)
    request = ask(engine, processors=[wide.compile(Structured(grammar=chain))])
    assert run(engine, request)[0].text == "ab"


def test_compiling_that_takes_too_long_is_refused(engine: Engine) -> None:
    slow = Structured(grammar="start: " + '"a"? ' * 2500)
    with pytest.raises(RequestError, match=r"takes more than 0\.01 s"):
        grammars(engine, grammar_timeout_s=0.01).compile(slow)


def test_the_event_loop_goes_on_while_a_grammar_compiles(engine: Engine) -> None:
    source = Source("start: " + '"a"? ' * 2000 + '"b"', "guided_grammar")

    async def count() -> int:
        task = asyncio.create_task(grammars(engine).compile_async(source))
        turns = 0
        while not task.done():
            await asyncio.sleep(0.001)
            turns += 1
        task.result()
        return turns

    assert asyncio.run(count()) > 3


def test_an_answer_that_gets_too_complex_fails_alone_and_the_grammar_is_compiled_anew(engine: Engine) -> None:
    known = grammars(engine)
    source = Source('start: "b" ' + '"a"? ' * 2500, "guided_grammar")
    first = known.compile(source)
    assert known.compile(source) is first
    bad = ask(engine, name="bad", processors=[first])
    failed, fine = run(engine, bad, ask(engine, Structured(regex="ab"), name="good"))
    assert failed.completions[0].finish_reason == "error"
    assert (failed.completions[0].error or "").startswith("guided_grammar: ")
    assert fine.text == "ab"
    assert known.compile(source) is not first


def test_a_mask_that_does_not_come_ends_the_request(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = grammars_of(engine).compile(Structured(regex="abc")).processor()
    begun, released = threading.Event(), threading.Event()

    def slowly(*_: Any) -> None:
        begun.set()
        released.wait(10)

    monkeypatch.setattr(grammar_module, "MASK_TIMEOUT_S", 0.01)
    monkeypatch.setattr(grammar_module, "banned_tokens", slowly)
    processor.accept(ord("a"))
    begun.wait()
    with pytest.raises(RequestError, match="took over"):
        processor.apply(torch.zeros(engine.config.vocab_size))
    released.set()


def test_slow_masks_of_others_are_not_waited_for(engine: Engine) -> None:
    released = threading.Event()
    busy = [grammar_module._threads("mask").submit(released.wait, 10) for _ in range(2)]
    try:
        assert answer(engine, Structured(regex="abc")).text == "abc"
    finally:
        released.set()
    assert all(future.result() for future in busy)


def test_only_the_last_grammars_are_kept(engine: Engine) -> None:
    known = grammars(engine)
    first = known.compile(Structured(regex="x0"))
    for i in range(1, MAX_CACHED + 1):
        known.compile(Structured(regex=f"x{i}"))
    assert len(known._compiled) == MAX_CACHED
    assert known.compile(Structured(regex="x0")) is not first


def test_a_model_without_an_end_token_is_told_so(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "end_tokens", ())
    with pytest.raises(RequestError, match="end token"):
        grammars_of(engine)
