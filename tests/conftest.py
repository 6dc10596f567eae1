"""Shared fixtures. The tests folder is importable, so that tests can use `tiny_models`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers, and the servers that they start, share the cores: more threads than cores wait for each other.
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))  # torch reads it when it is imported

import torch

from tokenloom.kernels import native

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's file, which `tokenloom models pull` (or `make test`) fetches."""
    from tokenloom.errors import ModelError
    from tokenloom.models.catalog import DEFAULT_MODEL, resolve

    try:
        return resolve(DEFAULT_MODEL)
    except ModelError as error:
        pytest.skip(str(error))


@pytest.fixture
def usual_machine() -> Iterator[None]:
    """For tests that choose threads or an instruction set: the next test has the usual ones again."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if native is not None:
        native.use_isa(native.isas()[0])


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`refused("generate", ...)`: what a command that must end with status 1 says on stderr. It runs in this
    process: for commands that a user got wrong, of which there are many."""
    from tokenloom.cli import main

    def run(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["tokenloom", *args])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 1
        return capsys.readouterr().err

    return run
