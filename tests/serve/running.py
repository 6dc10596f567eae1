"""A real server in a thread of this process."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import httpx
import uvicorn

from tokenloom.config import Settings, load_settings
from tokenloom.serve.app import _Server, create_app
from tokenloom.serve.jobs import Jobs
from tokenloom.serve.key_ring import KeyRing


def settings(**flags: Any) -> Settings:
    """Settings with `server__api_keys=[...]` for `server.api_keys` and so on. No folder of this machine is
    read unless the test names one."""
    flags.setdefault("adapters__watch", "adapters__folder" in flags)
    return load_settings({key.replace("__", ".", 1): value for key, value in flags.items()})


class Running:
    """Serves `engine` on a free port of 127.0.0.1 until `stop`."""

    def __init__(
        self,
        engine: Any,
        routers: Any = (),
        jobs: Jobs | None = None,
        keys: KeyRing | None = None,
        tracing: Any = None,
    ) -> None:
        self.engine, self.jobs = engine, jobs
        self.app = create_app(engine, engine.settings, routers, jobs, tracing, keys)
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(self.app, log_level="critical", ws="none", timeout_graceful_shutdown=5)
        self.server = _Server(config, engine, engine.settings.server.drain_timeout_s, jobs)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()
        wait_for(lambda: self.server.started)
        self.http = httpx.Client(base_url=self.url, timeout=20)

    def stop(self) -> None:
        """Stop as SIGTERM does; a second time does nothing."""
        self.http.close()
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


def wait_for(condition: Any, timeout_s: float = 10.0) -> None:
    """Wait until `condition()` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


def events(response: httpx.Response) -> list[str]:
    """The data of all server-sent events."""
    return [line.removeprefix("data: ") for line in response.text.splitlines() if line]


def assert_error(response: httpx.Response, status: int, param: str | None, code: str | None = None) -> str:
    """The answer is OpenAI's error object with all four keys; returns its message."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    if code is not None:
        assert error["code"] == code
    assert response.headers["x-request-id"]
    return error["message"]
