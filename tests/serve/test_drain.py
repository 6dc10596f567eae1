"""Shutting down: running streams finish, new requests are refused, the rest is aborted at the timeout."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx

from running import assert_error, events, wait_for

URL = "/v1/chat/completions"
BODY = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "stream": True}


def stream_in_background(server, max_tokens):
    answers = []
    body = {**BODY, "max_tokens": max_tokens}

    def post():
        answers.append(httpx.post(server.url + URL, json=body, timeout=20))

    thread = threading.Thread(target=post)
    thread.start()
    wait_for(lambda: server.engine.running == 1)
    return thread, answers


def test_a_running_stream_finishes_while_new_requests_are_refused(serve):
    server = serve(step_s=0.02, server__drain_timeout_s=20)
    thread, answers = stream_in_background(server, 40)
    server.server.should_exit = True
    wait_for(lambda: server.engine.draining)
    response = server.http.post(URL, json=BODY)
    assert_error(response, 503, None, "engine_stopped")
    assert int(response.headers["retry-after"]) > 0
    thread.join()
    data = events(answers[0])
    assert data[-1] == "[DONE]"
    assert json.loads(data[-2])["choices"][0]["finish_reason"] == "length"


def test_what_runs_at_the_timeout_is_told_so(serve):
    server = serve(step_s=0.02, server__drain_timeout_s=0.2)
    thread, answers = stream_in_background(server, 500)
    server.server.should_exit = True
    thread.join()
    data = events(answers[0])
    assert data[-1] == "[DONE]"
    assert json.loads(data[-2])["error"]["code"] == "engine_stopped"


_SCRIPT = """
import sys
sys.path[:0] = {paths!r}
from fake_engine import FakeEngine
from running import settings
from tokenloom.serve.app import run_server
chosen = settings(server__port=0, coserve__mode="off")
run_server(FakeEngine(chosen, step_s=0.02), chosen, announce=lambda url: print(url, flush=True))
print("gone", flush=True)
"""


def test_sigterm_drains_the_process_and_it_returns_cleanly(tmp_path):
    here = Path(__file__).parent
    script = _SCRIPT.format(paths=[str(here), str(here.parent)])
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TOKENLOOM_HOME": str(tmp_path)},
    )
    try:
        url = process.stdout.readline().strip()
        with httpx.stream("POST", url + URL, json={**BODY, "max_tokens": 20}, timeout=20) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(process.pid, signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2]
        assert process.stdout.readline() == "gone\n"
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
