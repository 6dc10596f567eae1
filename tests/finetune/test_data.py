"""Loss weights land on what the assistant says, in any chat template; packing loses nothing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiny_models import CHAT_TEMPLATE, tiny_tokenizer
from tokenloom.errors import RequestError
from tokenloom.finetune.data import Report, Sample, SampleBuilder, load_samples, validate
from tokenloom.finetune.packing import pack
from tokenloom.text.tokenizer import Tokenizer

SPECIAL = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}

DROPS_OLD_THOUGHTS = """{%- for m in messages -%}
{%- set c = m.content.split('</think>')[-1] if not loop.last else m.content -%}
<|im_start|>{{ m.role }}
{{ c }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""
NO_END_TOKEN = """{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}\
{% if add_generation_prompt %}assistant:{% endif %}"""
WITH_TOOLS = """{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"""
NEEDS_USER_FIRST = (
    "{% if not messages or messages[0].role != 'user' %}{{ raise_exception('user must begin') }}{% endif %}"
    + CHAT_TEMPLATE
)


def tokenizer(template: str = CHAT_TEMPLATE) -> Tokenizer:
    return Tokenizer(tiny_tokenizer(), SPECIAL, {"default": template}, "tiny")


def learned(sample: Sample, tok: Tokenizer) -> str:
    """The text of the tokens with a weight."""
    ids = [token for token, weight in zip(sample.tokens, sample.weights, strict=True) if weight > 0]
    return tok.decode(ids, skip_special_tokens=False)


def build(row: dict[str, Any], tok: Tokenizer, max_tokens: int = 4096) -> Sample:
    sample = SampleBuilder(tok, max_tokens).build(row, Report())
    assert sample is not None
    return sample


def say(role: str, content: str, **keys: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **keys}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    file = path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


SPOKEN = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: "<|" not in text)


@given(st.lists(st.tuples(SPOKEN, SPOKEN), min_size=1, max_size=4))
def test_exactly_the_assistant_texts_and_their_end_tokens_are_learned(turns: list[tuple[str, str]]) -> None:
    tok = tokenizer()
    messages = [m for user, answer in turns for m in (say("user", user), say("assistant", answer))]
    sample = build({"messages": messages}, tok)
    assert learned(sample, tok) == "".join(answer + "<|im_end|>" for _, answer in turns)
    assert sample.weights[0] == 0


def test_the_tokens_are_those_of_the_whole_rendered_chat() -> None:
    tok = tokenizer()
    messages = [say("user", "in the cat"), say("assistant", "on the mat")]
    text = tok.render_chat(messages, add_generation_prompt=False)
    assert build({"messages": messages}, tok).tokens == tok.encode(text, add_special_tokens=False)


def test_weights_multiply_and_zero_leaves_out() -> None:
    tok = tokenizer()
    messages = [
        say("user", "a"),
        say("assistant", "first", weight=0),
        say("user", "b"),
        say("assistant", "second", weight=0.25),
        say("user", "c"),
        say("assistant", "third", weight=3),
    ]
    sample = build({"messages": messages}, tok)
    assert learned(sample, tok) == "second<|im_end|>third<|im_end|>"
    assert Counter(sample.weights)[0.25] == len(tok.encode("second<|im_end|>"))
    assert Counter(sample.weights)[3.0] == len(tok.encode("third<|im_end|>"))


def test_a_template_that_rewrites_old_turns_is_searched() -> None:
    tok = tokenizer(DROPS_OLD_THOUGHTS)
    messages = [
        say("user", "the answer"),
        say("assistant", "hm</think>the answer"),
        say("user", "go on"),
        say("assistant", "ah</think>done"),
    ]
    assert learned(build({"messages": messages}, tok), tok) == "ah</think>done<|im_end|>"
    messages[1]["content"] = "the answer"
    messages[0]["content"] = "x</think>the answer"
    assert learned(build({"messages": messages}, tok), tok) == "the answer<|im_end|>ah</think>done<|im_end|>"


def test_without_an_end_token_the_white_space_that_ends_the_turn_is_learned() -> None:
    tok = tokenizer(NO_END_TOKEN)
    row = {"messages": [say("user", "q"), say("assistant", "yes"), say("user", "r"), say("assistant", "no")]}
    assert learned(build(row, tok), tok) == " yes\n\n no\n\n"


def test_an_assistant_that_speaks_first_is_found_although_the_template_refuses_the_empty_chat() -> None:
    template = "{{ raise_exception('empty') if not messages }}" + CHAT_TEMPLATE
    tok = tokenizer(template)
    row = {"messages": [say("assistant", "welcome"), say("user", "hi"), say("assistant", "yes")]}
    assert learned(build(row, tok), tok) == "welcome<|im_end|>yes<|im_end|>"


