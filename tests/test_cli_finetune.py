"""`tokenloom finetune` as users meet it: stopped and taken up again, on a server, and given nonsense."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from rich.console import Console

from test_cli import run
from tiny_models import build_tiny
from tokenloom.finetune_cli import Display, ServerError, create, follow

ROWS = [{"prompt": f"say {word}:", "completion": f" {word}"} for word in ("sea", "bed", "ring", "tin") * 3]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("llama"), "llama", dtype=torch.float32)[0]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


@contextlib.contextmanager
def started(*args: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The command as a process whose lines can be read while it runs; ended with SIGINT."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tokenloom", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200", "PYTHONUNBUFFERED": "1", **environment},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)


def one_line(stderr: str, words: str) -> bool:
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    return len(lines) == 1 and words in lines[0] and "Traceback" not in stderr


# -- here -----------------------------------------------------------------------------------------------


def test_a_ctrl_c_saves_and_the_same_command_goes_on(folder: Path, data: Path, tmp_path: Path) -> None:
    def command(output: str) -> list[str]:
        options = ["--epochs", "12", "--batch-size", "1", "--rank", "2", "--dropout", "0.1", "--json"]
        return ["finetune", str(data), "-m", str(folder), "-o", str(tmp_path / output), *options]

    with started(*command("cut")) as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        rest, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and one_line(stderr, "the state is saved"), stderr
    seen = [first["step"], *(json.loads(line)["step"] for line in rest.splitlines())]
    assert seen[-1] < 144  # it did stop
    done = run(*command("cut"))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["step"] for line in lines[:-1]] == list(range(seen[-1] + 1, 145))
    assert run(*command("once")).returncode == 0
    cut, once = (tmp_path / name / "adapter" / WEIGHTS for name in ("cut", "once"))
    assert cut.read_bytes() == once.read_bytes()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--output", "{file}"], "{file}"),
        (["--output", "{file}/below"], "{file}"),
        (["--target-modules", "q_proj, head"], "target_modules"),
        (["--option", "seed=3"], "seed: unknown option"),
        (["--seed", "-1"], "seed: "),
        (["--validation", "[/nowhere]"], "[/nowhere]"),
        (["--server", "http://x:port"], "--server http://x:port: "),
        (["--server", "localhost"], "--server"),
        (["--server", "http://127.0.0.1:9", "--rank", "0"], "r: "),
    ],
)
def test_what_is_wrong_is_one_line(
    folder: Path, data: Path, tmp_path: Path, args: list[str], words: str, refused: Callable[..., str]
) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    given = [arg.format(file=file) for arg in args]
    stderr = refused("finetune", str(data), "-m", str(folder), "-o", str(tmp_path / "out"), *given)
    assert one_line(stderr, words.format(file=file)), stderr


@pytest.mark.parametrize("command", [["generate", "x"], ["chat"]])
def test_an_adapter_that_is_none_is_one_line(
    folder: Path, tmp_path: Path, command: list[str], refused: Callable[..., str]
) -> None:
    stderr = refused(*command, "-m", str(folder), "--adapter", str(tmp_path))
    assert one_line(stderr, "adapter_config.json"), stderr


def test_warnings_do_not_disturb_the_lines_for_programs(folder: Path, data: Path, tmp_path: Path) -> None:
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:3]))
    output = str(tmp_path / "out")
    done = run("finetune", str(data), "-m", str(folder), "-o", output, "--epochs", "1", "--json")
    assert "only 3 examples" in done.stderr
    assert [set(json.loads(line)) >= {"step", "train_loss"} for line in done.stdout.splitlines()][:-1] == [
        True,
        True,
        True,
    ]


# -- on a server ----------------------------------------------------------------------------------------


def test_a_real_server_trains_and_then_answers_by_the_new_name(
    folder: Path, data: Path, tmp_path: Path
) -> None:
    serve = ("serve", "-m", str(folder), "--port", "0", "--api-key", "k", "--set", "coserve.mode=temporal")
    with started(*serve, TOKENLOOM_HOME=str(tmp_path)) as process:
        assert process.stdout is not None
        found = (re.search(r"http://127\.0\.0\.1:\d+", line) for line in process.stdout)
        url = next(match.group() for match in found if match)
        server = ("--server", url, "--api-key", "k", "--suffix", "sailor")
        flags = ("--epochs", "2", "--batch-size", "4", "--rank", "2", "--validation", str(data), "--json")
        done = run("finetune", str(data), *server, *flags)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert [line["step"] for line in lines[:-1]] == list(range(1, 7))
        name = lines[-1]["fine_tuned_model"]
        assert ":sailor:" in name
        body = {"model": name, "prompt": "say sea:", "max_tokens": 3}
        headers = {"authorization": "Bearer k"}
        answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)
        assert answer.status_code == 200 and answer.json()["model"] == name
        done = run("finetune", str(data), "--server", url, "--json")
        assert done.returncode == 1 and one_line(done.stderr, "/v1/models: "), done.stderr


def client_of(answer: Callable[[httpx.Request], httpx.Response]) -> httpx.Client:
    return httpx.Client(base_url="http://test", transport=httpx.MockTransport(answer))


def test_a_job_is_asked_for_with_what_was_given_and_no_more(data: Path) -> None:
    bodies: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "base"}]})
        if request.url.path == "/v1/files":
            assert data.read_bytes() in request.read() and b"fine-tune" in request.content
            return httpx.Response(200, json={"id": "file-1"})
        bodies.append(json.loads(request.content))
        return httpx.Response(200, json={"id": "ftjob-1"})

    options = {"n_epochs": 2, "r": 4, "target_modules": ["q_proj"]}
    assert create(client_of(answer), None, data, None, "mine", 7, options) == "ftjob-1"
    assert bodies == [
        {
            "model": "base",
            "training_file": "file-1",
            "seed": 7,
            "hyperparameters": {"n_epochs": 2},
            "lora": {"r": 4, "target_modules": ["q_proj"]},
            "suffix": "mine",
        }
    ]


@pytest.mark.parametrize(
    ("response", "words"),
    [
        (httpx.Response(200, text="<html>"), "did not answer JSON"),
        (httpx.Response(200, json=[1]), "did not answer a JSON object"),
        (httpx.Response(200, json={"data": []}), "names no model"),
        (httpx.Response(404, json={"detail": "Not Found"}), "404"),
        (httpx.Response(500, json={"error": "broken"}), "500"),
        (httpx.Response(401, json={"error": {"message": "give a key"}}), "give a key"),
    ],
)
def test_a_server_that_is_none_of_ours_is_named(data: Path, response: httpx.Response, words: str) -> None:
    with pytest.raises(ServerError, match=words):
        create(client_of(lambda request: response), None, data, None, None, 0, {})


EVENTS = [
    {"id": "e0", "level": "info", "type": "message", "message": "begins [/] [now]", "created_at": 90},
    *(
        {
            "id": f"e{i}",
            "level": "info",
            "type": "metrics",
            "message": f"Step {i}",
            "created_at": 100 + 10 * i,
            "data": {"step": i, "train_loss": 1.0 / i, "trained_tokens": 200 * i},
        }
        for i in range(1, 251)
    ),
]


def job_server(status: Callable[[], str], **fields: Any) -> httpx.Client:
    """A job with 251 events, in pages of at most 100."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/metrics":
            return httpx.Response(404)
        if request.url.path.endswith("/events"):
            newest = EVENTS[::-1]
            after = request.url.params.get("after")
            begin = 1 + [event["id"] for event in newest].index(after) if after else 0
            page = newest[begin : begin + int(request.url.params["limit"])]
            return httpx.Response(200, json={"data": page, "has_more": begin + len(page) < len(newest)})
        job = {"id": "j", "status": status(), "fine_tuned_model": "ft:j", "error": None}
        return httpx.Response(200, json=job | fields)

    return client_of(answer)


