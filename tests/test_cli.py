"""The command line as a user types it: real processes, real output, one-line errors."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from tiny_models import build_tiny
from tokenloom import LLM, SamplingParams, __version__
from tokenloom.cli import app


def run(*args: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tokenloom", *args],
        check=False,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "200", **environment},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("llama"), "llama")[0]


def test_version() -> None:
    assert run("--version").stdout.strip() == f"tokenloom {__version__}"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["generate", "x", "-m", "smollm2-135m-instuct"], "smollm2-135m-instruct"),
        (["generate", "x", "-m", "/nowhere/model.gguf"], "/nowhere/model.gguf"),
        (["models", "show", "nothing-like-it"], "nothing-like-it"),
        (["serve", "--port", "70000"], "server.port"),
        (["generate", "x", "--dtype", "int3"], "model.dtype"),
        (["generate", "x", "--set", "cache.blocksize=3"], "cache.blocksize"),
        (["generate", "x", "--temperature", "nan"], "temperature"),
    ],
)
def test_bad_input_is_one_line_that_names_it(
    args: list[str], words: str, folder: Path, refused: Callable[..., str]
) -> None:
    if args[0] == "generate" and "-m" not in args:
        args = [*args, "-m", str(folder)]
    stderr = refused(*args)
    assert "Traceback" not in stderr
    assert re.search(rf"error: .*{re.escape(words)}", stderr.replace("\n", " "))


def test_corrupt_weights_are_named(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = run("generate", "x", "-m", str(tmp_path))
    assert done.returncode == 1
    assert "model.safetensors" in done.stderr and "Traceback" not in done.stderr


def test_generate_equals_the_python_api(folder: Path) -> None:
    done = run("generate", "-", "-m", str(folder), "--max-tokens", "12", stdin="hello")
    expected = LLM(str(folder)).generate("hello", SamplingParams(temperature=0, max_tokens=12))[0].text
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected + "\n"


def test_generate_compresses_what_comes_before_the_question(folder: Path) -> None:
    spec, text = "snapkv(budget=8, window=4)", "once upon a time a boat came to the shore; why?"
    done = run(
        "generate", text, "-m", str(folder), "--kv", spec, "--compress-upto", "30", "--max-tokens", "9"
    )
    llm, params = LLM(str(folder)), SamplingParams(temperature=0, max_tokens=9)
    assert done.stdout == llm.generate(text, params, kv=spec, compress_upto=30)[0].text + "\n", done.stderr
    deltas = llm.stream(text, params, kv=spec, compress_upto=30)
    assert "".join(delta.text for delta in deltas) + "\n" == done.stdout
    assert llm.generate(text, params, kv=spec)[0].text + "\n" != done.stdout


def test_chat_compresses_the_first_messages(folder: Path) -> None:
    args = ["chat", "-m", str(folder), "--temperature", "0", "--max-tokens", "8", "--system", "be a " * 20]
    spec = "snapkv(budget=8, window=4)"
    done = CliRunner().invoke(app, [*args, "--kv", spec, "--compress-upto", "1"], input="hi\n/exit\n")
    messages = [{"role": "system", "content": "be a " * 20}, {"role": "user", "content": "hi"}]
    params = SamplingParams(temperature=0, top_p=0.9, max_tokens=8)
    [output] = LLM(str(folder)).chat(messages, params, kv=spec, compress_upto=1)
    assert output.text in done.stdout and done.exit_code == 0, done.stderr


def test_generate_json_gives_one_object_per_answer(folder: Path) -> None:
    done = run("generate", "a", "-m", str(folder), "--n", "2", "--json", "--max-tokens", "3")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == 2 and set(answers[0]) == {"text", "tokens", "finish_reason"}


def test_chat_keeps_history_and_resets(folder: Path) -> None:
    lines = "hi\n/reset\nhi\n/exit\n"
    done = run("chat", "-m", str(folder), "--temperature", "0", "--max-tokens", "8", stdin=lines)
    assert done.returncode == 0, done.stderr
    answers = done.stdout.split("you>")[1:]
    assert answers[0] == answers[2]  # after the reset the first question gets the first answer again


def test_models_list_and_show(folder: Path) -> None:
    assert "smollm2-135m-instruct" in run("models", "list").stdout
    shown = run("models", "show", str(folder)).stdout
    assert "llama" in shown and "layers" in shown


def test_bench_reports_json_with_a_profile(folder: Path) -> None:
    done = run(
        *("bench", "-m", str(folder), "--prompt-tokens", "16", "--new-tokens", "4", "--repeats", "1"),
        *("--streams", "1", "--streams", "2", "--profile", "--json"),
    )
    results = json.loads(done.stdout)
    assert [row["streams"] for row in results["decode"]] == [1, 2]
    assert results["prefill"]["tokens_per_s"] > 0
    assert {"schedule", "train", "build", "layers", "head", "sample", "publish", "overhead"} == set(
        results["decode"][0]["phases_ms"]
    )


def test_serve_announces_serves_and_stops_on_sigterm(folder: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tokenloom", "serve", "-m", str(folder), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200", "PYTHONUNBUFFERED": "1", "TOKENLOOM_HOME": str(tmp_path)},
    )
    assert process.stdout is not None
    try:
        url = ""
        for line in process.stdout:
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            if found:
                url = found.group()
                break
        assert httpx.get(f"{url}/health", timeout=30).json()["status"] == "ok"
        body = {
            "model": httpx.get(f"{url}/v1/models").json()["data"][0]["id"],
            "prompt": "a",
            "max_tokens": 3,
        }
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=30).status_code == 200
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 0
