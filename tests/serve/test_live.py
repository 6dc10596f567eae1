"""GET /live: snapshots of what the engine does, over the fake engine and over a real one."""

import asyncio
import json
import socket
import threading
import time

import httpx
import pytest

import tokenloom.serve.live as live
from running import assert_error, wait_for
from tokenloom.engine.composition import Rows
from tokenloom.engine.overview import BlocksOverview, Overview, TrainingOverview
from tuning_server import client_of, create, rows, start, upload

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "secret words"}], "ignore_eos": True}
KV = "snapkv(budget=64)"


def once(server, **headers):
    response = server.http.get("/live", params={"once": True}, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()


def snapshots(response):
    """The snapshots of an open stream, as they come."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def test_a_snapshot_is_what_the_metrics_count(serve):
    server = serve(slo__ttft_ms=150, slo__tpot_ms=50)
    counters = server.engine.counters
    counters.running, counters.waiting, counters.generation_tokens = 4, 2, 30
    for seconds in (0.1, 0.2):
        counters.ttft.add(seconds, time.monotonic())
    seen = once(server)
    assert (seen["model"], seen["status"], seen["running"], seen["waiting"]) == ("fake", "ready", 4, 2)
    assert seen["totals"]["generation_tokens"] == 30
    assert seen["ttft"] == {
        "target_ms": 150,
        "window_s": 60,
        "count": 2,
        "p50_ms": pytest.approx(150),
        "p90_ms": pytest.approx(190),
        "p99_ms": pytest.approx(199),
        "within": 0.5,
    }
    assert seen["itl"]["count"] == 0 and seen["itl"]["p50_ms"] is None and seen["itl"]["target_ms"] == 50


def test_latencies_of_long_ago_are_left_out(serve):
    server = serve()
    server.engine.counters.ttft.add(0.1, time.monotonic() - 2 * live.WINDOW_S)
    assert once(server)["ttft"]["count"] == 0


def test_a_large_pool_is_mapped_by_cells_of_what_most_of_their_blocks_are(serve):
    server = serve()
    letters = "rrt" + "fff" + "ccf" * (live.MAX_CELLS - 3) + "t"
    server.engine.seen = Overview([], 0, BlocksOverview(16, letters), [TrainingOverview(3, 1.5)], True, [])
    seen = once(server)
    blocks = seen["blocks"]
    assert (blocks["total"], blocks["running"], blocks["training"]) == (len(letters), 2, 2)
    assert blocks["blocks_per_cell"] == 3
    assert blocks["map"] == "rf" + "c" * (live.MAX_CELLS - 3) + "t"
    assert seen["trainings"] == [{"step": 3, "loss": 1.5}] and seen["profiling"] is True


def test_a_stream_brings_a_snapshot_each_interval_and_each_second_of_rows_once(serve):
    server = serve()
    blocks = BlocksOverview(16, "f")
    server.engine.seen = Overview([], 0, blocks, [], False, [Rows(7, 1, 2, 3, 4, 5, 6.5), Rows(8)])
    with server.http.stream("GET", "/live", params={"interval_s": 0.25}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        events = snapshots(response)
        first = next(events)
        server.engine.seen = Overview([], 0, blocks, [], False, [Rows(8), Rows(9)])
        new = [second["at_s"] for second, _ in zip(next(events)["seconds"], range(9), strict=False)]
        while not new:  # the one snapshot may have been built before
            new = [second["at_s"] for second in next(events)["seconds"]]
    assert first["seconds"][0] == {
        "at_s": 7,
        "iterations": 1,
        "prefill": 2,
        "decode": 3,
        "drafted": 4,
        "training": 5,
        "busy_ms": 6.5,
    }
    assert [second["at_s"] for second in first["seconds"]] == [7, 8] and new == [9]


def test_nothing_is_built_when_nobody_listens(serve, monkeypatch):
    built = []
    build = live.Live.build
    monkeypatch.setattr(live.Live, "build", lambda self: built.append(1) or build(self))
    server = serve()
    with server.http.stream("GET", "/live", params={"interval_s": 0.25}) as response:
        next(snapshots(response))
    count = len(built)
    time.sleep(0.6)
    assert len(built) <= count + 1  # one may have been under way


def test_a_long_interval_has_heartbeats(serve, monkeypatch):
    monkeypatch.setattr(live, "HEARTBEAT_S", 0.0)
    with serve().http.stream("GET", "/live", params={"interval_s": 60}) as response:
        assert any(line == ": heartbeat" for line in response.iter_lines())


def test_more_listeners_than_the_limit_get_429_and_a_place_when_one_leaves(serve, monkeypatch):
    monkeypatch.setattr(live, "MAX_LISTENERS", 1)
    server = serve()
    with server.http.stream("GET", "/live") as response:
        stream = snapshots(response)  # whose end would close the connection
        next(stream)
        refused = server.http.get("/live")
        assert_error(refused, 429, None, "too_many_listeners")
        assert int(refused.headers["retry-after"]) > 0
        once(server)

    def free():
        with server.http.stream("GET", "/live") as response:
            return response.status_code == 200

    wait_for(free)


def test_who_reads_nothing_is_dropped(serve, monkeypatch):
    monkeypatch.setattr(live, "SEND_TIMEOUT_S", 0.2)
    monkeypatch.setattr(live, "REUSE_S", 100.0)
    built, build = [], live.Live.build
    monkeypatch.setattr(live.Live, "build", lambda self: built.append(self) or build(self))
    server = serve()
    letters = "rf" * live.MAX_CELLS
    server.engine.seen = Overview([], 0, BlocksOverview(16, letters[: live.MAX_CELLS]), [], False, [])
    monkeypatch.setattr(live.LiveStream, "_wait", _at_once)
    with socket.socket() as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        silent.connect(("127.0.0.1", server.port))
        silent.sendall(b"GET /live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        wait_for(lambda: built and built[0].listeners == 1)
        once(server)  # others are served meanwhile
        wait_for(lambda: built[0].listeners == 0)


async def _at_once(self, send):
    """No time between two snapshots: the client's buffers fill soon."""
    await asyncio.sleep(0)


def test_an_open_stream_does_not_hold_up_the_end(serve):
    server = serve()
    with server.http.stream("GET", "/live", params={"interval_s": 60}) as response:
        events = snapshots(response)
        next(events)
        server.server.should_exit = True
        began = time.monotonic()
        assert [snapshot["status"] for snapshot in events] == ["draining"]
        server.thread.join(10)
        assert time.monotonic() - began < 4 and not server.thread.is_alive()


@pytest.mark.parametrize("interval", ["0", "61", "nan", "x"])
def test_bad_intervals_are_named(shared, interval):
    response = shared.http.get("/live", params={"interval_s": interval})
    assert assert_error(response, 400, "interval_s").startswith("interval_s")


def test_the_feed_needs_a_key(serve):
    server = serve(server__api_keys=["one"])
    assert_error(server.http.get("/live"), 401, None, "invalid_api_key")
    once(server, authorization="Bearer one")


def test_a_running_request_is_shown_without_its_text(real):
    with real.http.stream(
        "POST", "/v1/chat/completions", json={**BODY, "max_tokens": 400, "stream": True, "kv": KV}
    ) as response:
        lines = response.iter_lines()
        for _ in range(6):
            next(lines)
        snapshot = once(real)
        text = json.dumps(snapshot)
    assert snapshot["num_requests"] == 1 and snapshot["running"] == 1
    [request] = snapshot["requests"]
    assert request["state"] == "decode" and request["output_tokens"] > 0 and request["ttft_s"] > 0
    assert request["max_tokens"] == 400 and request["kv"].startswith("snapkv(budget=64")
    assert request["kv_blocks"] == snapshot["blocks"]["running"] > 0
    assert snapshot["blocks"]["map"].count("r") == snapshot["blocks"]["running"]
    assert "secret" not in text


def test_iterations_are_counted_by_kind(real):
    wait_for(lambda: real.engine.stats().running == 0)
    before = real.engine.stats().rows
    before = (before.prefill, before.decode, before.drafted)
    body = {**BODY, "max_tokens": 9, "temperature": 0, "draft": "ngram", "cache_salt": "by kind"}
    usage = real.http.post("/v1/chat/completions", json=body).json()["usage"]
    rows = real.engine.stats().rows
    prefill, decode, drafted = rows.prefill - before[0], rows.decode - before[1], rows.drafted - before[2]
    assert prefill == usage["prompt_tokens"]
    guesses = usage.get("completion_tokens_details") or {}
    accepted = guesses.get("accepted_prediction_tokens", 0)
    assert decode == usage["completion_tokens"] - 1 - accepted
    assert drafted == accepted + guesses.get("rejected_prediction_tokens", 0)


def test_training_is_shown_with_its_blocks_and_rows(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path))
    server = start(tiny_folder)
    client = client_of(server)
    create(client, upload(client, rows(12)), epochs=50)
    seen = []

    def trains():
        snapshot = once(server)
        seen.append(snapshot)
        return (
            snapshot["trainings"] and snapshot["trainings"][0]["step"] > 2 and snapshot["blocks"]["training"]
        )

    wait_for(trains, 30)
    wait_for(lambda: any(second["training"] for second in once(server)["seconds"]), 30)
    server.stop()
    blocks = seen[-1]["blocks"]
    assert seen[-1]["trainings"][0]["loss"] > 0 and seen[-1]["totals"]["training_steps"] > 2
    assert blocks["map"].count("t") == blocks["training"]
    assert sum(blocks[state] for state in ("free", "cached", "running", "training")) == blocks["total"]


def test_gaps_between_tokens_are_counted(real):
    before = sum(real.engine.stats().itl.counts), sum(real.engine.stats().ttft.counts)
    real.http.post("/v1/chat/completions", json={**BODY, "max_tokens": 9, "n": 2})
    after = sum(real.engine.stats().itl.counts), sum(real.engine.stats().ttft.counts)
    assert (after[0] - before[0], after[1] - before[1]) == (2 * 8, 1)


def test_watching_from_many_threads_never_breaks(real):
    """Snapshots are built while the loop changes what they read."""
    stop, failures = threading.Event(), []

    def look():
        with httpx.Client(base_url=real.url) as http:
            while not stop.is_set():
                response = http.get("/live", params={"once": True})
                if response.status_code != 200:
                    failures.append(response.text)

    lookers = [threading.Thread(target=look) for _ in range(3)]
    for looker in lookers:
        looker.start()
    for i in range(6):
        real.http.post("/v1/chat/completions", json={**BODY, "max_tokens": 24, "n": 1 + i % 3})
    stop.set()
    for looker in lookers:
        looker.join()
    assert not failures
