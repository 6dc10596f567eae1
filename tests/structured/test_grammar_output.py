"""A random model knows no grammar: what it writes under one fits because nothing else can be drawn."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import jsonschema
import pytest
from pydantic import BaseModel, Field

from grammar_rig import answer, ask, build_engine, run, tiny_files
from tiny_models import EOS_ID
from tokenloom.engine.engine import Engine
from tokenloom.models.loader import ModelFiles
from tokenloom.structured import Structured

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, Any] = {
    "person": PERSON,
    "union": {"anyOf": [{"type": "boolean"}, {"type": "null"}, {"type": "array", "maxItems": 0}]},
    "reference": {
        "$ref": "#/$defs/node",
        "$defs": {
            "leaf": {"type": "object", "properties": {"x": {"const": 1}}, "additionalProperties": False},
            "node": {
                "type": "object",
                "properties": {"left": {"$ref": "#/$defs/leaf"}, "right": {"$ref": "#/$defs/leaf"}},
                "required": ["left", "right"],
                "additionalProperties": False,
            },
        },
    },
    "pattern": {"type": "string", "pattern": "^[a-c]{2,5}-\\d{3}$"},
    "numbers": {
        "type": "array",
        "prefixItems": [{"type": "number", "minimum": -1, "maximum": 1, "multipleOf": 0.25}],
        "items": {"type": "integer", "minimum": 10, "maximum": 99},
        "minItems": 2,
        "maxItems": 3,
    },
}
REGEXES = [r"(ab|cd){2,4}!", r"\d{4}-\d{2}-\d{2}", r"[a-z]{3}( [A-Z]{2}){1,2}\n?", "é[à-ü]{1,3}😀"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return tiny_files(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(files: ModelFiles) -> Engine:
    return build_engine(files)


@pytest.mark.parametrize("name", SCHEMAS)
def test_json_parses_and_is_valid_under_its_schema(engine: Engine, name: str) -> None:
    [output] = run(engine, ask(engine, Structured(json=SCHEMAS[name]), n=4))
    for choice in output.completions:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.text), SCHEMAS[name])


def test_a_pydantic_model_is_a_schema(engine: Engine) -> None:
    class Point(BaseModel, extra="forbid"):
        x: int = Field(ge=0, le=9)
        y: bool

    Point.model_validate_json(answer(engine, Structured(json=Point)).text)


def test_any_json_object(engine: Engine) -> None:
    # A random model would seldom come to an end: an end of strings and objects is made likely.
    bias = {ord("}"): 8.0, ord('"'): 4.0}
    choice = answer(engine, Structured(json_object=True), logit_bias=bias, seed=1)
    assert choice.finish_reason == "stop" and isinstance(json.loads(choice.text), dict)


@pytest.mark.parametrize("regex", REGEXES)
def test_the_whole_answer_matches_a_regex(engine: Engine, regex: str) -> None:
    choice = answer(engine, Structured(regex=regex))
    assert choice.finish_reason == "stop" and re.fullmatch(regex, choice.text)


def test_the_answer_is_one_of_the_choices(engine: Engine) -> None:
    choices = ["yes", "no", 'perhaps "so"', "a\\b\n", "😀"]
    [output] = run(engine, ask(engine, Structured(choice=choices), n=8))
    texts = {choice.text for choice in output.completions}
    assert texts <= set(choices) and len(texts) > 1


@pytest.mark.parametrize(
    "grammar",
    ['start: sum\nsum: /[0-9]/ ("+" /[0-9]/){1,3}', 'root ::= d ("+" d)+\nd ::= [0-9]'],
    ids=["lark", "gbnf"],
)
def test_a_grammar_of_ones_own(engine: Engine, grammar: str) -> None:
    text = answer(engine, Structured(grammar=grammar), logit_bias={EOS_ID: 2.0}).text
    assert re.fullmatch(r"\d(\+\d)+", text)


def test_greedy_takes_the_most_likely_token_that_is_allowed(engine: Engine) -> None:
    free = answer(engine, temperature=0.0, max_tokens=1, logprobs=20)
    likeliest = [token for token, _ in free.logprobs[0].top if token < 128 and chr(token).isprintable()]
    letters = [chr(token) for token in likeliest[1:3]]
    chosen = answer(engine, Structured(choice=letters), temperature=0.0, logprobs=2)
    assert chosen.text == letters[0]
    assert chosen.logprobs[0].top == free.logprobs[0].top[:2]  # the model's own, before the mask


def test_an_answer_ends_where_nothing_can_follow(engine: Engine) -> None:
    choice = answer(engine, Structured(regex="ab"), ignore_eos=True, min_tokens=10)
    assert (choice.text, choice.finish_reason, choice.token_ids) == ("ab", "stop", [97, 98])


def test_the_end_token_waits_until_the_grammar_allows_it(engine: Engine) -> None:
    choice = answer(engine, Structured(regex="abc+"), logit_bias={EOS_ID: 100.0})
    assert (choice.text, choice.finish_reason, choice.token_ids[-1]) == ("abc", "stop", EOS_ID)


def test_min_tokens_does_not_draw_what_the_grammar_bans(engine: Engine) -> None:
    choice = answer(engine, Structured(grammar='start: "a" <|im_end|>'), min_tokens=5)
    assert (choice.text, choice.finish_reason) == ("a", "stop")


def test_an_answer_that_is_cut_says_so(engine: Engine) -> None:
    choice = answer(engine, Structured(regex="a{9}"), max_tokens=4)
    assert (choice.text, choice.finish_reason) == ("aaaa", "length")


def test_a_stop_string_still_stops(engine: Engine) -> None:
    choice = answer(engine, Structured(regex="abcdef"), stop="cd")
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("ab", "stop", "cd")


def test_choices_go_their_own_ways_and_a_seed_repeats_them(engine: Engine) -> None:
    wanted = Structured(json=PERSON)
    [first], [second] = (run(engine, ask(engine, wanted, n=2, seed=7)) for _ in range(2))
    assert [c.text for c in first.completions] == [c.text for c in second.completions]
    assert first.completions[0].text != first.completions[1].text


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guesses_change_nothing(engine: Engine, temperature: float) -> None:
    wanted = Structured(regex="(abc|abd|xyz){12}")
    plain = run(engine, ask(engine, wanted, temperature=temperature))[0]
    draft = "ngram(fixed=True)"
    drafted = run(engine, ask(engine, wanted, temperature=temperature, draft=draft))[0]
    assert drafted.completions[0].token_ids == plain.completions[0].token_ids
    assert drafted.completions[0].finish_reason == "stop"
    assert drafted.drafts is not None and drafted.drafts.accepted > 0


def test_preempted_and_chunked_equals_undisturbed(files: ModelFiles, engine: Engine) -> None:
    wanted = Structured(regex="[a-c]{90}")
    requests = [ask(engine, wanted, name=f"r{i}", seed=i, prompt=[*range(40 + i, 60 + i)]) for i in range(3)]
    tight = build_engine(files, cache__kv_bytes=40 * 4096, scheduler__max_batch_tokens=9)
    expected = [run(engine, request)[0].text for request in requests]
    again = [ask(tight, wanted, name=f"r{i}", seed=i, prompt=[*range(40 + i, 60 + i)]) for i in range(3)]
    assert [output.text for output in run(tight, *again)] == expected
    assert tight.stats().preemptions > 0


def test_who_asks_for_nothing_gets_what_it_gets_alone(engine: Engine) -> None:
    alone = answer(engine, max_tokens=20)
    together = run(engine, ask(engine, max_tokens=20), ask(engine, Structured(json=PERSON), name="grammar"))[
        0
    ]
    assert together.completions[0] == alone


def test_the_library_is_not_imported_before_somebody_needs_it() -> None:
    script = "import sys, tokenloom.llm; print('llguidance' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
