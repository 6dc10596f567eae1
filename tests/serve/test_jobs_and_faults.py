"""Jobs and the faults of others: the loop is started again under them, and a job that breaks passes ends."""

from __future__ import annotations

from typing import Any

from running import wait_for
from tokenloom.engine.latency_model import Features, LatencyModel
from tokenloom.engine.scheduler import Plan, Scheduler
from tuning_server import client_of, create, rows, say, steps_of, until, upload


def test_a_job_goes_on_when_the_loop_is_started_again(begin, monkeypatch):
    server = begin()
    client = client_of(server)
    file = upload(client, rows(12))
    job = until(client, create(client, file, epochs=4).id, "succeeded", "failed")
    wanted = say(server, job.fine_tuned_model)

    schedule, armed = Scheduler.schedule, False

    def faulty(self: Scheduler) -> Plan:
        nonlocal armed
        if armed:
            armed = False
            raise RuntimeError
        return schedule(self)

    monkeypatch.setattr(Scheduler, "schedule", faulty)
    job = create(client, file, epochs=4)
    wait_for(lambda: steps_of(client, job.id) >= 4, 30)
    armed = True
    job = until(client, job.id, "succeeded", "failed")
    assert job.status == "succeeded"
    assert server.engine.engine.counters.restarts == 1
    events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
    assert sorted(e.data["step"] for e in events if e.type == "metrics") == list(range(1, 13))
    assert say(server, job.fine_tuned_model) == wanted


def test_a_job_whose_rows_break_every_pass_fails_alone(begin, monkeypatch):
    # Every pass is within its budget: training rows join batches as soon as there are any.
    monkeypatch.setattr("tokenloom.finetune.runner.stored_profile", lambda engine, home: _quick())
    server = begin(coserve__mode="coserve")
    client, engine = client_of(server), server.engine.engine
    alone = say(server, "tiny", max_tokens=200)
    forward, broken = engine.decoder.forward, 0

    def faulty(batch: Any, kv: Any) -> Any:
        nonlocal broken
        if batch.taps:
            broken += 1
            raise RuntimeError("secret internals")
        return forward(batch, kv)

    monkeypatch.setattr(engine.decoder, "forward", faulty)
    job = create(client, upload(client, rows(12)))
    texts, failed = [], False
    while not failed:  # and once more when it has
        failed = client.fine_tuning.jobs.retrieve(job.id).status == "failed"
        texts.append(say(server, "tiny", max_tokens=200))
    assert broken == 2
    assert set(texts) == {alone}
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.error.code == "server_error" and "secret" not in job.error.message
    wait_for(lambda: engine.pool.num_used == 0)
    assert engine.counters.restarts == 0


def _quick() -> LatencyModel:
    return LatencyModel.fit([(Features(rows=n, head_rows=n), 0.001 * n) for n in (1, 2, 4, 8, 16, 32, 64)])