def test_legacy_rows_learn_the_completion_and_the_end_token() -> None:
    tok = tokenizer()
    sample = build({"prompt": "the cat", "completion": " sat"}, tok)
    assert learned(sample, tok) == " sat<|im_end|>"
    assert tok.decode(sample.tokens, skip_special_tokens=False) == "the cat sat<|im_end|>"


def test_tools_are_learned_where_the_template_renders_them() -> None:
    tok = tokenizer(WITH_TOOLS)
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    row = {
        "messages": [say("user", "q"), {"role": "assistant", "tool_calls": [call]}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
    assert learned(build(row, tok), tok) == json.dumps([call]) + "<|im_end|>"


@pytest.mark.parametrize("key", ["tools", "functions"])
def test_tools_are_refused_where_the_template_ignores_them(tmp_path: Path, key: str) -> None:
    chat = {"messages": [say("user", "q"), say("assistant", "a")]}
    report = validate(write(tmp_path, chat, {**chat, key: [{"name": "f"}]}), tokenizer(), 100)
    assert report.problems[0].line == 2 and "does not render tools" in report.summary()


def test_tool_calls_are_refused_where_the_template_ignores_them(tmp_path: Path) -> None:
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
    }
    report = validate(write(tmp_path, {"messages": [say("user", "q"), call]}), tokenizer(), 100)
    assert "does not render tool calls" in report.summary()


def test_a_chat_that_the_template_refuses_is_a_problem_with_its_line(tmp_path: Path) -> None:
    good, bad = [say("user", "q"), say("assistant", "a")], [say("assistant", "a")]
    report = validate(
        write(tmp_path, {"messages": good}, {"messages": bad}), tokenizer(NEEDS_USER_FIRST), 100
    )
    assert report.problems[0].line == 2 and "user must begin" in report.summary()


def test_too_long_is_truncated_and_counted_and_what_has_no_target_left_is_dropped(tmp_path: Path) -> None:
    tok = tokenizer()
    file = write(
        tmp_path,
        {"prompt": "ab", "completion": "cd"},
        {"prompt": "ab", "completion": "c" * 40},
        {"prompt": "a" * 40, "completion": "cd"},
        {"messages": [say("user", "q"), say("assistant", "a", weight=0)]},
    )
    dataset = load_samples(file, tok, 20)
    assert (len(dataset.samples), dataset.truncated, dataset.dropped) == (2, 2, 2)
    assert [len(sample.tokens) for sample in dataset.samples] == [5, 20]
    report = validate(file, tok, 20)
    assert (report.examples, report.samples, report.truncated, report.dropped) == (4, 2, 2, 2)
    assert (report.tokens, report.trained_tokens) == (25, 3 + 18)
    assert "2 of 4 examples are too long and were truncated" in report.warnings


def test_a_file_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, {"messages": [say("user", "q"), say("assistant", "a", weight=0)]})
    assert validate(file, tokenizer(), 100).problems[0].code == "nothing_to_learn"


def test_loading_names_the_line_at_fault(tmp_path: Path) -> None:
    file = write(tmp_path, {"prompt": "a", "completion": "b"}, {"prompt": "a"})
    with pytest.raises(RequestError, match=r"line 2: `completion` is missing"):
        load_samples(file, tokenizer(), 100)


def test_samples_come_back_as_they_were_put_in(tmp_path: Path) -> None:
    rows = [{"prompt": "p" * i, "completion": "c" * (i + 1)} for i in range(5)]
    dataset = load_samples(write(tmp_path, *rows), tokenizer(), 100)
    builder = SampleBuilder(tokenizer(), 100)
    assert list(dataset.samples) == [builder.build(row, Report()) for row in rows]
    assert dataset.samples[-1] == dataset.samples[4] == dataset.samples[4:][0]


def of_lengths(lengths: list[int]) -> list[Sample]:
    return [Sample([0] * length, [1.0] * length) for length in lengths]


@given(st.lists(st.integers(1, 50), max_size=60))
def test_packing_is_first_fit_decreasing(lengths: list[int]) -> None:
    expected: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for window in expected:
            if sum(lengths[i] for i in window) + lengths[index] <= 50:
                window.append(index)
                break
        else:
            expected.append([index])
    assert pack(of_lengths(lengths), 50) == expected


def test_a_sample_longer_than_a_window_is_refused() -> None:
    with pytest.raises(RequestError, match="sample 1 has 9 tokens"):
        pack(of_lengths([3, 9]), 8)
