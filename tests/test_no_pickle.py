"""Unpickling runs whatever the bytes say, so nothing here can do it, and the linter keeps it that way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BANNED = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0]


def test_no_module_imports_a_pickler():
    found = {str(path): BANNED & set(imported(ast.parse(path.read_text()))) for path in SOURCES}
    assert len(found) > 100
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import dill",
        "import torch\n\ntorch.load('x')",
        "from torch import load",
        "from multiprocessing.connection import Client",
    ],
)
def test_the_linter_refuses_it(line):
    command = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--no-cache"]
    path = ["--stdin-filename", str(ROOT / "src/tokenloom/x.py"), "-"]
    checked = subprocess.run(
        [*command, *path], input=line, capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert "TID251" in checked.stdout
    assert '"TID251"' in (ROOT / "pyproject.toml").read_text().partition("select = ")[2].partition("]")[0]
