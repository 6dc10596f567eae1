"""`tokenloom bench drafting`: its prompts, its figures, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tiny_models import build_tiny
from tokenloom import LLM
from tokenloom.bench.drafting.prompts import KINDS, build
from tokenloom.bench.drafting.run import measure, repeated
from tokenloom.cli import app
from tokenloom.errors import RequestError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    # Prompts of bytes are long.
    return str(build_tiny(tmp_path_factory.mktemp("llama"), "llama", max_position_embeddings=8192)[0])


@pytest.fixture(scope="module")
def llm(folder: str) -> LLM:
    return LLM(folder, drafting__persist=False, cache__prefix_caching=False, cache__kv_bytes=2**25)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_differ_and_can_be_made_again(llm: LLM, kind: str) -> None:
    made = build(llm.tokenizer, kind, 3, seed=1)
    assert len(set(map(tuple, made))) == 3
    assert build(llm.tokenizer, kind, 3, seed=1) == made != build(llm.tokenizer, kind, 3, seed=2)


def test_figures_add_up(llm: LLM) -> None:
    results = measure(
        llm, ["ngram(fixed=True)"], ["arithmetic"], temperatures=[0.0], count=2, new_tokens=60, streams=2
    )
    off, drafted = results["rows"]
    assert (off["tokens"], off["passes"], off["speedup"], off["drafted"]) == (118, 118, 1.0, 0)
    assert drafted["same_text"] and drafted["tokens"] <= 118 and drafted["passes"] < drafted["tokens"]
    assert drafted["accepted"] == sum(drafted["accepted_at"]) > 0
    assert drafted["tokens_per_pass"] == drafted["tokens"] / drafted["passes"]


def test_no_drafter_learns_from_what_another_has_seen(llm: LLM) -> None:
    spec = "token_recycling(tree=chain4)"
    options = {"temperatures": [0.0], "count": 2, "new_tokens": 12}
    alone = measure(llm, [spec], ["chat"], **options)["rows"][1]
    beside = measure(llm, ["token_recycling(tree=n16)", spec], ["chat"], **options)["rows"][2]
    assert {k: v for k, v in alone.items() if "tokens_per_s" not in k and k != "speedup"} == {
        k: v for k, v in beside.items() if "tokens_per_s" not in k and k != "speedup"
    }


def test_repetitions_are_grams_that_were_there_before() -> None:
    assert repeated(list(range(30))) == 0.0
    assert repeated([1, 2] * 11) == pytest.approx(13 / 15)
    assert repeated([1, 2, 3]) == 0.0


def test_an_unknown_workload_is_named(llm: LLM) -> None:
    with pytest.raises(RequestError, match="poetry"):
        measure(llm, ["ngram"], ["poetry"])


def test_the_command_prints_and_writes(folder: str, tmp_path: Path) -> None:
    args = ["bench", "drafting", "ngram", "-m", folder, "--workload", "arithmetic", "--temperature", "0"]
    done = CliRunner().invoke(app, [*args, "--prompts", "1", "--new-tokens", "8", "-o", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "ngram" in done.output and "arithmetic" in done.output
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == 2
