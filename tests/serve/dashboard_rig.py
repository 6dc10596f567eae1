"""A browser that looks at the dashboard. Who imports this is left out where there is no playwright."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from running import Running

sync_api = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright (dev extra)")
expect = sync_api.expect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WAIT_MS = 20_000
VIEWS = ("overview", "playground", "finetuning", "models")


@contextlib.contextmanager
def opened() -> Iterator[Any]:
    """Chromium, without a window."""
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visits:
    """Open a server's page: `visit(server, "#playground", color_scheme="dark")`."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser
        self.contexts: list[Any] = []
        self.complaints: list[str] = []
        """Of scripts that fail, or that the page's policy refuses."""

    def __call__(self, where: Running, view: str = "", **options: Any) -> Any:
        context = self.browser.new_context(**{"reduced_motion": "reduce", **options})
        self.contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda said: self.complaints.append(said.text) if "Policy" in said.text else None)
        page.goto(f"{where.url}/{view}")
        return page

    def close(self) -> None:
        for context in self.contexts:
            context.close()


def live(page: Any) -> None:
    """Wait until the page follows the server."""
    expect(page.locator("#status")).to_have_text("Live")
