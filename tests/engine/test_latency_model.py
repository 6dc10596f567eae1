"""The latency model fits, stays monotone, follows the machine, and is never reused where it does not hold."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from itertools import combinations
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenloom.engine.latency_model import (
    Features,
    LatencyModel,
    LatencyModelError,
    basis,
    bisect_rows,
    bucket,
)
from tokenloom.engine.latency_profile import cache_path, machine_key, profile_grid
from tokenloom.engine.nnls import nnls

KEY = {"model": "abc", "machine": "m x 2", "dtype": "float32", "threads": 2, "backend": "torch"}
NAMES = [field.name for field in dataclasses.fields(Features)]
FEATURES = st.builds(Features, **{name: st.integers(0, 5000) for name in NAMES})


def machine_ms(f: Features) -> float:
    """A machine that reads its weights for 20 ms; arithmetic takes over smoothly, in no kink of the basis."""
    forward = 20.0 * (f.rows > 0) + 9.0 * f.rows**0.6 + 0.0004 * f.context
    head = (3.0 if f.head_rows else 0.0) + 0.3 * f.head_rows + 0.05 * f.train_rows
    backward = 0.2 * f.bwd_quanta + 0.08 * f.bwd_rows + 0.00002 * f.bwd_context
    return forward + head + backward + f.loss_quanta + 0.4 * f.loss_rows + 12.0 * f.optimizer


def noisy(features: Features, rng: random.Random, slower: float = 1.0) -> float:
    return machine_ms(features) * slower * rng.lognormvariate(0.0, 0.04)


def fitted(seed: int = 0) -> LatencyModel:
    rng = random.Random(seed)
    return LatencyModel.fit([(c.features(), noisy(c.features(), rng)) for c in profile_grid()], KEY)


def mixes(count: int, seed: int) -> list[Features]:
    """Iterations as a co-serving engine runs them, off the grid."""
    rng, features = random.Random(seed), []
    for _ in range(count):
        decodes, train = rng.randint(1, 12), rng.choice([0, rng.randint(1, 200)])
        pieces, rows = rng.choice([0, rng.randint(1, 30)]), rng.randint(4, 128)
        features.append(
            Features(
                rows=decodes + train,
                context=decodes * rng.randint(20, 1500) + train * (train + 1) // 2,
                head_rows=decodes,
                train_rows=train,
                bwd_quanta=pieces,
                bwd_rows=pieces * rows,
                bwd_context=pieces * rows * rng.randint(rows, 1024),
            )
        )
    return features


def best_by_enumeration(a: np.ndarray, b: np.ndarray) -> float:
    """Smallest residual over every set of columns whose unconstrained solution is non-negative."""
    best, n = float(np.linalg.norm(b)), a.shape[1]
    for size in range(1, n + 1):
        for columns in map(list, combinations(range(n), size)):
            x = np.linalg.lstsq(a[:, columns], b, rcond=None)[0]
            if x.min() >= 0.0:
                best = min(best, float(np.linalg.norm(a[:, columns] @ x - b)))
    return best


@pytest.mark.parametrize("seed", range(60))
def test_nnls_is_as_good_as_trying_every_active_set(seed: int) -> None:
    rng = np.random.default_rng(seed)
    m, n = rng.integers(1, 12), rng.integers(1, 7)
    a, b = rng.normal(size=(m, n)) * 10.0 ** rng.integers(-4, 4, size=n), rng.normal(size=m)
    x = nnls(a, b)
    assert x.min() >= 0.0
    assert np.linalg.norm(a @ x - b) == pytest.approx(best_by_enumeration(a, b), abs=1e-9)


def test_nnls_takes_columns_that_depend_on_each_other() -> None:
    a = np.array([[1.0, 2.0, 0.0, 3.0], [2.0, 4.0, 0.0, 1.0], [3.0, 6.0, 0.0, 2.0]])
    x = nnls(a, a @ np.array([1.0, 1.0, 1.0, 2.0]))
    assert x.min() >= 0.0
    assert np.allclose(a @ x, a @ np.array([1.0, 1.0, 1.0, 2.0]))


def test_exact_times_are_fitted_exactly() -> None:
    cells = [cell.features() for cell in profile_grid()]
    truth = LatencyModel([0.5 + i % 3 for i in range(len(basis(Features())))], [], {})
    model = LatencyModel.fit([(f, truth.predict(f)) for f in cells])
    assert all(model.predict(f) == pytest.approx(truth.predict(f), rel=1e-6) for f in cells)
    assert model.margin(cells[0]) == pytest.approx(1.0, abs=1e-6)


def test_held_out_iterations_are_predicted_within_fifteen_percent() -> None:
    model, rng = fitted(), random.Random(7)
    errors = [abs(model.predict(f) / noisy(f, rng) - 1.0) for f in mixes(400, seed=1)]
    assert mean(errors) < 0.15


def test_small_times_count_as_much_as_large_ones() -> None:
    # One constant cannot serve both; the absolute optimum, 550, would be off by 450% on the small one.
    model = LatencyModel.fit([(Features(rows=1), 100.0), (Features(rows=1), 1000.0)])
    assert model.predict(Features(rows=1)) < 150.0


def test_convex_row_costs_are_fitted_too() -> None:
    """On a GPU rows are free until arithmetic binds."""
    samples = [(Features(rows=n), 10.0 + max(0, n - 48)) for n in (1, 2, 4, 8, 16, 32, 48, 64, 128, 256)]
    model = LatencyModel.fit(samples)
    assert all(model.predict(f) == pytest.approx(t, rel=1e-6) for f, t in samples)


@given(FEATURES, FEATURES)
def test_more_work_is_never_predicted_to_be_faster(base: Features, more: Features) -> None:
    model = MODEL
    assert model.predict(base + more) >= model.predict(base) - 1e-9


@given(FEATURES, FEATURES)
def test_addition_adds_every_feature(one: Features, other: Features) -> None:
    total = one + other
    assert all(getattr(total, name) == getattr(one, name) + getattr(other, name) for name in NAMES)


def test_predicting_takes_microseconds() -> None:
    model, features = MODEL, Features(rows=40, context=9000, head_rows=8, train_rows=32)
    best = min(_time_of(lambda: [model.planned(features) for _ in range(200)]) for _ in range(20))
    assert best / 200 < 50e-6


def _time_of(work) -> float:  # type: ignore[no-untyped-def]
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@pytest.mark.parametrize("bad_ms", [0.0, -1.0, float("nan"), float("inf")])
def test_times_that_cannot_be_are_refused(bad_ms: float) -> None:
    with pytest.raises(LatencyModelError, match="rows=3"):
        LatencyModel.fit([(Features(rows=3), bad_ms)])


def test_no_samples_are_refused() -> None:
    with pytest.raises(LatencyModelError, match="no samples"):
        LatencyModel.fit([])


def test_a_machine_that_becomes_slower_is_followed_within_twenty_iterations() -> None:
    model, rng, f = fitted(), random.Random(3), Features(rows=8, context=4000, head_rows=8)
    for _ in range(100):
        model.observe(f, noisy(f, rng))
    for _ in range(20):
        model.observe(f, noisy(f, rng, slower=1.5))
    assert model.corrected(f) == pytest.approx(1.5 * machine_ms(f), rel=0.08)


def test_one_stall_hardly_changes_what_is_planned() -> None:
    model, rng, f = fitted(), random.Random(4), Features(rows=8, context=4000, head_rows=8)
    for _ in range(100):
        model.observe(f, noisy(f, rng))
    before = model.planned(f)
    model.observe(f, 10.0 * machine_ms(f))
    model.observe(f, noisy(f, rng))
    assert model.planned(f) == pytest.approx(before, rel=0.03)


def test_ninety_five_percent_stay_below_what_was_planned() -> None:
    model, rng, below = fitted(), random.Random(5), []
    for f in mixes(1500, seed=2):
        measured = noisy(f, rng)
        below.append(measured <= model.planned(f))
        model.observe(f, measured)
    assert mean(below[300:]) == pytest.approx(0.95, abs=0.03)


def test_the_margin_is_never_below_one() -> None:
    model, f = LatencyModel.fit([(Features(rows=1), 10.0)]), Features(rows=1)
    for i in range(300):
        model.observe(f, 10.0 * 0.99**i)
        assert model.margin(f) >= 1.0


def test_prompts_that_vary_do_not_make_decodes_look_uncertain() -> None:
    model, rng = fitted(), random.Random(6)
    decode, prompt = Features(rows=4, context=800, head_rows=4), Features(rows=68, context=9000, head_rows=5)
    for _ in range(300):
        model.observe(decode, machine_ms(decode))
        model.observe(prompt, machine_ms(prompt) * rng.uniform(0.6, 1.6))
    assert model.margin(prompt) > 1.2
    assert model.margin(decode) < 1.1


def test_a_slow_kind_of_iteration_does_not_raise_the_others() -> None:
    model, decode = fitted(), Features(rows=4, context=800, head_rows=4)
    backward = decode + Features(bwd_quanta=4, bwd_rows=64, bwd_context=16000)
    for _ in range(60):
        model.observe(decode, machine_ms(decode))
        model.observe(backward, 2.0 * machine_ms(backward))
    assert bucket(decode) != bucket(backward)
    assert model.corrected(decode) == pytest.approx(machine_ms(decode), rel=0.02)
    assert model.corrected(backward) == pytest.approx(2.0 * machine_ms(backward), rel=0.02)


def test_a_kind_not_seen_yet_starts_from_what_was_learned_of_the_others() -> None:
    model, seen, unseen = fitted(), Features(rows=4, head_rows=4), Features(rows=64, train_rows=60)
    before = model.corrected(unseen)
    for _ in range(60):
        model.observe(seen, 2.0 * model.predict(seen))
    assert model.corrected(unseen) == pytest.approx(2.0 * before, rel=0.05)


@pytest.mark.parametrize("measured_ms", [0.0, -5.0, float("nan"), float("inf")])
def test_a_broken_clock_teaches_nothing(measured_ms: float) -> None:
    model, f = fitted(), Features(rows=4, head_rows=4)
    before = model.planned(f)
    model.observe(f, measured_ms)
    model.observe(Features(), 5.0)
    assert model.planned(f) == before


def test_a_saved_model_predicts_and_plans_the_same(tmp_path: Path) -> None:
    model, path = fitted(), cache_path(tmp_path, KEY)
    model.save(path)
    loaded = LatencyModel.load(path, KEY)
    assert loaded is not None
    assert all(loaded.planned(f) == model.planned(f) for f in mixes(20, seed=3))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("changed", KEY)
def test_another_key_is_refused(tmp_path: Path, changed: str) -> None:
    fitted().save(tmp_path / "m.json")
    other = {**KEY, changed: "other"}
    assert LatencyModel.load(tmp_path / "m.json", other) is None
    assert cache_path(tmp_path, other) != cache_path(tmp_path, KEY)


def test_another_basis_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted().save(tmp_path / "m.json")
    monkeypatch.setattr("tokenloom.engine.latency_model.BASIS", "2")
    assert LatencyModel.load(tmp_path / "m.json", KEY) is None


def test_no_file_is_no_model(tmp_path: Path) -> None:
    assert LatencyModel.load(tmp_path / "absent.json", KEY) is None


@given(cut=st.integers(0, 200), change=st.binary(max_size=3))
def test_a_damaged_file_counts_as_absent_or_is_whole(
    tmp_path_factory: pytest.TempPathFactory, cut: int, change: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    MODEL.save(path)
    content = path.read_bytes()
    path.write_bytes(content[:cut] + change)
    assert LatencyModel.load(path, KEY) is None


@pytest.mark.parametrize(
    "field, value",
    [
        ("beta", [1.0]),
        ("beta", None),
        ("beta", [-1.0] * len(basis(Features()))),
        ("beta", [float("nan")] * len(basis(Features()))),
        ("residuals", [0.0]),
        ("residuals", ["x"]),
        ("key", None),
    ],
)
def test_values_that_cannot_be_count_as_absent(tmp_path: Path, field: str, value: object) -> None:
    path = tmp_path / "m.json"
    MODEL.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    assert LatencyModel.load(path, KEY) is None


@given(st.integers(0, 600), st.integers(-5, 700))
def test_bisection_finds_the_largest_that_fits(limit: int, last: int) -> None:
    assert bisect_rows(limit, lambda n: n <= last) == max(0, min(limit, last))


def test_the_grid_tells_every_term_from_the_others() -> None:
    terms = np.array([basis(cell.features()) for cell in profile_grid()], dtype=float)
    terms /= np.linalg.norm(terms, axis=0)
    assert np.linalg.matrix_rank(terms) == terms.shape[1]


def test_the_grid_has_no_cell_twice() -> None:
    assert len(set(profile_grid())) == len(profile_grid())


def test_the_machine_is_named_with_its_cores() -> None:
    name, _, cores = machine_key().rpartition(" x ")
    assert name
    assert int(cores) >= 1


MODEL = fitted()
