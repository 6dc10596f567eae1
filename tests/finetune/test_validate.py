"""Every way a training file can be wrong, with the line at fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tokenloom.finetune import jsonl
from tokenloom.finetune.data import MAX_PROBLEMS, Report, validate

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}
GOOD = {"messages": [USER, ANSWER]}
GOOD_LINE = json.dumps(GOOD).encode()


def report_of(path: Path, *lines: bytes) -> Report:
    file = path / "train.jsonl"
    file.write_bytes(b"\n".join(lines))
    return validate(file)


def chat(*messages: Any, **row: Any) -> dict[str, Any]:
    return {"messages": list(messages), **row}


BAD_ROWS: list[tuple[str, Any]] = [
    ("data_type", [GOOD]),
    ("data_type", "text"),
    ("data_type", chat("hi", ANSWER)),
    ("missing_messages_list", {}),
    ("missing_messages_list", chat()),
    ("missing_messages_list", {"messages": {"role": "user"}}),
    ("message_missing_key", chat({"content": "hi"}, ANSWER)),
    ("message_missing_key", chat({"role": "user"}, ANSWER)),
    ("message_unrecognized_key", chat({**USER, "colour": "red"}, ANSWER)),
    ("unrecognized_role", chat({"role": "robot", "content": "hi"}, ANSWER)),
    ("unrecognized_role", chat({"role": ["user"], "content": "hi"}, ANSWER)),
    ("missing_content", chat({"role": "user", "content": ""}, ANSWER)),
    ("missing_content", chat({"role": "user", "content": 3}, ANSWER)),
    ("missing_content", chat(USER, {"role": "assistant", "content": None})),
    ("missing_content", chat({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER)),
    ("example_missing_assistant_message", chat(USER)),
    ("weight_not_allowed", chat({**USER, "weight": 1}, ANSWER)),
    ("bad_weight", chat(USER, {**ANSWER, "weight": -1})),
    ("bad_weight", chat(USER, {**ANSWER, "weight": True})),
    ("bad_weight", chat(USER, {**ANSWER, "weight": "1"})),
    ("bad_tool_calls", chat(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]})),
    ("bad_tool_calls", chat(USER, {"role": "assistant", "tool_calls": {}})),
    ("bad_tool_calls", chat({**USER, "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}, ANSWER)),
    ("bad_tools", chat(USER, ANSWER, tools="search")),
    ("unrecognized_key", chat(USER, ANSWER, text="x")),
    ("missing_key", {"prompt": "a"}),
    ("missing_key", {"prompt": 1, "completion": "b"}),
    ("missing_content", {"prompt": "a", "completion": ""}),
    ("ambiguous_format", {**GOOD, "prompt": "a", "completion": "b"}),
    (
        "unsupported_format",
        {"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [ANSWER]},
    ),
]


@pytest.mark.parametrize(
    ("code", "row"), BAD_ROWS, ids=[f"{i}-{code}" for i, (code, _) in enumerate(BAD_ROWS)]
)
def test_a_bad_row_is_reported_with_its_line(tmp_path: Path, code: str, row: Any) -> None:
    report = report_of(tmp_path, GOOD_LINE, json.dumps(row).encode(), GOOD_LINE)
    assert [(problem.line, problem.code) for problem in report.problems] == [(2, code)]
    assert f"line 2: {report.problems[0].message}" in report.summary()


BAD_LINES = [
    ("invalid_json", b'{"messages": ['),
    ("invalid_json", b"\x00"),
    ("invalid_json", b"9" * 5000),
    ("wrong_encoding", b'{"messages": "\xff"}'),
    ("wrong_encoding", b'{"prompt": "\\ud800", "completion": "b"}'),
    ("not_finite", b'{"messages": NaN}'),
    ("not_finite", b'{"messages": -Infinity}'),
    ("not_finite", b'{"messages": 1e999}'),
    ("too_deep", b"[" * 65 + b"]" * 65),
    ("too_deep", b"[" * 500_000 + b"]" * 500_000),
    ("line_too_long", b'{"prompt": "' + b"a" * jsonl.MAX_LINE_BYTES + b'"}'),
]


@pytest.mark.parametrize(
    ("code", "line"), BAD_LINES, ids=[f"{i}-{code}" for i, (code, _) in enumerate(BAD_LINES)]
)
def test_an_unreadable_line_is_reported_and_the_next_still_read(
    tmp_path: Path, code: str, line: bytes
) -> None:
    report = report_of(tmp_path, GOOD_LINE, line, b"{}")
    assert [(problem.line, problem.code) for problem in report.problems] == [
        (2, code),
        (3, "missing_messages_list"),
    ]


def test_depth_up_to_the_limit_is_read() -> None:
    deep = b"[" * jsonl.MAX_DEPTH + b"]" * jsonl.MAX_DEPTH
    assert json.dumps(jsonl.parse(deep)).encode() == deep


def test_an_empty_file_is_a_problem_of_the_file(tmp_path: Path) -> None:
    assert report_of(tmp_path, b"", b"  ", b"").summary() == "the file holds no examples (empty_file)"


def test_blank_lines_count_as_lines_but_not_as_examples(tmp_path: Path) -> None:
    report = report_of(tmp_path, b"", GOOD_LINE, b"", b"{}")
    assert (report.examples, report.problems[0].line) == (2, 4)


def test_utf16_is_named(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes(GOOD_LINE.decode().encode("utf-16"))
    assert "UTF-16" in validate(file).summary()


def test_a_byte_order_mark_and_crlf_are_accepted(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD_LINE + b"\r\n" + GOOD_LINE + b"\r\n")
    assert validate(file).ok


def test_problems_are_counted_beyond_those_reported(tmp_path: Path) -> None:
    report = report_of(tmp_path, *[b"{}"] * 50)
    assert (len(report.problems), report.problem_count) == (MAX_PROBLEMS, 50)
    assert report.summary().endswith("and 30 more problems")


def test_few_examples_are_a_warning(tmp_path: Path) -> None:
    report = report_of(tmp_path, *[GOOD_LINE] * 9)
    assert report.ok and "only 9 examples" in report.warnings[0]
    assert not report_of(tmp_path, *[GOOD_LINE] * 10).warnings


@pytest.mark.parametrize(
    "row",
    [
        chat(USER, {**ANSWER, "weight": 0.25}),
        chat(USER, {**ANSWER, "weight": 0}, USER, ANSWER),
        chat({"role": "developer", "content": "be kind"}, {**USER, "name": "ann"}, ANSWER),
        chat(
            {"role": "user", "content": [{"type": "text", "text": "hi"}]}, ANSWER, parallel_tool_calls=False
        ),
        chat(
            USER,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": ""},
            ANSWER,
            tools=[{"type": "function", "function": {"name": "f"}}],
        ),
        chat(
            USER,
            {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
            functions=[{"name": "f"}],
        ),
        {"prompt": "", "completion": "b"},
    ],
)
def test_what_the_contract_allows_is_accepted(tmp_path: Path, row: dict[str, Any]) -> None:
    assert report_of(tmp_path, json.dumps(row).encode()).summary() == ""


def test_progress_sees_every_line_and_can_stop_the_reading(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes(b"{}\n" * 5)

    def stop_at_3(line: int) -> None:
        if line == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        validate(file, progress=stop_at_3)
