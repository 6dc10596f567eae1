"""Every LoRA plan computes what the unsplit pair computes, and costs what it says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenloom.models.parallel_plan import (
    BASE_STATES,
    Base,
    CostModel,
    Plan,
    PlanError,
    State,
    plan_lora,
    plans,
)

R, T, F, P = State.REPLICATED, State.ROWS, State.FEATURES, State.PRE_REDUCE
BASES: tuple[Base, ...] = ("column", "row", "replicated")
Shards = list[np.ndarray]
RNG = np.random.default_rng(0)


def split(whole: np.ndarray, state: State, tp: int) -> Shards:
    """Lay a whole tensor on tp devices."""
    if state is P:
        parts = [RNG.normal(size=whole.shape) for _ in range(tp - 1)]
        return [*parts, whole - sum(parts)]
    return [whole] * tp if state is R else np.split(whole, tp, axis=0 if state is T else 1)


def join(shards: Shards, state: State) -> np.ndarray:
    if state is P:
        return sum(shards)
    if state is R:
        assert all(np.array_equal(shards[0], shard) for shard in shards)
        return shards[0]
    return np.concatenate(shards, axis=0 if state is T else 1)


def own_slice(shards: Shards, state: State) -> Shards:
    return [split(shard, state, len(shards))[i] for i, shard in enumerate(shards)]


def pad(shards: Shards, state: State) -> Shards:
    tp = len(shards)
    axis = 0 if state is T else 1
    zero = np.zeros_like(shards[0])
    return [np.concatenate([s if j == i else zero for j in range(tp)], axis) for i, s in enumerate(shards)]


def execute(plan: Plan, x: Shards, weights: dict[str, np.ndarray]) -> Shards:
    """Run a plan; in a `linear`, `pad` or `partition` a device sees only what it holds."""
    values, tp = x, len(x)
    for step in plan.steps:
        if step.weight:
            name, state = step.weight
            held = split(weights[name], state, tp)
            values = [v @ w.T for v, w in zip(values, held, strict=True)]
        elif step.op == "pad":
            values = pad(values, step.before)
        elif step.op == "partition":
            values = own_slice(values, step.after)
        else:  # the others are defined by what they leave on each device
            values = split(join(values, step.before), step.after, tp)
    return values


def end_state(plan: Plan) -> State:
    return plan.steps[-1].after


def by_rules(base: Base, rules: tuple[int, int], *sizes: int, cost: CostModel = CostModel()) -> Plan:
    return next(plan for plan in plans(base, *sizes, cost=cost) if plan.rules == rules)


def ops(plan: Plan) -> list[str]:
    return [f"{step.op} {step.tensor}" for step in plan.steps]


@given(
    base=st.sampled_from(BASES),
    tp=st.sampled_from([1, 2, 3, 4]),
    multiples=st.tuples(*[st.integers(1, 3)] * 2),
    rank=st.integers(1, 8),
    rows=st.integers(1, 8),
)
def test_every_plan_with_its_base_computes_the_unsplit_result(
    base: Base, tp: int, multiples: tuple[int, int], rank: int, rows: int
) -> None:
    width_in, width_out = (m * tp for m in multiples)
    x = RNG.normal(size=(rows, width_in))
    w, a = RNG.normal(size=(width_out, width_in)), RNG.normal(size=(rank, width_in))
    b = RNG.normal(size=(width_out, rank))
    state_in, state_out = BASE_STATES[base] if tp > 1 else (R, R)
    listed = plans(base, width_in, width_out, rank, rows, tp)
    assert listed
    for plan in listed:
        y = execute(plan, split(x, state_in, tp), {"A": a, "B": b})
        base_y = split(x @ w.T, state_out, tp)
        if state_out is P and end_state(plan) is R:  # added after the base's own all-reduce
            base_y, state_out_now = split(x @ w.T, R, tp), R
        else:
            state_out_now = state_out
        total = join([own + more for own, more in zip(base_y, y, strict=True)], state_out_now)
        assert np.allclose(total, x @ w.T + x @ a.T @ b.T)


@given(
    base=st.sampled_from(BASES), tp=st.sampled_from([2, 4]), rank=st.integers(1, 8), rows=st.integers(1, 8)
)
def test_steps_of_a_plan_follow_on_each_other(base: Base, tp: int, rank: int, rows: int) -> None:
    for plan in plans(base, 8, 16, rank, rows, tp):
        states = [BASE_STATES[base][0]]
        for step in plan.steps:
            assert step.before is states[-1]
            states.append(step.after)
        assert states[-1] is BASE_STATES[base][1] or (base == "row" and states[-1] is R)


SIZES = 64, 96, 8, 12, 4  # in, out, rank, rows, tp; two bytes per element


@pytest.mark.parametrize(
    "rules, expected, sent_bytes",
    [
        ((1, 4), ["linear z", "linear y"], 0),
        ((2, 4), ["partition x", "linear z", "all-reduce z", "linear y"], 2 * 12 * 8 * 2 * 3 // 4),
        ((3, 3), ["partition x", "linear z", "linear y", "all-to-all y"], 12 * 96 * 2 * 3 // 16),
        ((3, 4), ["partition x", "linear z", "all-gather z", "linear y"], 12 * 8 * 2 * 3 // 4),
    ],
)
def test_the_papers_candidates_beside_a_column_parallel_linear(
    rules: tuple[int, int], expected: list[str], sent_bytes: int
) -> None:
    plan = by_rules("column", rules, *SIZES)
    assert ops(plan) == expected
    assert plan.communicated_bytes == sent_bytes


def test_a_split_and_b_replicated_joins_the_summands_of_a_row_parallel_base_for_free() -> None:
    plan = by_rules("row", (2, 5), *SIZES)
    assert ops(plan) == ["linear z", "linear y"]
    assert plan.communicated_bytes == 0
    assert end_state(plan) is P


def test_a_split_and_b_on_the_whole_middle_needs_an_all_reduce() -> None:
    plan = by_rules("row", (2, 1), *SIZES)
    assert ops(plan) == ["linear z", "all-reduce z", "linear y"]
    assert plan.communicated_bytes == 2 * 12 * 8 * 2 * 3 // 4
    assert end_state(plan) is R


@pytest.mark.parametrize("base", BASES)
def test_one_device_has_one_plan_without_communication(base: Base) -> None:
    (plan,) = plans(base, 7, 5, 3, 11, 1)
    assert plan.rules == (1, 1)
    assert ops(plan) == ["linear z", "linear y"]
    assert plan.communicated_bytes == 0
    assert plan.flops == 2 * 11 * 3 * (7 + 5)
    assert plan.parameter_bytes == 2 * 3 * (7 + 5)


def test_a_plan_counts_what_one_device_computes_and_holds() -> None:
    plan = by_rules("column", (1, 4), *SIZES)
    assert plan.flops == 2 * 12 * 8 * (64 + 96 // 4)
    assert plan.parameter_bytes == 2 * 8 * (64 + 96 // 4)
    by_tokens = by_rules("column", (3, 3), *SIZES)
    assert by_tokens.flops == 2 * 12 * 8 * (64 + 96) // 4
    assert by_tokens.parameter_bytes == 2 * 8 * (64 + 96)


def test_the_cost_is_the_documented_sum() -> None:
    cost = CostModel(1e3, 1e2, 0.5, 1e1, 4)
    plan = by_rules("column", (2, 4), *SIZES, cost=cost)
    expected = plan.flops / 1e3 + plan.communicated_bytes / 1e2 + 0.5 + plan.parameter_bytes / 1e1
    assert plan.cost_s == pytest.approx(expected)


@pytest.mark.parametrize("base", BASES)
def test_plans_are_sorted_and_the_first_is_chosen(base: Base) -> None:
    listed = plans(base, *SIZES)
    assert len(listed) > 4
    assert [plan.cost_s for plan in listed] == sorted(plan.cost_s for plan in listed)
    assert plan_lora(base, *SIZES) == listed[0]


def test_small_batches_of_small_ranks_avoid_communication() -> None:
    assert plan_lora("column", 4096, 4096, 16, 64, 4).rules == (1, 4)
    assert plan_lora("row", 4096, 4096, 16, 64, 4).communicated_bytes == 0


def test_large_batches_of_large_ranks_share_the_arithmetic() -> None:
    plan = plan_lora("column", 16384, 16384, 1024, 8192, 4)
    assert plan.communicated_bytes > 0
    assert plan.flops == 2 * 8192 * 1024 * (16384 + 16384) // 4


def test_memory_bound_devices_hold_as_little_as_they_can() -> None:
    slow_memory = CostModel(1e20, 1e12, 0.0, 1e9)
    plan = plan_lora("column", 4096, 4096, 64, 4, 4, slow_memory)
    assert plan.parameter_bytes == 2 * 64 * (4096 + 4096) // 4


@pytest.mark.parametrize(
    "rank, rows, missing",
    [
        (6, 8, lambda rules: rules[0] == 4),  # the middle cannot be split by features
        (8, 6, lambda rules: 3 in rules),  # the tokens cannot be split
    ],
)
def test_uneven_splits_are_left_out(rank: int, rows: int, missing: Callable[[tuple[int, int]], bool]) -> None:
    def found(rank: int, rows: int) -> bool:
        return any(missing(plan.rules) for plan in plans("column", 16, 16, rank, rows, 4))

    assert not found(rank, rows)
    assert found(8, 8)


@pytest.mark.parametrize(
    "base, sizes, message",
    [
        ("column", (16, 15, 4, 4, 2), "width_out 15"),
        ("row", (15, 16, 4, 4, 2), "width_in 15"),
        ("row", (16, 16, 0, 4, 2), "rank must be at least 1"),
        ("diagonal", (16, 16, 4, 4, 2), "diagonal"),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(base: Base, sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_lora(base, *sizes)


def test_a_plan_reads_as_its_steps() -> None:
    lines = str(by_rules("column", (2, 4), *SIZES)).splitlines()
    assert lines == [
        "partition x: [=,-,-] -> [-,-,|], 0 B",
        "z = x Aᵀ: [-,-,|], [-,-,|] -> [+,-,-]",
        "all-reduce z: [+,-,-] -> [=,-,-], 288 B",
        "y = z Bᵀ: [=,-,-], [-,|,-] -> [-,-,|]",
    ]
