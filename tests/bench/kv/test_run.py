"""Methods times budgets times probes: what is run, and what is reported of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tiny_models import build_tiny
from tokenloom.bench.kv import report
from tokenloom.bench.kv.probes import KINDS, Sizes, parse_depths
from tokenloom.bench.kv.quality import overlap, quality
from tokenloom.bench.kv.run import measure
from tokenloom.bench.kv.specs import candidates, default_specs, parse_budgets
from tokenloom.config import load_settings
from tokenloom.engine.engine import Engine
from tokenloom.errors import RequestError

SIZES = Sizes(prompt_tokens=300, rows=8, copy_tokens=200, depths=(0.5,), keys=2, asked=1)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = build_tiny(
        tmp_path_factory.mktemp("llama"), "llama", torch.float32, max_position_embeddings=1024
    )[0]
    settings = load_settings({"model.name": str(folder), "cache.kv_bytes": 2**23})
    specs = ["snapkv(window=8)", "tokenselect", "int8", "tokenselect(budget=64, chunk=4096)"]
    return measure(settings, candidates(specs, [32, 64]), list(KINDS), SIZES)


def test_budgets_go_into_the_first_method_that_takes_one() -> None:
    specs = ["snapkv+adakv", "adakv+snapkv(window=8)", "streaming()", "quest(budget=7)", "int8"]
    found = [(c.spec, c.family, c.budget) for c in candidates(specs, [64])]
    assert found == [
        ("off", "off", None),
        ("snapkv(budget=64)+adakv", "snapkv+adakv", 64),
        ("adakv+snapkv(window=8, budget=64)", "adakv+snapkv(window=8)", 64),
        ("streaming(budget=64)", "streaming()", 64),
        ("quest(budget=7)", "quest(budget=7)", None),
        ("int8", "int8", None),
    ]


def test_budgets_are_tokens_parts_or_the_papers_grid() -> None:
    assert parse_budgets("64, 0.25,12.5%") == [64, 0.25, 0.125]
    assert parse_budgets("grid") == [0.75, 0.5, 0.25, 0.125]
    with pytest.raises(RequestError, match="budget: 'few%' is not"):
        parse_budgets("few%")


def test_depths_are_parts_of_a_prompt() -> None:
    assert parse_depths("0,0.5, 1") == (0.0, 0.5, 1.0)
    for wrong in ("", "deep", "0.5,1.1"):
        with pytest.raises(RequestError, match="depths: "):
            parse_depths(wrong)


def test_a_prompt_that_is_reused_is_computed_once_and_tells_the_same(tmp_path: Path) -> None:
    folder = str(build_tiny(tmp_path, "llama", max_position_embeddings=1024)[0])
    settings = load_settings({"model.name": folder, "model.dtype": "float64", "cache.kv_bytes": 2**23})
    found = candidates(["snapkv(window=8)", "quest(page=4)", "h2o(min_prompt=0)"], [0.25])
    sizes = Sizes(prompt_tokens=300, rows=8, depths=(0.3, 0.8))
    kinds, computed = ["needle", "text"], []
    run = Engine.run_pass

    def spy(self: Engine, plan: Any, train_rows: int) -> Any:
        computed[-1] += plan.num_rows
        return run(self, plan, train_rows)

    both = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "run_pass", spy)
        for reuse in (False, True):
            computed.append(0)
            both.append(measure(settings, found, kinds, sizes, reuse_prompts=reuse))
    for fresh, reused in zip(both[0]["methods"], both[1]["methods"], strict=True):
        for group in ("needle", "text"):
            for number in ("nll", "kl", "kv_bytes", "tokens_read"):
                expected = pytest.approx(fresh["groups"][group][number], abs=1e-8)
                assert reused["groups"][group][number] == expected
    # Of four computations of each of three prompts one is left, and h2o's, which must see all rows.
    assert 3 * 2 * 300 <= computed[1] < computed[0] * 0.7


def test_specs_are_checked_before_anything_runs() -> None:
    for spec in ("snapvk", "snapkv(", "snapkv+keydiff"):
        with pytest.raises(RequestError):
            candidates([spec], [64])
    with pytest.raises(RequestError, match="budget"):
        parse_budgets("64,many")
    assert parse_budgets("64, 0.25") == [64, 0.25]
    assert {"snapkv", "streaming", "quest", "tokenselect"} <= set(default_specs())
    assert "adakv" not in default_specs()


def test_every_method_has_every_number(results: dict[str, Any]) -> None:
    again = json.loads(json.dumps(results, allow_nan=False))
    assert again["version"] == 1
    assert {"date", "model", "machine", "threads", "text", "seed", "sizes"} <= set(again)
    dense, *methods = again["methods"]
    groups = {"text", "copy early", "copy middle", "copy late", "needle", "multikey", "summary"}
    assert set(dense["groups"]) == groups | {"copy absent"}
    numbers = {"prompt_tokens", "nll", "kl", "agreement", "accuracy", "exact"}
    numbers |= {"kv_bytes", "kv_bytes_end", "kv_bytes_peak", "tokens_read", "ttft_ms", "tpot_ms"}
    for row in methods[:-1]:
        assert row["error"] is None
        assert set(row["groups"]) == groups
        for name, group in row["groups"].items():
            assert set(group) == (numbers | {"overlap"} if name == "summary" else numbers)
            assert all(math.isfinite(number) for number in group.values())
            assert group["kl"] > -1e-6


def test_dense_attention_is_like_itself(results: dict[str, Any]) -> None:
    groups = results["methods"][0]["groups"]
    assert all(group["kl"] == 0 and group["agreement"] == 1 for group in groups.values())
    assert groups["summary"]["overlap"] == groups["summary"]["exact"] == 1


def test_bytes_follow_budgets_and_storage(results: dict[str, Any]) -> None:
    bytes_of = {row["spec"]: row["groups"]["text"]["kv_bytes"] for row in results["methods"] if row["groups"]}
    assert bytes_of["snapkv(window=8, budget=32)"] * 2 == bytes_of["snapkv(window=8, budget=64)"]
    assert bytes_of["tokenselect(budget=32)"] == bytes_of["off"]
    # 16 numbers in 8 bits and a scale, instead of 16 in 32.
    assert bytes_of["int8"] / bytes_of["off"] == (16 + 4) / (16 * 4)


def test_what_the_engine_refuses_is_named_and_left_out(results: dict[str, Any]) -> None:
    row = results["methods"][-1]
    assert "chunk=4096" in row["error"]
    console = Console(width=200, record=True)
    report.print_table(results, console)
    text = console.export_text()
    assert "left out: tokenselect(budget=64, chunk=4096)" in text
    assert "snapkv(window=8, budget=32)" in text


def test_files_are_written(results: dict[str, Any], tmp_path: Path) -> None:
    files = report.write(results, tmp_path / "new" / "folder")
    assert [file.name for file in files] == ["results.json", "pareto.png"]
    assert json.loads(files[0].read_text()) == json.loads(json.dumps(results))
    assert files[1].stat().st_size > 10_000


def test_the_pareto_front_holds_what_is_cheap_or_good() -> None:
    points = [(1.0, 5.0), (2.0, 6.0), (2.0, 3.0), (3.0, 3.0), (4.0, 1.0)]
    assert report.pareto(points, less_is_better=True) == [(1.0, 5.0), (2.0, 3.0), (4.0, 1.0)]
    assert report.pareto(points, less_is_better=False) == [(1.0, 5.0), (2.0, 6.0)]


def test_quality_by_hand() -> None:
    dense = [torch.tensor([0.25, 0.75]).log(), torch.tensor([0.5, 0.5]).log() + 3]
    ours = [torch.tensor([0.5, 0.5]).log() - 1, torch.tensor([0.1, 0.9]).log()]
    found = quality(ours, dense, [1, 1], (range(0, 1), range(1, 2)))
    kl = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    kl += 0.5 * math.log(0.5 / 0.1) + 0.5 * math.log(0.5 / 0.9)
    assert found["kl"] == pytest.approx(kl / 2)
    assert found["nll"] == pytest.approx(-(math.log(0.5) + math.log(0.9)) / 2)
    assert found["accuracy"] == found["exact"] == 0.5


def test_overlap_is_of_the_longest_common_subsequence() -> None:
    assert overlap([1, 2, 3, 4], [1, 9, 3, 4]) == 0.75
    assert overlap([], []) == 0.0
    assert overlap([1], [1, 1, 1]) == 0.5
