"""`tokenloom top`: watch a server from a terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
from rich.console import Console
from rich.live import Live

from tokenloom.errors import TokenloomError
from tokenloom.top import View, frame

RETRY_S = 2.0
JOBS_EVERY_S = 3.0
MOST_JOBS = 8


class WatchError(TokenloomError):
    """The server cannot be watched: it is not there, or will not be."""


class Watch:
    """A server's feed. Raises WatchError where trying again is of no use.

    Args:
        url: where the server listens, without a path.
        key: an API key; empty for none.
    """

    def __init__(self, url: str, key: str = "") -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        # The feed has a heartbeat each five seconds.
        self.client = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=20)
        self.url = url
        self._jobs_due_s = 0.0
        self._jobs: list[dict[str, Any]] = []

    def once(self) -> View:
        """One snapshot. Raises WatchError also where the server does not answer."""
        view = View()
        try:
            response = self.client.get("/live", params={"once": True})
            self._check(response)
            view.update(response.json())
            view.jobs = self.jobs()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise WatchError(f"{self.url} cannot be reached: {error}") from error
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise WatchError(f"{self.url}/live is not the feed of a tokenloom server") from error
        return view

    def views(self, interval_s: float) -> Iterator[View]:
        """The same view, each time that something is new; goes on after the server was away."""
        view = View()
        while True:
            try:
                for snapshot in self._snapshots(interval_s):
                    view.update(snapshot)
                    view.jobs = self.jobs()
                    yield view
                view.note = "the server closed the feed; trying again"
            except httpx.HTTPError as error:
                view.note = f"{self.url} cannot be reached ({error}); trying again"
            yield view
            time.sleep(RETRY_S)

    def jobs(self) -> list[dict[str, Any]]:
        """The newest jobs, looked up now and then; none where the server has none or shows none."""
        now = time.monotonic()
        if now >= self._jobs_due_s:
            self._jobs_due_s = now + JOBS_EVERY_S
            response = self.client.get("/v1/fine_tuning/jobs", params={"limit": MOST_JOBS})
            self._jobs = response.json()["data"] if response.status_code == 200 else []
        return self._jobs

    def _snapshots(self, interval_s: float) -> Iterator[dict[str, Any]]:
        with self.client.stream("GET", "/live", params={"interval_s": interval_s}) as response:
            self._check(response)
            for line in response.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))

    def _check(self, response: httpx.Response) -> None:
        if response.status_code == 401:
            raise WatchError("this server asks for a key: --key KEY, or TOKENLOOM_API_KEY")
        if response.status_code == 429:
            raise httpx.ReadError("the server has too many listeners or requests")
        if response.status_code != 200:
            raise WatchError(f"{self.url}/live answers {response.status_code}: no feed of a tokenloom server")


def run_top(out: Console, url: str, key: str, interval_s: float, once: bool) -> None:
    """Draw frames on `out` until Ctrl-C, or a single one.

    Raises:
        WatchError: see `Watch`.
    """
    watch = Watch(url, key)
    if once:
        out.print(frame(watch.once()))
        return
    try:
        with Live(console=out, screen=True, auto_refresh=False) as live:
            for view in watch.views(interval_s):
                live.update(frame(view, most_requests=max(3, out.height - 26)), refresh=True)
    except KeyboardInterrupt:
        return
