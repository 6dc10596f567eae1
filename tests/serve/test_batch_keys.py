"""A batch belongs to the key that made it: its lines keep that key's limits, and are counted as its own."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from batch_site import CHAT, Site, chat, request
from running import assert_error, settings, wait_for
from tokenloom.serve import key_limits, key_ring
from tokenloom.serve.batches import asking
from tokenloom.serve.batches.accounts import Accounts
from tokenloom.serve.batches.asking import Asker
from tokenloom.serve.batches.inner_app import Reply
from tokenloom.serve.key_limits import Meter, Meters
from tokenloom.serve.key_ring import KeyRing
from tokenloom.serve.key_store import KeyStore


class Clock:
    """Of all limits; it stands still unless it is told to go on."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(key_limits, "Meter", lambda account: Meter(account, clock))
    monkeypatch.setattr(asking, "RETRY_S", 0.01)
    return clock


@pytest.fixture
def start(serve, tmp_path, monkeypatch) -> Iterator[Callable[..., Any]]:
    """`start("one", "boss", limits__key_rpm=2)` is a server's sites for these keys; "boss" is an admin's."""
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(key_ring, "REFRESH_S", 0.0)
    opened: list[Site] = []

    def start(*keys: str, **flags: Any) -> list[Site]:
        flags = {"server__api_keys": ["one", "two"], "server__admin_keys": ["boss"], **flags}
        server = serve(jobs=True, coserve__mode="off", **flags)
        opened.extend(Site(server, key) for key in keys)
        return opened[-len(keys) :]

    yield start
    for site in opened:
        site.client.close()


def ask(site: Site, **fields: Any) -> httpx.Response:
    body = {**chat("x", tokens=1)["body"], **fields}
    headers = {"authorization": f"Bearer {site.client.api_key}"}
    return site.server.http.post(CHAT, json=body, headers=headers)


def counted(site: Site, name: str, labels: str) -> float:
    headers = {"authorization": f"Bearer {site.client.api_key}"}
    text = site.server.http.get("/metrics", headers=headers).text
    found = re.search(rf"tokenloom:{name}_total{{{labels}}} (\S+)", text)
    return float(found[1]) if found else 0.0


def completed(boss: Site, batch: Any) -> int:
    return boss.client.batches.retrieve(batch.id).request_counts.completed


def test_lines_are_counted_as_requests_and_tokens_of_the_key(start):
    two, boss = start("two", "boss")
    batch = two.start([chat("a", tokens=2), chat("b", tokens=5), chat("bad", temperature=9)])
    usage = boss.until_over(batch).usage
    assert counted(boss, "key_requests", 'key="api-2"') == 2 + 3  # an upload, a batch, and three lines
    assert counted(boss, "key_tokens", 'key="api-2",kind="prompt"') == usage.input_tokens > 0
    assert counted(boss, "key_tokens", 'key="api-2",kind="completion"') == 7


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/embeddings", "/v1/responses"])
def test_lines_of_every_endpoint_are_counted(start, endpoint):
    one, boss = start("one", "boss")
    body = {"input": "hi", "prompt": "hi"}
    body.pop("input" if endpoint == "/v1/completions" else "prompt")
    batch = boss.until_over(one.start([request(endpoint, **body)], endpoint))
    assert batch.request_counts.completed == 1
    assert counted(boss, "key_tokens", 'key="api-1",kind="prompt"') == batch.usage.input_tokens > 0


def test_lines_over_the_requests_of_a_key_wait_and_none_is_lost(start, clock):
    one, boss = start("one", "boss", limits__key_rpm=4, batches__max_concurrent=3)
    batch = one.start([chat(f"r{i}") for i in range(6)])  # after an upload, two requests are left
    wait_for(lambda: completed(boss, batch) == 2)
    for seconds, more in ((15, 1), (30, 2)):
        time.sleep(0.1)
        before = len(boss.engine.calls)
        clock.now += seconds
        wait_for(lambda n=before + more: completed(boss, batch) == n)
    clock.now += 60
    batch = boss.until_over(batch)
    assert [answer["custom_id"] for answer in boss.read(batch.output_file_id)] == [f"r{i}" for i in range(6)]
    assert batch.error_file_id is None
    assert len(boss.engine.calls) == 6
    assert counted(boss, "key_refused", 'key="api-1",limit="requests"') == 0


def test_lines_over_the_tokens_of_a_key_wait(start, clock):
    one, boss = start("one", "boss", limits__key_tpm=60, batches__max_concurrent=1)
    batch = one.start([chat("long", tokens=100), chat("short", tokens=1)])
    wait_for(lambda: completed(boss, batch) == 1)
    clock.now += 30
    time.sleep(0.1)
    assert completed(boss, batch) == 1
    clock.now += 120
    assert boss.until_over(batch).request_counts.completed == 2


def test_a_key_that_waits_does_not_hold_up_the_batches_of_another(start, clock):
    one, two, boss = start("one", "two", "boss", limits__key_rpm=3, batches__max_concurrent=1)
    waiting = one.start([chat(f"r{i}") for i in range(9)])
    wait_for(lambda: completed(boss, waiting) == 1)
    assert boss.until_over(two.start([chat("a")])).status == "completed"
    assert boss.client.batches.retrieve(waiting.id).status == "in_progress"


