"""GET /debug/state: who may see it, and that it says what the engine holds and nothing of any text."""

import threading

import pytest

from running import assert_error, wait_for
from tokenloom.engine.state import (
    EngineState,
    LoopState,
    PoolState,
    SchedulerState,
    TrainingState,
)
from tokenloom.finetune.job_request import parse_job

EMPTY = EngineState(
    loop=LoopState(alive=True, ready=True, has_work=False, idle_ms=None, inbox=0, streams=0),
    scheduler=SchedulerState("fcfs", [], [], 64, 1024, 512, 0),
    requests=[],
    pool=PoolState(8, 16, 8, 0, 0, 0, 0),
    adapters=[],
    training=TrainingState("off", [], [], 0, False, False),
    iterations=[],
)


def look(server, key=None, **params):
    server.engine.state = lambda iterations: EMPTY
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return server.http.get("/debug/state", params=params, headers=headers)


def test_a_server_of_this_machine_without_keys_shows_it(serve):
    assert look(serve()).json()["engine"]["pool"]["num_blocks"] == 8


def test_a_server_on_a_network_without_keys_shows_it_to_nobody(serve):
    assert_error(look(serve(server__host="0.0.0.0")), 403, None, "admin_key_required")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_where_there_are_admin_keys_one_is_needed(serve, host):
    server = serve(server__host=host, server__api_keys=["user"], server__admin_keys=["boss"])
    assert_error(look(server), 401, None, "invalid_api_key")
    assert_error(look(server, "user"), 403, None, "admin_key_required")
    assert look(server, "boss").status_code == 200


@pytest.fixture
def speaking(real):
    """A real server in the midst of an answer."""
    answers = []
    body = {"model": "tiny", "prompt": "secret words", "max_tokens": 2000, "ignore_eos": True, "n": 2}
    gone = threading.Event()

    def ask():
        headers = {"x-request-id": "mine-9"}
        with real.http.stream(
            "POST", "/v1/completions", json={**body, "stream": True}, headers=headers
        ) as got:
            for line in got.iter_lines():
                answers.append(line)
                if gone.is_set():
                    return

    thread = threading.Thread(target=ask)
    thread.start()
    wait_for(lambda: len(answers) > 8)
    yield real, answers
    gone.set()
    thread.join(20)


def test_requests_are_told_with_their_phase_tokens_and_blocks(speaking):
    state = speaking[0].http.get("/debug/state").json()["engine"]
    [request] = state["requests"]
    seen, choices = request["request"], request["sequences"]
    assert seen["id"].startswith("mine-9-") and seen["state"] == "decode"
    assert [choice["index"] for choice in choices] == [0, 1]
    for choice in choices:
        assert choice["tokens"] == seen["prompt_tokens"] + choice["output_tokens"]
        assert choice["finish_reason"] is None and choice["kv_blocks"] > 0
    assert set(state["scheduler"]["running"]) == {f"{seen['id']}:0", f"{seen['id']}:1"}


def test_blocks_of_all_states_add_up(speaking):
    pool = speaking[0].http.get("/debug/state").json()["engine"]["pool"]
    assert pool["in_use"] > 0
    # Two containers are counted one after the other while the loop goes on.
    assert abs(pool["free"] + pool["cached"] + pool["in_use"] - pool["num_blocks"]) <= 2


def test_nothing_of_prompts_and_answers_is_in_it(speaking):
    text = speaking[0].http.get("/debug/state", params={"stacks": True}).text
    assert "secret" not in text


def test_the_last_iterations_come_newest_first(speaking):
    rows = speaking[0].http.get("/debug/state", params={"iterations": 5}).json()["engine"]["iterations"]
    assert len(rows) == 5
    assert [row["ago_s"] for row in rows] == sorted(row["ago_s"] for row in rows)
    assert rows[0]["inference_rows"] == 2 and all(row["measured_ms"] > 0 for row in rows)


def test_stacks_are_told_if_asked_for(real):
    assert real.http.get("/debug/state").json()["stacks"] is None
    stacks = real.http.get("/debug/state", params={"stacks": True}).json()["stacks"]
    [engine] = [frames for name, frames in stacks.items() if name.startswith("tokenloom-engine")][-1:]
    assert any(frame.endswith(" _run") for frame in engine)


def test_jobs_that_are_not_over_are_told(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path))
    server = serve(jobs=True, coserve__mode="off")
    service = server.jobs.service
    file = service.create_file([b"{}\n"], "train.jsonl")
    job = service.store.jobs.create(parse_job({"model": "fake", "training_file": file.id}))
    over = service.store.jobs.create(parse_job({"model": "fake", "training_file": file.id}))
    service.cancel(over.id)
    told = look(server).json()["jobs"]
    assert [(each["id"], each["status"]) for each in told] == [(job.id, "validating_files")]


@pytest.mark.parametrize("iterations", [-1, 1001, "x"])
def test_how_many_iterations_has_limits(serve, iterations):
    assert_error(look(serve(), iterations=iterations), 400, "iterations")
