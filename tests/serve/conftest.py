"""Servers for the tests: over a fake engine (one for all tests, or a fresh one), and over a tiny model."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fake_engine import FakeEngine
from running import Running, settings, wait_for
from tiny_models import build_tiny
from tokenloom.config import LoggingSettings
from tokenloom.logs import set_up_logging
from tokenloom.serve.jobs import open_jobs
from tokenloom.serve.key_ring import KeyRing
from tokenloom.serve.key_store import KeyStore


@pytest.fixture(scope="session")
def shared() -> Iterator[Running]:
    """A server over a fake engine with default settings. Tests leave it as they found it."""
    running = Running(FakeEngine(settings()))
    yield running
    running.stop()


@pytest.fixture
def serve() -> Iterator[Callable[..., Running]]:
    """Start a server over a fresh fake engine: `serve(step_s=0.1, limits__max_n=2)`. With `jobs` it has the
    routes of files and jobs, too (and must be told not to train); with `store` the keys in it."""
    started: list[Running] = []

    def start(
        *,
        step_s: float = 0.0,
        routers: Any = (),
        engine: Any = None,
        jobs: bool = False,
        store: KeyStore | None = None,
        **flags: Any,
    ) -> Running:
        engine = engine or FakeEngine(settings(**flags), step_s=step_s)
        keys = KeyRing(engine.settings, store)
        started.append(Running(engine, routers, open_jobs(engine, engine.settings) if jobs else None, keys))
        return started[-1]

    yield start
    for running in started:
        running.stop()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny"))[0]


@pytest.fixture(scope="session")
def real(tiny_folder: Path) -> Iterator[Running]:
    """A server over the real engine and a tiny random model, on the reference backend."""
    from tokenloom.engine.async_engine import AsyncEngine
    from tokenloom.engine.engine import Engine

    chosen = settings(
        model__name=str(tiny_folder),
        model__dtype="float64",
        model__backend="reference",
        cache__kv_bytes=2**23,
        server__served_model_name="tiny",
    )
    running = Running(AsyncEngine(Engine(chosen)))
    yield running
    running.stop()


@pytest.fixture(scope="session")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A random model with a context that holds tools told in words."""
    from tokenloom.engine.async_engine import AsyncEngine
    from tokenloom.engine.engine import Engine

    folder, _ = build_tiny(tmp_path_factory.mktemp("roomy"), max_position_embeddings=4096)
    flags = {"model__backend": "torch", "model__dtype": "float64", "cache__kv_bytes": 2**24}
    chosen = settings(model__name=str(folder), server__served_model_name="tiny", **flags)
    running = Running(AsyncEngine(Engine(chosen)))
    yield running
    running.stop()


class Log:
    """The lines of this process since the fixture began."""

    def __init__(self, stream: io.StringIO) -> None:
        self.stream = stream

    @property
    def text(self) -> str:
        return self.stream.getvalue()

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]

    def request(self, count: int = 1) -> dict[str, Any]:
        """The line of the last of `count` requests, once they are over."""
        wait_for(lambda: len([x for x in self.lines if x["message"] == "request"]) >= count)
        return [x for x in self.lines if x["message"] == "request"][-1]


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Log]]:
    """Set the logging up as `tokenloom serve` does, with the stream in the place of standard error."""
    root, own = logging.getLogger(), logging.getLogger("tokenloom")
    handlers, levels = list(root.handlers), (root.level, own.level)

    def start(**settings: Any) -> Log:
        stream = io.StringIO()
        monkeypatch.setattr("sys.stderr", stream)
        set_up_logging(LoggingSettings(**{"format": "json", **settings}))
        return Log(stream)

    yield start
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    own.setLevel(levels[1])
    logging.captureWarnings(False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from dashboard_rig import opened

    with opened() as chromium:
        yield chromium


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """See `Visits`. A script that fails, or that the page's policy refuses, fails the test."""
    from dashboard_rig import WAIT_MS, Visits, expect

    visits = Visits(browser)
    expect.set_options(timeout=WAIT_MS)
    yield visits
    visits.close()
    assert not visits.complaints


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """See `Site`. Tests leave it as they found it, but for more jobs."""
    from dashboard_site import Site

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENLOOM_HOME", str(tmp_path_factory.mktemp("home")))
        site = Site()
        yield site
        site.server.stop()


@pytest.fixture
def begin(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Running]]:
    """Start a server that trains, on this test's home folder: `begin(coserve__mode="coserve")`; another after
    `stop()` is a restart."""
    from tuning_server import start

    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path / "home"))
    started: list[Running] = []

    def again(**flags: Any) -> Running:
        started.append(start(tiny_folder, **flags))
        return started[-1]

    yield again
    for server in started:
        if server.thread.is_alive():
            server.stop()