def test_a_long_batch_does_not_hold_up_that_of_another_key(start):
    one, two, boss = start("one", "two", "boss", batches__max_concurrent=2)
    boss.engine.behave(step_s=0.01)
    long = one.start([chat(f"r{i}", tokens=20) for i in range(500)])
    wait_for(lambda: completed(boss, long) > 0)
    assert boss.until_over(two.start([chat("a")])).status == "completed"
    assert boss.engine.most_running == 2
    assert boss.client.batches.cancel(long.id).status == "cancelling"
    assert boss.until_over(long).status == "cancelled"


def test_what_lines_take_is_missing_for_requests_of_the_key(start, clock):
    one, boss = start("one", "boss", limits__key_rpm=3)
    batch = one.start([chat("a")])
    boss.until_over(batch)
    assert_error(ask(one), 429, None, "rate_limit_exceeded")


def test_lines_are_not_among_the_requests_that_may_be_at_work(start):
    one, boss = start("one", "boss", limits__key_max_concurrent=1, batches__max_concurrent=3)
    boss.engine.behave(step_s=0.02)
    batch = one.start([chat(f"r{i}", tokens=30) for i in range(3)])
    wait_for(lambda: boss.engine.running == 3)
    assert ask(one).status_code == 200
    assert boss.until_over(batch).request_counts.completed == 3


def test_lines_find_the_cached_prefixes_of_their_key_only(start):
    one, two, boss = start("one", "two", "boss")
    ask(one, cache_salt="x")
    boss.until_over(one.start([chat("a", cache_salt="x")]))
    boss.until_over(two.start([chat("a", cache_salt="x")]))
    own, line, other = (call.cache_salt for call in boss.engine.calls)
    assert own == line != other


def test_without_keys_lines_are_nobodys(start):
    [site] = start("none", server__api_keys=[], server__admin_keys=[], limits__key_rpm=1)
    assert site.run([chat(f"r{i}") for i in range(3)]).request_counts.completed == 3
    assert "key_requests_total{" not in site.server.http.get("/metrics").text
    assert site.engine.calls[0].cache_salt is None


def test_the_rest_of_the_lines_of_a_revoked_key_are_refused(start, tmp_path):
    store = KeyStore(tmp_path / "keys.sqlite")
    record, key = store.create()
    mine, boss = start(key, "boss", store=store, batches__max_concurrent=2)
    boss.engine.behave(step_s=0.02)
    batch = mine.start([chat("begun", tokens=40), *(chat(f"r{i}", tokens=4) for i in range(600))])
    wait_for(lambda: completed(boss, batch) >= 2)
    store.revoke(record.id)
    batch = boss.until_over(batch)
    assert batch.status == "completed"
    done, refused = boss.read(batch.output_file_id), boss.read(batch.error_file_id)
    assert done[0]["custom_id"] == "begun"
    assert len(done) + len(refused) == 601
    assert {answer["error"]["code"] for answer in refused} == {"invalid_api_key"}
    assert len(boss.engine.calls) == len(done)


def test_a_key_that_waits_for_its_limits_can_be_revoked(start, clock, tmp_path):
    store = KeyStore(tmp_path / "keys.sqlite")
    record, key = store.create(rpm=3)
    mine, boss = start(key, "boss", store=store)
    batch = mine.start([chat("a"), chat("b")])
    wait_for(lambda: completed(boss, batch) == 1)
    store.revoke(record.id)
    batch = boss.until_over(batch)
    assert dict(batch.request_counts) == {"total": 2, "completed": 1, "failed": 1}


def test_a_restart_remembers_whose_batch_it_is(start):
    one, boss = start("one", "boss", server__drain_timeout_s=0)
    boss.engine.counters.waiting = 1
    batch = one.start([chat("a")])
    wait_for(lambda: boss.client.batches.retrieve(batch.id).status == "in_progress")
    boss.server.stop()
    [later] = start("boss")
    later.until_over(batch)
    assert counted(later, "key_tokens", 'key="api-1",kind="completion"') == 3


def test_an_answer_that_says_when_to_come_again_is_taken_at_its_word(monkeypatch):
    monkeypatch.setattr(asking, "RETRY_S", 0.01)
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(asking.asyncio, "sleep", sleep)
    replies = [Reply(429, "", {}, 7.0), Reply(429, "", {}), Reply(503, "", {}), Reply(200, "req", {})]

    async def ask(endpoint: str, body: Any, meter: Any) -> Reply:
        return replies.pop(0)

    accounts = Accounts(KeyRing(settings()), Meters())
    batch, line = SimpleNamespace(account=None, endpoint=CHAT), SimpleNamespace(body={})
    asker = Asker(ask, accounts, lambda: True, 1)
    assert asyncio.run(asker.answer(batch, line)).status == 200  # type: ignore[arg-type]
    assert slept == [7.0, 0.01, asking.LOOK_S]
