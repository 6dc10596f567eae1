"""`tokenloom bench kv` as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tiny_models import build_tiny


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tokenloom", "bench", *args],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "200"},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny(tmp_path_factory.mktemp("llama"), "llama")[0])


def test_it_compares_and_writes(folder: str, tmp_path: Path) -> None:
    options = ["--budget", "32", "--probe", "text,needle", "--prompt-tokens", "200", "--rows", "8"]
    options += ["--depths", "0.5", "--reuse-prompts"]
    done = run("kv", "snapkv(window=8)", "streaming", *options, "-m", folder, "-o", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "streaming(budget=32)" in done.stdout and "pareto.png" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["spec"] for row in results["methods"]][1:] == [
        "snapkv(window=8, budget=32)",
        "streaming(budget=32)",
    ]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["snapvk"], "snapvk"),
        (["snapkv", "--probe", "haystack"], "haystack"),
        (["snapkv", "--budget", "few"], "few"),
        (["snapkv", "--depths", "deep"], "depths"),
        (["snapkv", "--prompt-tokens", "5000"], "context"),
    ],
)
def test_bad_input_is_one_line_that_names_it(
    args: list[str], words: str, folder: str, refused: Callable[..., str]
) -> None:
    stderr = refused("bench", "kv", *args, "-m", folder)
    assert "Traceback" not in stderr
    assert words in stderr and "error:" in stderr


def test_bench_alone_measures_speed_as_before(folder: str) -> None:
    sizes = ["--prompt-tokens", "8", "--new-tokens", "4", "--streams", "1", "--repeats", "1"]
    done = run("-m", folder, *sizes, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["decode"][0]["streams"] == 1