def test_each_event_is_shown_once_in_order_over_pages(capsys: pytest.CaptureFixture[str]) -> None:
    statuses = iter(["running", "running", "succeeded"])
    client = job_server(lambda: next(statuses))
    display = Display(Console(stderr=True), True)
    assert follow(client, "j", display, lambda seconds: None) == "ft:j"
    shown = capsys.readouterr()
    lines = [json.loads(line) for line in shown.out.splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 251))
    assert lines[-1]["tokens_per_s"] == 20.0
    assert "begins [/] [now]" in shown.err  # as it is, not as markup


def test_the_bar_tells_loss_speed_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    client = job_server(lambda: "succeeded", estimated_finish=int(time.time()) + 3700)
    follow(client, "j", Display(Console(width=200), False), lambda seconds: None)
    shown = capsys.readouterr().out
    assert re.search(r"step +250/.*loss 0\.0040 .*20 tokens/s .*1:01:\d\d left", shown), shown


def test_a_ctrl_c_leaves_the_job_running_and_says_how_to_end_it() -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    asked: list[str] = []
    client = job_server(lambda: "running")
    client.event_hooks = {"request": [lambda request: asked.append(request.method)]}
    with pytest.raises(ServerError, match=r"goes on .*http://test/v1/fine_tuning/jobs/j .*j/cancel ends it"):
        follow(client, "j", Display(Console(stderr=True), True), interrupt)
    assert set(asked) == {"GET"}
