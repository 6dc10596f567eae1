"""Training through `LLM.finetune` and `tokenloom finetune`, and using the adapter afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import torch
from rich.console import Console

from test_cli import run
from tiny_models import build_tiny
from tokenloom import LLM, SamplingParams
from tokenloom.errors import RequestError
from tokenloom.finetune.local import StepReport, TrainingStopped, finetune_folder
from tokenloom.finetune_cli import Display, ServerError, follow, slo_state

ROWS = [
    {"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word * 3}]}
    for word in ("tin", "other", "the", "an", "sea", "bed", "on", "fine", "ring", "is", "it", "there")
]
OPTIONS: dict[str, Any] = {
    "n_epochs": 4,
    "batch_size": 4,
    "learning_rate": 0.02,
    "r": 4,
    "max_seq_tokens": 64,
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    return build_tiny(tmp_path_factory.mktemp("llama"), "llama", dtype=torch.float32)


@pytest.fixture
def llm(tiny: tuple[Path, Any]) -> LLM:
    return LLM(str(tiny[0]), cache__kv_bytes=8 * 2**20)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def test_training_lowers_the_loss_and_leaves_the_base_alone(llm: LLM, tmp_path: Path) -> None:
    before = llm.generate("say tin", GREEDY)[0].completions[0].token_ids
    result = llm.finetune(ROWS, tmp_path / "out", **OPTIONS)
    assert [step.step for step in result.steps] == list(range(1, 13))
    assert result.steps[-1].metrics["train_loss"] < 0.8 * result.steps[0].metrics["train_loss"]
    assert result.trained_tokens > 0 and llm.engine.pool.num_used == 0
    assert llm.generate("say tin", GREEDY)[0].completions[0].token_ids == before
    llm.load_adapter("tuned", result.adapter)
    assert llm.generate("say tin", GREEDY, adapter="tuned")[0].completions[0].token_ids != before
    assert llm.generate("say tin", GREEDY)[0].completions[0].token_ids == before


def test_the_adapter_gives_the_same_logits_in_peft(llm: LLM, tiny: tuple[Path, Any], tmp_path: Path) -> None:
    result = llm.finetune(ROWS, tmp_path / "out", **OPTIONS)
    llm.load_adapter("tuned", result.adapter)
    ids = llm.tokenizer.encode("say tin and then other")
    found = llm.score([ids], adapter="tuned")[0].total
    model = peft.PeftModel.from_pretrained(tiny[1], result.adapter)
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    model.unload()
    wanted = sum(float(logprobs[i, ids[i + 1]]) for i in range(len(ids) - 1))
    assert found == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 0}, "r: "),
        ({"n_epoch": 2}, "n_epoch: unknown option"),
        ({"learning_rate": "fast"}, "learning_rate: "),
        ({"target_modules": ["head"]}, "target_modules"),
        ({"early_stopping_patience": 2}, "early_stopping_patience: needs validation data"),
    ],
)
def test_a_wrong_option_is_named(llm: LLM, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        llm.finetune(ROWS, tmp_path / "out", **options)


def test_faulty_rows_are_named_by_their_lines(llm: LLM, tmp_path: Path) -> None:
    rows = [*ROWS, {"messages": [{"role": "user", "content": "no answer"}]}, {"text": "neither"}]
    with pytest.raises(RequestError, match=r"line 13: .*line 14: "):
        llm.finetune(rows, tmp_path / "out")


def test_an_unknown_adapter_is_named(llm: LLM) -> None:
    with pytest.raises(RequestError, match="'nobody'"):
        llm.generate("x", adapter="nobody")
    with pytest.raises(RequestError, match="'nobody'"):
        llm.unload_adapter("nobody")


def test_truncated_examples_are_reported(llm: LLM, tmp_path: Path) -> None:
    result = llm.finetune(ROWS, tmp_path / "out", n_epochs=1, max_seq_tokens=24)
    assert any("truncated" in warning for warning in result.warnings)


def test_a_stopped_run_goes_on_to_the_same_bits(llm: LLM, data: Path, tmp_path: Path) -> None:
    once = llm.finetune(data, tmp_path / "once", **OPTIONS)
    seen: list[int] = []

    def note(report: StepReport) -> None:
        seen.append(report.step)

    for stop_at in (2, 3, 7, 11):
        with pytest.raises(TrainingStopped):
            finetune_folder(
                llm.engine,
                data,
                tmp_path / "cut",
                on_step=note,
                stop=lambda at=stop_at: bool(seen) and seen[-1] >= at,  # type: ignore[misc]
                options=OPTIONS,
            )
    cut = llm.finetune(data, tmp_path / "cut", on_step=note, **OPTIONS)
    assert seen == list(range(1, 13))
    name = "adapter_model.safetensors"
    assert (cut.adapter / name).read_bytes() == (once.adapter / name).read_bytes()


def test_an_error_in_between_loses_nothing(llm: LLM, data: Path, tmp_path: Path) -> None:
    """Whatever is raised: the call can be made again, and ends with the bits of an undisturbed one."""
    once = llm.finetune(data, tmp_path / "once", **OPTIONS)
    failed = 0
    for at in (3, 5, 8, 12):

        def fail(report: StepReport, at: int = at) -> None:
            if report.step == at:
                raise RuntimeError("pulled out")

        with pytest.raises(RuntimeError, match="pulled out"):
            llm.finetune(data, tmp_path / "cut", on_step=fail, checkpoint_every_steps=2, **OPTIONS)
        failed += 1
        assert llm.engine.pool.num_used == 0
    cut = llm.finetune(data, tmp_path / "cut", checkpoint_every_steps=2, **OPTIONS)
    name = "adapter_model.safetensors"
    assert failed == 4 and (cut.adapter / name).read_bytes() == (once.adapter / name).read_bytes()


def test_a_folder_of_another_job_is_refused(llm: LLM, data: Path, tmp_path: Path) -> None:
    llm.finetune(data, tmp_path / "out", n_epochs=1, max_seq_tokens=64)
    with pytest.raises(RequestError, match=r"n_epochs"):
        llm.finetune(data, tmp_path / "out", n_epochs=2, max_seq_tokens=64)
    with pytest.raises(RequestError, match="data_sha256"):
        llm.finetune(ROWS[:11], tmp_path / "out", n_epochs=1, max_seq_tokens=64)


# -- the command line -----------------------------------------------------------------------------------


def command(tiny: tuple[Path, Any], data: Path, output: Path, *more: str) -> list[str]:
    flags = ["-m", str(tiny[0]), "-o", str(output), "--epochs", "2", "--batch-size", "4", "--rank", "4"]
    return ["finetune", str(data), *flags, "-O", "max_seq_tokens=64", *more]


def test_the_command_trains_and_says_how_to_use_it(
    tiny: tuple[Path, Any], data: Path, tmp_path: Path
) -> None:
    done = run(*command(tiny, data, tmp_path / "out", "--json"))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["step"] for line in lines[:-1]] == list(range(1, 7))
    assert all(line["total_steps"] == 6 and line["train_loss"] > 0 for line in lines[:-1])
    assert lines[-1] == {"adapter": str(tmp_path / "out" / "adapter")}
    shown = run(*command(tiny, data, tmp_path / "shown"))
    assert "tokenloom chat --adapter" in shown.stdout and "6/6" in shown.stdout
    answer = run("generate", "x", "-m", str(tiny[0]), "--adapter", str(tmp_path / "out" / "adapter"))
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "line 1: "),
        (["--rank", "0"], "r: "),
        (["-O", "nothing=1"], "nothing: unknown option"),
        (["--server", "http://127.0.0.1:9"], "--server"),
    ],
)
def test_the_command_names_what_is_wrong(
    tiny: tuple[Path, Any],
    data: Path,
    tmp_path: Path,
    more: list[str],
    words: str,
    refused: Callable[..., str],
) -> None:
    data.write_text('{"messages": []}\n' + data.read_text())
    stderr = refused(*command(tiny, data, tmp_path / "out", *more))
    assert words in stderr.replace("\n", " ") and "Traceback" not in stderr


def fake_server(statuses: list[str]) -> httpx.Client:
    """A job that is in each of the states in turn, with one more event each time."""
    calls = {"n": 0}

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/metrics":
            lines = [
                "tokenloom:num_requests_running 2",
                "tokenloom:time_to_first_token_seconds_count 4",
                "tokenloom:time_to_first_token_seconds_sum 2",
            ]
            return httpx.Response(200, text="\n".join(lines) + "\n")
        if request.url.path.endswith("/events"):
            events = [
                {
                    "id": f"e{i}",
                    "level": "info",
                    "type": "metrics",
                    "message": f"Step {i}",
                    "created_at": 1000 + i,
                    "data": {"step": i, "train_loss": 1.0 / i, "trained_tokens": 50 * i},
                }
                for i in range(calls["n"], 0, -1)
            ]
            return httpx.Response(200, json={"data": events, "has_more": False})
        status = statuses[min(calls["n"], len(statuses) - 1)]
        calls["n"] += 1
        error = {"message": "the loss became nan", "code": "x", "param": None}
        job = {"id": "j", "status": status, "fine_tuned_model": "ft:tiny::j"}
        return httpx.Response(200, json={**job, "error": error if status == "failed" else None})

    return httpx.Client(base_url="http://test", transport=httpx.MockTransport(answer))


def test_a_job_on_a_server_is_followed_to_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    client = fake_server(["validating_files", "running", "running", "succeeded"])
    assert follow(client, "j", Display(Console(stderr=True), True), lambda s: None) == "ft:tiny::j"
    steps = [json.loads(line)["step"] for line in capsys.readouterr().out.splitlines()]
    assert steps == [1, 2, 3, 4]
    assert slo_state(client) == "2 running, mean TTFT 500 ms"


@pytest.mark.parametrize(("status", "words"), [("failed", "the loss became nan"), ("paused", "is paused")])
def test_a_job_that_does_not_succeed_is_an_error(status: str, words: str) -> None:
    with pytest.raises(ServerError, match=words):
        follow(fake_server(["running", status]), "j", Display(Console(stderr=True), True), lambda s: None)
