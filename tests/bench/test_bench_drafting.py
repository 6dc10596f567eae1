"""`tokenloom bench drafting`: its prompts, its figures, and the command."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from tiny_models import build_tiny
from tokenloom import LLM
from tokenloom.bench.drafting.curves import print_warming, specs_of, warming
from tokenloom.bench.drafting.ppd_accuracy import accuracy, print_accuracy
from tokenloom.bench.drafting.prompts import KINDS, build
from tokenloom.bench.drafting.run import measure, repeated
from tokenloom.cli import app
from tokenloom.errors import RequestError
from tokenloom.methods.drafting import draft_method
from tokenloom.methods.drafting.ppd_training import Trained, keep


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
    assert [sum(a[key] for a in drafted["answers"]) for key in ("tokens", "passes")] == [
        drafted["tokens"],
        drafted["passes"],
    ]
    assert drafted["guessing_ms_per_pass"] > off["guessing_ms_per_pass"] > 0
    assert drafted["tokens_per_pass"] == drafted["tokens"] / drafted["passes"]


def test_no_drafter_learns_from_what_another_has_seen(llm: LLM) -> None:
    spec = "token_recycling(tree=chain4)"
    options = {"temperatures": [0.0], "count": 2, "new_tokens": 12}
    alone = measure(llm, [spec], ["chat"], **options)["rows"][1]
    beside = measure(llm, ["token_recycling(tree=n16)", spec], ["chat"], **options)["rows"][2]
    times = {"tokens_per_s", "speedup", "guessing_ms_per_pass"}
    assert {k: v for k, v in alone.items() if k not in times} == {
        k: v for k, v in beside.items() if k not in times
    }


def test_a_warming_curve_goes_through_all_workloads(llm: LLM) -> None:
    spec = "token_recycling(tree=n8)"
    options = {"temperatures": [0.0], "count": 2, "new_tokens": 12}
    results = measure(llm, [spec], ["chat", "arithmetic"], **options)
    [curve] = warming(results)
    assert (curve["spec"], len(curve["answers"])) == (spec, 4)
    assert curve["answers"][2] == results["rows"][3]["answers"][0]
    out = Console(file=io.StringIO(), width=200)
    print_warming(results, out)
    first = curve["answers"][0]
    assert f"{first['tokens'] / first['passes']:.2f} (" in out.file.getvalue()  # type: ignore[attr-defined]


def test_what_lies_on_a_curve_can_be_asked_for() -> None:
    specs = specs_of(["k", "tree"])
    assert len(specs) == 9 and all(draft_method(spec) for spec in specs)
    with pytest.raises(RequestError, match="depth"):
        specs_of(["depth"])


def test_ppds_accuracy_stands_beside_the_papers(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path))
    table = torch.tensor([[0.5, *[0.02] * 9], [0.25, *[0.01] * 9]])
    keep(llm.engine, Trained(torch.zeros(2, 64)), table, {})
    out = Console(file=io.StringIO(), width=200)
    print_accuracy(accuracy(llm.engine), "mine", out)
    lines = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
    [mine] = [line.split()[1:] for line in lines if "mine" in line]
    assert mine == ["50%", "68%", "25%", "34%"]
    assert any("Vicuna-7B" in line and "48%" in line and "85%" in line for line in lines)


def test_repetitions_are_grams_that_were_there_before() -> None:
    assert repeated(list(range(30))) == 0.0
    assert repeated([1, 2] * 11) == pytest.approx(13 / 15)
    assert repeated([1, 2, 3]) == 0.0


def test_an_unknown_workload_is_named(llm: LLM) -> None:
    with pytest.raises(RequestError, match="poetry"):
        measure(llm, ["ngram"], ["poetry"])


def test_the_command_prints_and_writes(folder: str, tmp_path: Path) -> None:
    args = ["bench", "drafting", "ngram", "-m", folder, "--workload", "arithmetic", "--temperature", "0"]
    args.append("--warming")
    done = CliRunner().invoke(app, [*args, "--prompts", "1", "--new-tokens", "8", "-o", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "ngram" in done.output and "arithmetic" in done.output and "by answer" in done.output
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == 2
