"""Durations and what iterations are made of, as dashboards and Prometheus read them."""

import pytest

from tokenloom.engine.composition import Composition, Iteration
from tokenloom.engine.latencies import BUCKETS_S, Latencies


def test_buckets_hold_what_is_at_most_their_bound():
    latencies = Latencies()
    for seconds in (0.001, 0.0011, 300.0, 301.0):
        latencies.add(seconds, 0.0)
    counted = dict(zip((*BUCKETS_S, None), latencies.counts, strict=True))
    assert {bound: count for bound, count in counted.items() if count} == {
        0.001: 1,
        0.0025: 1,
        300: 1,
        None: 1,
    }
    assert latencies.total_s == pytest.approx(601.0021)


def test_percentiles_are_of_what_ended_since():
    latencies = Latencies()
    latencies.add(100.0, now=1.0)
    for i in range(101):
        latencies.add(i / 100, now=5.0)
    found = latencies.percentiles(since=2.0, target_s=0.25)
    assert (found.count, found.p50_s, found.p90_s, found.p99_s) == (101, 0.5, 0.9, 0.99)
    assert found.within == 26 / 101
    assert latencies.percentiles(since=6.0, target_s=1.0).p50_s is None


def test_iterations_are_added_up_by_second_and_in_all(monkeypatch):
    now = [100.2]
    monkeypatch.setattr("tokenloom.engine.composition.time.time", lambda: now[0])
    composition = Composition()
    for at_s in (100.2, 100.9, 102.5, 103.0):
        now[0] = at_s
        record = Iteration(
            0.0, inference_rows=10, prefill_rows=4, drafted_rows=3, train_rows=7, measured_ms=2.5
        )
        composition.add(record)
    seconds = composition.seconds(now_s=103.7)
    assert [(s.at_s, s.iterations, s.prefill, s.decode, s.drafted, s.training) for s in seconds] == [
        (100, 2, 8, 6, 6, 14),
        (102, 1, 4, 3, 3, 7),
    ]
    assert seconds[0].busy_ms == 5.0
    assert (composition.total.iterations, composition.total.training) == (4, 28)
