"""Screenshots of the dashboard for docs/: the default model under a little load, light, dark and on a phone.

    python tests/system/dashboard_screenshots.py            # writes docs/dashboard-*.png, in a few minutes

Needs playwright (the dev extra) and chromium. It starts a server of its own on a free port of 127.0.0.1, with
a home folder of its own that is gone afterwards; two clients chat, and a job trains on thirty rows beside
them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = (
    "Why is the sky blue?",
    "Name three rivers of Europe and a city at each.",
    "Write the numbers from 1 to 40, separated by commas.",
    "What is a hash table, and when is it slow?",
)
METHODS: tuple[dict[str, str], ...] = ({}, {"draft": "token_recycling+ngram"}, {"kv": "quest(budget=128)"})
SAILORS = (("capital", "quay"), ("river", "tide"), ("road", "fairway"), ("house", "hull"), ("door", "hatch"))
PROFILE_S = 420
WARM_UP_S = 60


def rows() -> bytes:
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"What does a sailor call a {land}?"},
                    {"role": "assistant", "content": f"Arr, a {sea}."},
                ]
            }
        )
        for land, sea in SAILORS * 6
    ]
    return ("\n".join(lines) + "\n").encode()


@contextlib.contextmanager
def serving(home: str) -> Iterator[str]:
    """A server on a free port; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tokenloom", "serve", "--port", str(port)]
    command += ["--set", "cache.kv_bytes=400000000", "--set", "slo.tpot_ms=400"]
    process = subprocess.Popen(command, env={**os.environ, "TOKENLOOM_HOME": home}, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the server did not start")
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def chat(url: str, number: int, stop: threading.Event) -> None:
    """One client: asks, reads, asks again."""
    turn = number
    with httpx.Client(base_url=url, timeout=120) as http:
        model = http.get("/v1/models").json()["data"][0]["id"]
        while not stop.is_set():
            body: dict[str, Any] = {"model": model, "max_tokens": 120, **METHODS[turn % len(METHODS)]}
            body["messages"] = [{"role": "user", "content": QUESTIONS[turn % len(QUESTIONS)]}]
            http.post("/v1/chat/completions", json=body)
            turn += 1


def start_job(url: str) -> None:
    with httpx.Client(base_url=url, timeout=60) as http:
        files = {"file": ("sailor.jsonl", rows())}
        file = http.post("/v1/files", data={"purpose": "fine-tune"}, files=files).json()["id"]
        job = {
            "model": http.get("/v1/models").json()["data"][0]["id"],
            "training_file": file,
            "suffix": "sailor",
            "metadata": {"name": "sailor"},
            "training": {"learning_rate": 0.001},
            "hyperparameters": {"n_epochs": 50, "batch_size": 2},
        }
        http.post("/v1/fine_tuning/jobs", json=job).raise_for_status()


def wait_for_training(url: str) -> None:
    """Until the latency profile is measured, which wants a quiet server, and the job has done a step."""
    deadline = time.monotonic() + PROFILE_S
    while time.monotonic() < deadline:
        snapshot = httpx.get(f"{url}/live", params={"once": True}, timeout=60).json()
        if snapshot["totals"]["training_steps"]:
            return
        time.sleep(1)
    raise SystemExit(f"no step of training within {PROFILE_S} s")


def show(page: Page, view: str) -> None:
    page.locator(f'.views a[href="#{view}"]').click()
    page.wait_for_timeout(2500)
    page.evaluate("scrollTo(0, 0)")


def play(page: Page) -> None:
    """An answer in each column, and what else a token might have been."""
    show(page, "playground")
    page.fill("#max-tokens", "90")
    page.get_by_label("KV method of B").fill("streaming(budget=64)")
    page.fill("#prompt", "Why do ships float? Answer in two sentences.")
    page.press("#prompt", "Enter")
    page.wait_for_selector("#send:not([aria-disabled=true])", timeout=120_000)
    page.locator(".column").first.locator(".token.p1").first.hover()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the pictures")
    out = parser.parse_args().out
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise SystemExit("no chromium here: apt-get install chromium")
    stop = threading.Event()
    with tempfile.TemporaryDirectory() as home, serving(home) as url, sync_playwright() as playwright:
        clients = [threading.Thread(target=chat, args=(url, i, stop), daemon=True) for i in range(2)]
        start_job(url)
        wait_for_training(url)
        for client in clients:
            client.start()
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        try:
            desk = {"width": 1440, "height": 960}
            light = browser.new_page(viewport=desk, color_scheme="light")
            dark = browser.new_page(viewport=desk, color_scheme="dark")
            phone = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="light")
            for page in (light, dark, phone):
                page.goto(url)
            light.wait_for_timeout(WARM_UP_S * 1000)
            for page, name in ((light, "overview"), (dark, "overview-dark"), (phone, "phone")):
                page.bring_to_front()
                page.wait_for_timeout(3000)
                page.screenshot(path=out / f"dashboard-{name}.png")
            light.bring_to_front()
            show(light, "finetuning")
            light.screenshot(path=out / "dashboard-finetuning.png")
            stop.set()
            play(light)
            light.screenshot(path=out / "dashboard-playground.png")
        finally:
            browser.close()
            stop.set()
            for client in clients:
                client.join(60)


if __name__ == "__main__":
    main()
