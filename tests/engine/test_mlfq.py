"""Multi-level feedback queues: short answers are not held up by long ones, and nobody is forgotten.

Most tests run the scheduler alone, on a clock of their own: an iteration takes 10 ms and 0.1 ms a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_models import build_tiny
from tokenloom.cache.block_pool import BlockPool
from tokenloom.config import ConfigError, SchedulerSettings, load_settings
from tokenloom.engine.engine import Engine
from tokenloom.engine.request import Request, Sequence
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.engine.scheduler import Scheduler
from tokenloom.models.loader import open_model

BLOCK = 4


@dataclass
class Simulation:
    """A scheduler whose sequences get a token for each iteration that computes all they have."""

    settings: SchedulerSettings
    num_blocks: int = 10_000
    now: float = 0.0
    served: dict[str, list[float]] = field(default_factory=dict)
    done: dict[str, float] = field(default_factory=dict)
    rows: int = 0

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.num_blocks, BLOCK)
        self.scheduler = Scheduler(
            self.settings,
            self.pool,
            prefix_caching=True,
            copy_block=lambda source, target: None,
            clock=lambda: self.now,
        )

    def add(self, name: str, prompt: int, answer: int, n: int = 1) -> Sequence:
        tokens = [hash((name, i)) % 1000 for i in range(prompt)]
        request = Request(name, tokens, SamplingParams(max_tokens=answer, n=n), arrival_s=self.now)
        sequence = Sequence(request, 0, self.pool, detokenizer=None)  # type: ignore[arg-type]
        request.sequences = [sequence]
        self.served[name] = [self.now]
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> None:
        plan = self.scheduler.schedule()
        self.pool.check()
        assert plan.num_rows == sum(plan.rows.values()) <= self.settings.max_batch_tokens
        assert len(plan.rows) <= self.settings.max_running
        self.rows += plan.num_rows
        self.now += 0.01 + 1e-4 * plan.num_rows
        for sequence, rows in plan.rows.items():
            name, before = sequence.request.request_id, sequence.num_computed
            self.served[name].append(self.now)
            sequence.num_computed += rows
            sequence.publish_blocks(before)
            if sequence.num_pending == 0:
                sequence.tokens.append(0)
                if sequence.num_output == sequence.request.params.max_tokens:
                    self.done[name] = self.now
                    self.scheduler.remove(sequence)

    def run(self, arrivals: list[tuple[float, int, int]]) -> float:
        """Serve (when, prompt, answer) to the end; the mean time from arrival to completion."""
        pending = [(at, f"r{i}", prompt, answer) for i, (at, prompt, answer) in enumerate(arrivals)]
        came = {name: at for at, name, _, _ in pending}
        while pending or self.scheduler.has_work:
            if pending and not self.scheduler.has_work:
                self.now = max(self.now, pending[0][0])
            while pending and pending[0][0] <= self.now:
                self.add(*pending.pop(0)[1:])
            self.step()
            assert self.now < 10_000
        assert set(self.done) == set(came) and self.pool.num_used == 0
        return sum(self.done[name] - came[name] for name in came) / len(came)


def level_of(sim: Simulation, sequence: Sequence) -> int:
    assert sim.scheduler.mlfq is not None
    return sim.scheduler.mlfq.level(sequence)


def mlfq(**keys: Any) -> SchedulerSettings:
    return SchedulerSettings(policy="mlfq", **{"max_running": 2, "mlfq_quantum": 16, **keys})


# Two long answers come first, then many short ones: the tail is heavy.
HEAVY_TAIL = [(0.0, 30, 900), (0.0, 30, 700), *((0.05 + 0.3 * i, 20, 5 + i % 7) for i in range(40))]


def test_a_heavy_tailed_trace_is_over_sooner_on_average_than_first_come_first_served() -> None:
    fcfs = Simulation(SchedulerSettings(max_running=2)).run(HEAVY_TAIL)
    levels = Simulation(mlfq()).run(HEAVY_TAIL)
    assert levels < 0.5 * fcfs


def test_a_long_prompt_joins_where_the_quantum_covers_it() -> None:
    sim = Simulation(mlfq(mlfq_levels=4))
    levels = [level_of(sim, sim.add(f"r{n}", n, 5)) for n in (1, 16, 17, 64, 65, 5000)]
    assert levels == [0, 0, 1, 2, 3, 3]


def test_a_short_prompt_passes_a_long_one_that_is_being_computed() -> None:
    sim = Simulation(mlfq(max_batch_tokens=32))
    sim.add("long", 900, 3)
    sim.step()
    sim.add("short", 10, 1)
    sim.step()
    assert "short" in sim.done


def test_who_has_used_its_quantum_goes_down_a_level() -> None:
    sim = Simulation(mlfq(mlfq_levels=3))
    levels, sequence = [], sim.add("r", 10, 150)
    while "r" not in sim.done:
        levels.append(level_of(sim, sequence))
        sim.step()
    # 10 rows of the prompt and 6 tokens fill 16 rows; 32 more follow on level 1; level 2 is the last.
    assert (levels.count(0), levels.count(1), levels.count(2)) == (8, 32, 110)


@pytest.mark.parametrize("limit", [0.3, 0.7])
def test_nobody_waits_beyond_the_limit_for_those_who_came_later(limit: float) -> None:
    burst = [(0.0, 10, 80), *((0.5, 12, 2) for _ in range(60))]

    def first_gap(starvation_s: float) -> float:
        sim = Simulation(mlfq(max_running=1, mlfq_starvation_s=starvation_s))
        sim.run(burst)
        times = sim.served["r0"]
        return next(b - a for a, b in itertools.pairwise(times) if b - a > 0.1)

    assert first_gap(100.0) > 1.2
    assert limit < first_gap(limit) < limit + 2 * 0.0115  # at most the short one at hand is in its way


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 2), st.sampled_from([1, 7, 40, 150]), st.sampled_from([1, 5, 60])),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 5),
    st.integers(4, 64),
    st.integers(55, 120),
)
def test_every_request_finishes_in_a_tight_pool(
    trace: list[tuple[float, int, int]], running: int, rows: int, blocks: int
) -> None:
    sim = Simulation(mlfq(max_running=running, max_batch_tokens=rows, mlfq_starvation_s=0.2), blocks)
    sim.run(sorted(trace))


def test_blocks_are_taken_from_the_lowest_level_first() -> None:
    sim = Simulation(mlfq(max_running=3, mlfq_levels=4), num_blocks=40)
    low, middle = sim.add("low", 60, 90), sim.add("middle", 28, 90)
    sim.step()
    assert sim.scheduler.running == [middle, low] and sim.pool.num_available == 18
    short = sim.add("short", 14, 90)
    for _ in range(3):
        sim.step()
    other = sim.add("other", 16, 90)  # with it there are not blocks enough for what the four grow to
    while not sim.scheduler.num_preemptions:
        sim.step()
    assert sim.scheduler.waiting == [low] and set(sim.scheduler.running) == {middle, short, other}


def test_a_short_prompt_takes_the_blocks_of_whoever_stands_below_it() -> None:
    sim = Simulation(mlfq(max_running=1), num_blocks=40)
    long = sim.add("long", 120, 20)
    sim.step()
    assert sim.pool.num_available < 12
    sim.add("short", 48, 1)
    sim.step()
    assert "short" in sim.done and sim.scheduler.waiting == [long]


def test_choices_that_share_blocks_give_way_together() -> None:
    """Else nobody would get rows: those in front have no blocks, and who has them is not in front."""
    sim = Simulation(mlfq(max_running=2, mlfq_starvation_s=0.05), num_blocks=20)
    leader = sim.add("two", 56, 40, n=2)
    sim.step()
    sibling = leader.fork(1, None)  # type: ignore[arg-type]
    sibling.tokens.append(1)
    leader.request.sequences.append(sibling)
    leader.request.forked = True
    sim.scheduler.start(sibling)
    for _ in range(3):
        sim.step()
    assert len(sim.scheduler.running) == 2 and sim.pool.num_available < 15
    sim.add("short", 60, 1, n=2)
    for _ in range(15):
        sim.step()
    assert "short" in sim.done and "two" not in sim.done


def test_what_was_computed_before_a_preemption_is_not_charged_again() -> None:
    sim = Simulation(mlfq(mlfq_quantum=64))
    sequence = sim.add("r", 40, 30)
    for _ in range(3):
        sim.step()
    sequence.restart_kv()
    sim.scheduler.running.remove(sequence)
    sim.pool.forget_prefixes()
    sim.scheduler.add(sequence)
    sim.step()
    sim.step()
    assert level_of(sim, sequence) == 0


@pytest.fixture(scope="module")
def make_engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Engine]:
    folder, _ = build_tiny(tmp_path_factory.mktemp("llama"), "llama", torch.float32)
    files = open_model(str(folder))

    def make(**flags: Any) -> Engine:
        keys = {key.replace("__", "."): value for key, value in flags.items()}
        return Engine(load_settings({"cache.block_size": BLOCK, **keys}), files)

    return make


def answers(engine: Engine, *, n: int) -> dict[str, list[list[int]]]:
    """Greedy answers to prompts of several lengths that arrive while others run."""
    requests = [
        Request(f"r{i}", [(7 * i + j) % 200 for j in range(5 + 9 * i)], SamplingParams(max_tokens=22 - 3 * i,
                temperature=0.0, ignore_eos=True, n=n))
        for i in range(6)
    ]  # fmt: skip
    texts: dict[str, list[list[int]]] = {}
    arriving, step = list(requests), 0
    while arriving or engine.has_work:
        if arriving and step % 3 == 0:
            engine.add(arriving.pop(0))
        engine.step()
        engine.pool.check()
        step += 1
        assert step < 3000
    for request in requests:
        texts[request.request_id] = [sequence.output for sequence in request.sequences]
    assert engine.pool.num_used == 0
    return texts


def test_answers_are_those_of_first_come_first_served(make_engine: Callable[..., Engine]) -> None:
    flags = {"model__dtype": "float64", "scheduler__max_running": 2, "scheduler__max_batch_tokens": 16}
    token_bytes = 2 * 2 * 2 * 16 * 8
    plain = answers(make_engine(**flags), n=2)
    tight = make_engine(
        **flags, scheduler__policy="mlfq", scheduler__mlfq_quantum=8, cache__kv_bytes=100 * token_bytes
    )
    assert answers(tight, n=2) == plain
    assert tight.stats().preemptions > 0


@pytest.mark.parametrize(
    ("key", "value"),
    [("mlfq_quantum", 0), ("mlfq_levels", 0), ("mlfq_levels", 17), ("mlfq_starvation_s", 0)],
)
def test_settings_out_of_range_are_refused_by_name(key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=key):
        load_settings({f"scheduler.{key}": value})
