"""/v1/batches as OpenAI's client drives it, over a fake engine that spells the alphabet."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from batch_site import CHAT, Site, chat, request
from fake_engine import FakeEngine
from running import Running, settings, wait_for
from tokenloom.engine.async_engine import EngineBusyError
from tokenloom.finetune.errors import StorageFullError
from tokenloom.serve.batches.asking import PRIORITY
from tokenloom.serve.batches.store import BatchStore
from tokenloom.serve.jobs import open_jobs


@pytest.fixture
def site(serve, tmp_path, monkeypatch) -> Iterator[Callable[..., Site]]:
    """`site(step_s=0.1)` opens the home folder of this test; one at a time can have it."""
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path / "home"))
    opened: list[Site] = []

    def start(**flags: Any) -> Site:
        opened.append(Site(serve(jobs=True, coserve__mode="off", **flags)))
        return opened[-1]

    yield start
    for one in opened:
        one.client.close()


@pytest.fixture(scope="module")
def one_site(tmp_path_factory) -> Iterator[Site]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENLOOM_HOME", str(tmp_path_factory.mktemp("batches")))
        engine = FakeEngine(settings(coserve__mode="off", batches__max_concurrent=2, batches__max_lines=25))
        server = Running(engine, jobs=open_jobs(engine, engine.settings))
    site = Site(server)
    yield site
    site.client.close()
    server.stop()


@pytest.fixture
def here(one_site) -> Site:
    """One server for all tests that need no other; its engine does nothing wrong yet."""
    one_site.engine.behave()
    return one_site


def text_of(answer: dict[str, Any]) -> str:
    return answer["response"]["body"]["choices"][0]["message"]["content"]


def test_a_batch_is_answered_in_the_order_of_its_lines(here):
    batch = here.run([chat(f"r{i}", tokens=1 + i % 3) for i in range(20)], metadata={"a": "b"})
    assert (batch.status, batch.metadata, batch.model, batch.errors) == (
        "completed",
        {"a": "b"},
        "fake",
        None,
    )
    assert dict(batch.request_counts) == {"total": 20, "completed": 20, "failed": 0}
    answers = here.read(batch.output_file_id)
    assert [answer["custom_id"] for answer in answers] == [f"r{i}" for i in range(20)]
    assert [text_of(answer) for answer in answers] == ["abc"[: 1 + i % 3] for i in range(20)]
    assert {answer["response"]["status_code"] for answer in answers} == {200}
    assert batch.error_file_id is None
    times = [batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at]
    assert times == sorted(times)


def test_usage_is_that_of_all_answers(here):
    batch = here.run([chat("one", tokens=2), chat("two", tokens=5), chat("bad", temperature=9)])
    usages = [answer["response"]["body"]["usage"] for answer in here.read(batch.output_file_id)]
    assert batch.usage.output_tokens == 7
    assert batch.usage.input_tokens == sum(usage["prompt_tokens"] for usage in usages)
    assert batch.usage.input_tokens_details.cached_tokens == 6


@pytest.mark.parametrize(
    ("url", "body", "read"),
    [
        ("/v1/completions", {"prompt": "hi", "max_tokens": 2}, lambda b: b["choices"][0]["text"] == "ab"),
        ("/v1/embeddings", {"input": "hi"}, lambda b: b["data"][0]["embedding"] == [2.0, 0.5, -1.25]),
        (
            "/v1/responses",
            {"input": "hi", "max_output_tokens": 2},
            lambda b: b["output"][0]["content"][0]["text"] == "ab",
        ),
    ],
)
def test_the_other_endpoints(here, url, body, read):
    batch = here.run([request(url, **body)], endpoint=url)
    [answer] = here.read(batch.output_file_id)
    assert read(answer["response"]["body"])


def test_bad_lines_fail_alone_with_the_answer_that_http_would_give(here):
    batch = here.run([chat("good"), chat("bad", temperature=9), chat("lost", model="nope"), chat("fine")])
    assert batch.status == "completed"
    assert dict(batch.request_counts) == {"total": 4, "completed": 2, "failed": 2}
    assert [answer["custom_id"] for answer in here.read(batch.output_file_id)] == ["good", "fine"]
    bad, lost = (answer["response"] for answer in here.read(batch.error_file_id))
    assert (bad["status_code"], bad["body"]["error"]["param"]) == (400, "temperature")
    assert (lost["status_code"], lost["body"]["error"]["code"]) == (404, "model_not_found")
    assert bad["request_id"].startswith("req_")


def test_a_line_on_which_the_engine_fails_takes_no_other_along(here):
    here.engine.fail_at = 4
    batch = here.run([chat("one"), chat("long", tokens=8), chat("two")])
    assert [answer["custom_id"] for answer in here.read(batch.output_file_id)] == ["one", "two"]
    [failed] = here.read(batch.error_file_id)
    assert failed["response"]["status_code"] == 500


def test_faulty_lines_are_told_by_number_and_nothing_runs(here):
    good = chat("good")
    lines = [
        good,
        "{nonsense",
        "[]",
        "",
        good | {"custom_id": ""},
        good | {"custom_id": "x", "url": "/v1/embeddings"},
        good | {"custom_id": "y", "method": "GET"},
        good | {"custom_id": "z", "body": 3},
        good,
        chat("s", stream=True),
        chat("b", background=True),
    ]
    batch = here.run(lines)
    assert batch.status == "failed" and batch.failed_at
    assert [(fault.line, fault.code, fault.param) for fault in batch.errors.data] == [
        (2, "invalid_json", None),
        (3, "invalid_line", None),
        (5, "missing_custom_id", "custom_id"),
        (6, "mismatched_url", "url"),
        (7, "invalid_method", "method"),
        (8, "invalid_body", "body"),
        (9, "duplicate_custom_id", "custom_id"),
        (10, "invalid_body", "body.stream"),
        (11, "invalid_body", "body.background"),
    ]
    assert here.engine.calls == []


@pytest.mark.parametrize(
    ("lines", "code"), [([], "empty_file"), ([chat(str(i)) for i in range(26)], "too_many_lines")]
)
def test_a_file_with_too_little_or_too_much_is_refused(here, lines, code):
    batch = here.run(lines)
    assert [(fault.code, fault.line) for fault in batch.errors.data] == [(code, None)]


def test_cancelling_keeps_what_was_answered_and_accounts_for_the_rest(here):
    here.engine.behave(step_s=0.02)
    batch = here.start([chat("quick", tokens=1), *(chat(f"slow{i}", tokens=400) for i in range(5))])
    wait_for(lambda: here.client.batches.retrieve(batch.id).request_counts.completed == 1)
    assert here.client.batches.cancel(batch.id).status == "cancelling"
    batch = here.until_over(batch)
    assert batch.status == "cancelled" and batch.cancelled_at >= batch.cancelling_at
    assert [answer["custom_id"] for answer in here.read(batch.output_file_id)] == ["quick"]
    rest = here.read(batch.error_file_id)
    assert [answer["custom_id"] for answer in rest] == [f"slow{i}" for i in range(5)]
    assert {answer["error"]["code"] for answer in rest} == {"batch_cancelled"}
    assert here.engine.running == 0


def test_a_batch_is_cancelled_before_its_turn(here):
    here.engine.behave(step_s=0.02)
    first = here.start([chat("slow", tokens=400)])
    wait_for(lambda: here.engine.calls)
    second = here.start([chat("never")])
    wait_for(lambda: here.client.batches.retrieve(second.id).status == "in_progress")
    here.client.batches.cancel(second.id)
    assert dict(here.until_over(second).request_counts) == {"total": 1, "completed": 0, "failed": 1}
    assert here.client.batches.retrieve(first.id).status == "in_progress"
    here.client.batches.cancel(first.id)
    assert here.until_over(first).status == "cancelled"


def test_a_batch_that_is_over_cannot_be_cancelled(here):
    batch = here.run([chat("a")])
    with pytest.raises(openai.BadRequestError) as refused:
        here.client.batches.cancel(batch.id)
    assert refused.value.code == "invalid_state"


def test_a_batch_expires(site, tmp_path: Path):
    here = site(step_s=0.02, server__drain_timeout_s=0)
    batch = here.start([chat("slow", tokens=400)])
    wait_for(lambda: here.client.batches.retrieve(batch.id).status == "in_progress")
    here.server.stop()
    with sqlite3.connect(tmp_path / "home" / "jobs.sqlite") as connection:
        connection.execute("UPDATE batches SET expires_at = ?", (int(time.time()) - 1,))
    connection.close()
    later = site(step_s=0.02)
    batch = later.until_over(batch)
    assert batch.status == "expired" and batch.expired_at
    assert [answer["error"]["code"] for answer in later.read(batch.error_file_id)] == ["batch_expired"]


def test_a_restart_goes_on_where_it_was(site):
    here = site(step_s=0.01, batches__max_concurrent=2, server__drain_timeout_s=0)
    lines = [chat(f"r{i}", tokens=3 if i < 4 else 300) for i in range(8)]
    batch = here.start(lines)
    wait_for(lambda: here.client.batches.retrieve(batch.id).request_counts.completed == 4)
    here.server.stop()
    later = site()
    batch = later.until_over(batch)
    assert dict(batch.request_counts) == {"total": 8, "completed": 8, "failed": 0}
    assert len(later.engine.calls) == 4
    answers = later.read(batch.output_file_id)
    assert [answer["custom_id"] for answer in answers] == [f"r{i}" for i in range(8)]


def test_a_full_disk_delays_answers_and_loses_none(here, monkeypatch):
    monkeypatch.setattr("tokenloom.serve.batches.background.RETRY_S", 0.01)
    record, failures = BatchStore.record, iter([True, True])

    def full_at_first(self: BatchStore, *args: Any) -> None:
        if next(failures, False):
            raise StorageFullError("the disk of the job database is full")
        record(self, *args)

    monkeypatch.setattr(BatchStore, "record", full_at_first)
    batch = here.run([chat(f"r{i}") for i in range(5)])
    assert [a["custom_id"] for a in here.read(batch.output_file_id)] == [f"r{i}" for i in range(5)]


def test_a_full_queue_delays_a_line(here, monkeypatch):
    monkeypatch.setattr("tokenloom.serve.batches.asking.RETRY_S", 0.01)
    here.engine.refuse = EngineBusyError("full")
    batch = here.start([chat("a")])
    wait_for(lambda: here.client.batches.retrieve(batch.id).status == "in_progress")
    here.engine.refuse = None
    assert here.until_over(batch).request_counts.completed == 1


def test_lines_wait_while_other_requests_do(here):
    here.engine.counters.waiting = 1
    batch = here.start([chat("a")])
    wait_for(lambda: here.client.batches.retrieve(batch.id).status == "in_progress")
    time.sleep(0.2)
    assert here.engine.calls == []
    here.engine.counters.waiting = 0
    assert here.until_over(batch).status == "completed"


def test_lines_have_the_lowest_priority_and_bounded_concurrency(here):
    here.engine.behave(step_s=0.03)
    here.run([chat(f"r{i}", priority=-5) for i in range(9)])
    assert here.engine.most_running == 2
    assert {call.priority for call in here.engine.calls} == {PRIORITY}


def test_the_input_file_stays_until_the_batch_is_over(here):
    here.engine.behave(step_s=0.02)
    batch = here.start([chat("slow", tokens=400)])
    with pytest.raises(openai.BadRequestError) as refused:
        here.client.files.delete(batch.input_file_id)
    assert refused.value.code == "file_in_use"
    here.client.batches.cancel(batch.id)
    here.until_over(batch)
    assert here.client.files.delete(batch.input_file_id).deleted


def test_an_input_file_that_is_gone_from_disk_ends_the_batch(site, tmp_path: Path):
    here = site()
    here.engine.counters.waiting = 1
    batch = here.start([chat("a")])
    wait_for(lambda: here.client.batches.retrieve(batch.id).status == "in_progress")
    here.server.stop()
    (tmp_path / "home" / "files" / batch.input_file_id).unlink()
    later = site()
    batch = later.until_over(batch)
    assert (batch.status, batch.errors.data[0].code) == ("failed", "file_unreadable")


def test_output_files_expire_as_asked(here):
    expiry = {"anchor": "created_at", "seconds": 3600}
    batch = here.run([chat("a")], output_expires_after=expiry)
    file = here.client.files.retrieve(batch.output_file_id)
    assert (file.purpose, file.expires_at - file.created_at) == ("batch_output", 3600)


def test_listing_goes_page_by_page_newest_first(here):
    file = here.upload([chat("a")])
    ids = [
        here.client.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h").id
        for _ in range(5)
    ]
    page = here.client.batches.list(limit=2)
    assert page.has_more and [batch.id for batch in page.data] == ids[:2:-1]
    assert [batch.id for batch in page][:5] == ids[::-1]  # fetches the other pages


def test_the_same_idempotency_key_gives_the_same_batch(here):
    fields = {"input_file_id": here.upload([chat("a")]), "endpoint": CHAT, "completion_window": "24h"}
    first, second = (
        here.client.batches.create(**fields, extra_headers={"Idempotency-Key": "k"}).id for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input_file_id": "file-none"}, "input_file_id"),
        ({"endpoint": "/v1/moderations"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
    ],
)
def test_faulty_fields_are_named(here, fields, param):
    file = here.upload([chat("a")]) if "input_file_id" not in fields else ""
    body = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h", **fields}
    error = here.server.http.post("/v1/batches", json=body).json()["error"]
    assert error["param"] == param


def test_a_file_of_another_purpose_is_refused(here):
    file = here.upload([chat("a")], purpose="user_data")
    with pytest.raises(openai.BadRequestError) as refused:
        here.client.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h")
    assert (refused.value.param, refused.value.code) == ("input_file_id", "wrong_purpose")


def test_an_unknown_batch_is_a_404(here):
    with pytest.raises(openai.NotFoundError):
        here.client.batches.retrieve("batch_" + "0" * 24)
