"""`tokenloom top`: a frame of what a server's feed tells, in a terminal."""

import io
import time

import pytest
from rich.console import Console
from typer.testing import CliRunner

from busy_overview import busy
from fake_engine import FakeEngine
from running import Running, settings, wait_for
from tokenloom.cli import app
from tokenloom.top import View, frame
from tokenloom.top_cli import Watch, WatchError

KV = "snapkv(budget=64)+pyramid()"


def drawn(view, **options):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(frame(view, **options))
    return console.export_text()


@pytest.fixture(scope="module")
def watched():
    """What `top` makes of one snapshot of a busy server."""
    server = Running(FakeEngine(settings(slo__ttft_ms=150)))
    server.engine.seen = busy(int(time.time()))
    server.engine.counters.ttft.add(0.3, time.monotonic())
    text = drawn(Watch(server.url).once())
    server.stop()
    return text


def test_once_prints_one_frame(serve):
    server = serve()
    result = CliRunner().invoke(app, ["top", "--once", "--url", server.url])
    assert result.exit_code == 0, result.output
    for word in ("fake", "ready", "iterations", "latency", "KV pool", "requests"):
        assert word in result.output


def test_rates_are_of_the_last_ten_seconds(watched):
    text = watched
    lines = {line.split()[1]: line for line in text.splitlines() if "rows/s" in line}
    assert "6.0 rows/s" in lines["prefill"] and "9.0 rows/s" in lines["decode"]
    assert "15.0 rows/s" in lines["training"] and "0.0 rows/s" in lines["drafted"]
    assert "3.0 iterations/s" in text and "busy 15%" in text


def test_latencies_stand_beside_their_targets(watched):
    [line] = [line for line in watched.splitlines() if "first token" in line]
    assert "300 ms" in line and "150 ms" in line and "0.0%" in line
    [line] = [line for line in watched.splitlines() if "between tokens" in line]
    assert "–" in line


def test_the_pool_is_a_bar_of_its_parts(watched):
    assert "running 3  training 2  cached 1  free 2  of 8 blocks of 16 tokens" in watched
    bars = [line for line in watched.splitlines() if line.startswith("│ █")]
    assert [bar.count("█") for bar in bars] == [60, 60]


def test_requests_are_a_table_without_control_characters(watched):
    text = watched
    [line] = [line for line in text.splitlines() if "req-a" in line]
    for word in ("decode", "2.5 s", "40", "12/64", "sailor", "snapkv+pyramid"):
        assert word in line
    assert "req-?[2Jb" in text and "\x1b" not in text
    assert "and 3 more" in text


def test_training_is_told_with_its_loss(watched):
    assert "training now: step 7, loss 1.2500" in watched


def test_jobs_are_told_where_there_are_any(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path))
    server = serve(jobs=True, coserve__mode="off")
    view = Watch(server.url).once()
    assert view.jobs == []
    view.jobs = [{"id": "ftjob-1", "status": "running", "model": "fake", "fine_tuned_model": None}]
    assert "ftjob-1" in drawn(view)


def test_a_second_snapshot_adds_its_seconds_once(serve):
    server = serve()
    view, watch = View(), Watch(server.url)
    now = int(time.time())
    server.engine.seen = busy(now)
    first = watch.once().snapshot
    view.update(first)
    view.update(first)
    assert len(view.seconds) == 3


def test_the_feed_is_followed_and_goes_on_after_the_server_was_away(serve, monkeypatch):
    monkeypatch.setattr("tokenloom.top_cli.RETRY_S", 0.01)
    server = serve()
    views = Watch(server.url).views(0.25)
    assert next(views).snapshot["status"] == "ready"
    server.engine.draining = True
    wait_for(lambda: "trying again" in next(views).note)
    server.engine.draining = False
    wait_for(lambda: next(views).snapshot["status"] == "ready")


def test_a_key_is_sent_and_asked_for(serve):
    server = serve(server__api_keys=["k"])
    with pytest.raises(WatchError, match="--key"):
        Watch(server.url).once()
    assert Watch(server.url, "k").once().snapshot["model"] == "fake"


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://", "nonsense"])
def test_who_is_not_there_is_named(url):
    with pytest.raises(WatchError, match="cannot be reached"):
        Watch(url).once()
