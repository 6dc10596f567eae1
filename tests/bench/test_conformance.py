"""The conformance report: that it is current, and how it judges a field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import httpx
import openai
import pytest
from typing_extensions import Required, TypedDict

import conformance
from conformance_probes import Operation, judge
from conformance_samples import fields_of, samples


class Inner(TypedDict, total=False):
    kind: Required[Literal["x", "y"]]
    size: int


class Params(TypedDict, total=False):
    choice: Literal["a", "b"]
    number: int | None
    inner: Inner
    model: Required[str]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # a method of the client, sent all the same
def test_the_report_in_the_docs_is_current(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = conformance.REPORT.read_text()
    if f"`openai` {openai.__version__} " not in written:
        pytest.skip("it was made with another version of the client")
    from tiny_models import build_tiny
    from tuning_server import start

    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path / "home"))
    server = start(build_tiny(tmp_path)[0])
    try:
        assert conformance.report(server.http, "tiny") == written
    finally:
        server.stop()


def test_samples_are_one_for_each_alternative_with_the_required_keys() -> None:
    assert list(fields_of(Params)) == ["model", "choice", "inner", "number"]
    assert samples(Literal["a", "b"] | int | None) == ["a", "b", 2]
    assert samples(list[Inner]) == [[{"kind": "x"}]]
    assert samples(dict[str, float]) == [{"1": 0.5}]


def _refusing(taken: Callable[[object], bool]) -> httpx.Client:
    """A server that takes a body if `taken(choice)`."""

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if "choice" not in body or taken(body["choice"]):
            return httpx.Response(200, json={})
        return httpx.Response(400, json={"error": {"message": "choice: no"}})

    return httpx.Client(transport=httpx.MockTransport(answer), base_url="http://x")


@pytest.mark.parametrize(
    ("taken", "kind", "note"),
    [
        (lambda value: value in ("a", "b"), "supported", ""),
        (lambda value: value == "a", "in part", '`"a"`; not `"b"`'),
        (lambda value: True, "ignored", ""),
        (lambda value: isinstance(value, dict), "refused", "choice: no"),
    ],
)
def test_a_field_is_judged_by_what_is_taken(taken, kind: str, note: str) -> None:
    operation = Operation("POST", "/x", fields_of(Params), {"model": "m"})
    with _refusing(taken) as server:
        verdict = judge(server, operation, "choice")
    assert (verdict.kind, verdict.note) == (kind, note)
