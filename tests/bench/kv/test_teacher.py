"""Tokens forced through the engine: the same logits as in a prompt, and what is counted on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tiny_models import build_tiny
from tokenloom.bench.kv.teacher import TeacherEngine
from tokenloom.config import load_settings
from tokenloom.errors import RequestError
from tokenloom.methods.kv import combine

PROMPT = [(i * 7 + i * i) % 250 for i in range(100)]
GIVEN = [(i * 11) % 250 for i in range(20)]
LAYERS, KV_HEADS = 2, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("llama"), "llama")[0]


@pytest.fixture(scope="module")
def engine(folder: Path) -> TeacherEngine:
    flags = {
        "model.name": str(folder),
        "model.dtype": "float64",
        "scheduler.max_batch_tokens": 64,
        "scheduler.max_running": 4,
    }
    return TeacherEngine(load_settings({**flags, "cache.kv_bytes": 2**22}))


def test_dense_logits_are_those_of_a_prompt_with_all_tokens(engine: TeacherEngine, tmp_path: Path) -> None:
    run = engine.run(PROMPT, GIVEN)
    model = build_tiny(tmp_path, "llama")[1]
    with torch.no_grad():
        wanted = model(torch.tensor([PROMPT + GIVEN])).logits[0, len(PROMPT) - 1 : -1]
    torch.testing.assert_close(torch.stack(run.logits), wanted, atol=1e-4, rtol=1e-4)
    for i in (1, 7, 19):
        whole = engine.run(PROMPT + GIVEN[:i], GIVEN[i : i + 1])
        torch.testing.assert_close(run.logits[i], whole.logits[0], atol=1e-10, rtol=1e-10)
    assert run.tokens == GIVEN
    assert len(run.step_ms) == len(run.tokens_read) == len(GIVEN) - 1


def test_without_given_tokens_it_says_its_own(engine: TeacherEngine) -> None:
    run = engine.run(PROMPT, None, new_tokens=8)
    assert run.tokens == [int(row.argmax()) for row in run.logits]
    again = engine.run(PROMPT, run.tokens)
    assert all(torch.equal(a, b) for a, b in zip(run.logits, again.logits, strict=True))


def test_a_budget_above_the_length_reads_everything(engine: TeacherEngine) -> None:
    dense = engine.run(PROMPT, GIVEN)
    for spec in (
        "snapkv(budget=500)",
        "streaming(budget=500)",
        "quest(budget=500)",
        "tokenselect(budget=500, chunk=32)",
    ):
        run = engine.run(PROMPT, GIVEN, combine(spec))
        assert all(torch.equal(a, b) for a, b in zip(run.logits, dense.logits, strict=True)), spec
        assert run.tokens_read == dense.tokens_read
        assert run.kv_bytes == dense.kv_bytes


def test_dense_rows_read_all_before_them(engine: TeacherEngine) -> None:
    run = engine.run(PROMPT, GIVEN)
    assert run.tokens_read == [len(PROMPT) + i for i in range(1, len(GIVEN))]


def _bytes(engine: TeacherEngine, tokens: int) -> int:
    """Of so many tokens of every layer and head, in whole blocks: keys and values in float64."""
    size = engine.pool.block_size
    return -(-tokens // size) * size * 2 * LAYERS * KV_HEADS * 16 * 8


@pytest.mark.parametrize(
    "spec",
    [
        "snapkv(budget=40, window=8)",
        "keydiff(budget=40, window=8)",
        "snapkv(budget=40, window=8)+adakv",
        "snapkv(budget=40, window=8)+pyramid",
    ],
)
def test_bytes_after_the_prompt_are_the_budgets(engine: TeacherEngine, spec: str) -> None:
    run = engine.run(PROMPT, GIVEN, combine(spec))
    assert run.kv_bytes[0] == _bytes(engine, 40)
    ragged = "+" in spec
    fed = len(GIVEN) - 1
    end = _bytes(engine, 40) + _bytes(engine, fed) if ragged else _bytes(engine, 40 + fed)
    assert run.kv_bytes[-1] == end
    assert run.tokens_read == [40 + i for i in range(1, len(GIVEN))]
    assert run.peak_bytes == _bytes(engine, len(PROMPT))
    assert engine.pool.num_used == 0


def test_a_ring_stays_as_large_as_its_budget(engine: TeacherEngine) -> None:
    run = engine.run(PROMPT, GIVEN, combine("streaming(budget=32)"))
    assert run.kv_bytes[0] == _bytes(engine, 32)
    assert set(run.kv_bytes[1:]) == {_bytes(engine, 32 + 1)}  # the newest comes before the oldest goes


def test_what_does_not_fit_the_context_is_refused(engine: TeacherEngine) -> None:
    with pytest.raises(RequestError, match="512"):
        engine.run(PROMPT, [1] * 500)
    assert not engine.has_work


def test_selectors_keep_all_and_read_few(engine: TeacherEngine) -> None:
    run = engine.run(PROMPT, GIVEN, combine("tokenselect(budget=24, theta=1.0, chunk=32)"))
    assert run.tokens_read == [24] * (len(GIVEN) - 1)
    assert run.kv_bytes[0] == _bytes(engine, len(PROMPT))
    run = engine.run(PROMPT, GIVEN, combine("quest(budget=48, dense_layers=1)"))
    assert all(
        (len(PROMPT) + 48 - 16) / 2 < read < (len(PROMPT) + 20 + 48) / 2 + 1 for read in run.tokens_read
    )
