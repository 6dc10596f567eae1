"""What clients and supervisors see of an engine that fails."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fake_engine import FakeEngine
from running import assert_error, settings
from tokenloom.errors import EngineStoppedError
from tokenloom.serve.app import run_server

BODY = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}


def test_while_the_loop_does_not_run_health_and_ready_say_so_and_requests_are_refused(serve):
    server = serve()
    server.engine.alive = False
    for path, code in (("/health", "engine_stopped"), ("/ready", "not_ready")):
        assert_error(server.http.get(path), 503, None, code)
    response = server.http.post("/v1/chat/completions", json=BODY)
    assert_error(response, 503, None, "engine_stopped")
    assert int(response.headers["retry-after"]) > 0


def test_a_server_whose_engine_failed_for_good_ends_with_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path))
    chosen = settings(server__port=0, coserve__mode="off")
    engine = FakeEngine(chosen)

    def fail(url: str) -> None:
        engine.alive, engine.failed = False, True
        engine.on_failure()

    with pytest.raises(EngineStoppedError, match="for good"):
        run_server(engine, chosen, announce=fail)


_SCRIPT = """
import asyncio, time
from tokenloom.serve.pulse import prove_life
async def main():
    pulse = asyncio.create_task(prove_life(0.5))
    await asyncio.sleep(1)
    print("alive", flush=True)
    stand_still()
def stand_still():
    time.sleep(60)
asyncio.run(main())
"""


def test_a_process_that_stands_still_ends_with_an_error_and_says_where():
    command = [sys.executable, "-c", _SCRIPT]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=50)
    assert (ended.returncode, ended.stdout) == (1, "alive\n")
    assert "in stand_still" in ended.stderr
