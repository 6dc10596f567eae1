"""The dashboard in a real browser, over a real server with a tiny model."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dashboard_rig import VIEWS, expect, live
from fake_engine import FakeEngine
from running import Running, settings
from tuning_server import client_of, create, rows, start, upload


@pytest.fixture(scope="module")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENLOOM_HOME", str(tmp_path_factory.mktemp("home")))
        running = start(tiny_folder)
        yield running
        running.stop()


def test_the_overview_follows_the_engine(server, visit):
    page = visit(server)
    live(page)
    before = int(page.locator("#tiles .tile").first.locator(".more").inner_text().split()[0])
    server.http.post(
        "/v1/completions", json={"model": "tiny", "prompt": "the sea", "max_tokens": 40, "ignore_eos": True}
    )
    expect(page.locator("#tiles .tile").first.locator(".more")).to_have_text(f"{before + 40} in all")
    expect(page.locator("#rows-chart")).to_have_attribute("aria-label", re.compile(r"Prefill [1-9]"))
    assert page.locator("#rows-chart canvas").count() == 1
    expect(page.locator("#kv-map")).to_have_attribute("aria-label", re.compile(r"Cached prefixes [1-9]"))


def test_a_running_request_is_in_the_table_without_its_text(server, visit, monkeypatch):
    decoder = server.engine.engine.decoder
    forward = decoder.forward

    def slowly(*given, **named):  # for a fast machine the answer would be over before the page tells of it
        time.sleep(0.02)
        return forward(*given, **named)

    monkeypatch.setattr(decoder, "forward", slowly)
    page = visit(server)
    body = {"model": "tiny", "prompt": "secret", "max_tokens": 450, "ignore_eos": True, "stream": True}
    with server.http.stream("POST", "/v1/completions", json={**body, "kv": "snapkv(budget=64)"}):
        row = page.locator("#requests tr").first
        expect(row).to_contain_text("/ 450")
        expect(row.locator("td").last).to_have_text("kv snapkv")
        expect(row.locator("td").last).to_have_attribute("title", re.compile("budget=64"))
    assert "secret" not in page.content()


def test_the_playground_streams_side_by_side_and_tells_what_else_was_likely(server, visit):
    page = visit(server, "#playground")
    live(page)
    page.fill("#max-tokens", "24")
    page.get_by_label("Draft method of B").fill("ngram")
    page.fill("#prompt", "what of the sea?")
    page.press("#prompt", "Enter")
    for letter in "AB":
        column = page.get_by_label(f"Answer {letter}", exact=True)
        expect(column.locator(".stats")).to_contain_text("tokens/s")
        assert column.locator(".token").count() == 24
    expect(page.locator(".column").nth(1)).to_contain_text("Same text as A")
    page.locator(".token").first.focus()
    tip = page.get_by_role("tooltip")
    expect(tip.locator("tr")).to_have_count(5)
    expect(tip.locator("tr.chosen")).to_have_count(1)
    likeliest = tip.inner_text()
    page.keyboard.press("ArrowRight")
    expect(tip).not_to_have_text(likeliest)
    page.get_by_label("Colour tokens").uncheck()
    colour = "e => getComputedStyle(e).backgroundColor"
    assert page.locator(".token").first.evaluate(colour) == "rgba(0, 0, 0, 0)"


def test_a_refused_message_is_told_in_the_servers_words(server, visit):
    page = visit(server, "#playground")
    live(page)
    page.get_by_label("Side by side").uncheck()
    page.get_by_label("KV method of A").fill("nonsense")
    page.fill("#prompt", "hello")
    page.click("#send")
    expect(page.locator(".answer.failed")).to_contain_text("no method 'nonsense'")


def test_a_job_is_started_watched_paused_resumed_and_cancelled(server, visit, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(rows(90))  # more steps than are done meanwhile
    page = visit(server, "#finetuning")
    page.get_by_role("button", name="New job").click()
    page.set_input_files("#training-file", file)
    for label, value in {"Epochs": "50", "Batch size": "2", "Name": "sailor"}.items():
        page.get_by_label(label, exact=True).fill(value)
    page.get_by_role("button", name="Upload and start").click()
    expect(page.locator("#job-dialog")).not_to_be_visible()
    chart = page.locator("#loss-chart")
    expect(chart).to_have_attribute("aria-label", re.compile(r"after \d+ steps"))
    first = chart.get_attribute("aria-label")
    expect(chart).not_to_have_attribute("aria-label", first or "")
    for button, state in (("Pause", "paused"), ("Resume", "running"), ("Cancel", "cancelled")):
        page.locator("#job-actions").get_by_role("button", name=button).click()
        expect(page.locator("#job-status")).to_have_text(state)
    expect(page.locator("#job-events")).to_contain_text("cancelled")


def test_a_refused_job_is_told_in_its_form_and_a_failed_one_beside_its_curve(server, visit, tmp_path):
    file = tmp_path / "empty.jsonl"
    file.write_bytes(b"")
    page = visit(server, "#finetuning")
    page.get_by_role("button", name="New job").click()
    page.set_input_files("#training-file", file)
    page.get_by_label("Learning rate").fill("100")
    page.get_by_role("button", name="Upload and start").click()
    expect(page.locator("#job-problem")).to_contain_text("learning_rate")
    page.get_by_label("Learning rate").fill("0.01")
    page.get_by_role("button", name="Upload and start").click()
    expect(page.locator("#job-facts")).to_contain_text("holds no examples")


def test_a_finished_model_can_be_tried(server, visit):
    client = client_of(server)
    job = create(client, upload(client, rows(12)), epochs=1)
    page = visit(server, "#models")
    for _ in range(40):
        if client.fine_tuning.jobs.retrieve(job.id).status == "succeeded":
            break
        page.wait_for_timeout(250)
    name = client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model
    page.reload()
    page.get_by_label(f"Try {name}", exact=True).click()
    expect(page.get_by_label("Model of B")).to_have_value(name)


def test_nothing_scrolls_sideways_on_a_phone(server, visit):
    page = visit(server)
    live(page)
    for view in VIEWS:
        page.locator(f'.views a[href="#{view}"]').click()
        for width in (320, 768):
            page.set_viewport_size({"width": width, "height": 800})
            expect(page.locator(f"#view-{view}")).to_be_visible()
            assert page.evaluate("document.documentElement.scrollWidth") == width, view


def test_everything_can_be_reached_by_the_keyboard(server, visit):
    page = visit(server, "#playground")
    live(page)
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        name = "document.activeElement.getAttribute('aria-label') || document.activeElement.id"
        reached.append(page.evaluate(f"{name} || document.activeElement.textContent"))
        if reached[-1] == "clear":
            break
    wanted = [
        "Skip to content",
        "Overview",
        "pause",
        "theme",
        "temperature",
        "compare",
        "Model of A",
        "prompt",
    ]
    assert [name for name in reached if name in wanted] == wanted
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_the_theme_follows_the_system_and_the_button(server, visit):
    page = visit(server, color_scheme="dark")
    shade = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(shade)
    page.get_by_role("button", name="Colour theme: system").click()
    expect(page.get_by_role("button", name="Colour theme: light")).to_be_visible()
    assert page.evaluate(shade) != dark
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "light"


def test_a_server_with_keys_asks_for_one_and_forgets_it_with_the_tab(visit):
    locked = Running(FakeEngine(settings(server__api_keys=["right"])))
    try:
        page = visit(locked)
        dialog = page.get_by_role("dialog")
        expect(dialog).to_be_visible()
        for key in ("wrong", "right"):
            page.get_by_label("API key").fill(key)
            dialog.get_by_role("button", name="Continue").click()
            if key == "wrong":
                expect(page.locator("#key-problem")).to_contain_text("not valid")
        live(page)
        expect(dialog).not_to_be_visible()
        assert json.loads(page.evaluate("JSON.stringify(localStorage)")) == {}
    finally:
        locked.stop()


def test_a_lost_connection_is_said_and_taken_up_again(serve, visit):
    server = serve()
    page = visit(server)
    live(page)
    page.context.set_offline(True)
    server.engine.draining = True
    expect(page.locator("#status")).to_have_text("Connection lost")
    server.engine.draining = False
    page.context.set_offline(False)
    live(page)


def test_paused_the_page_stands_still(serve, visit):
    server = serve()
    page = visit(server)
    live(page)
    page.get_by_role("button", name="Pause live updates").click()
    expect(page.locator("#status")).to_have_text("Paused")
    server.engine.counters.waiting = 7
    page.wait_for_timeout(1500)
    expect(page.locator("#tiles")).not_to_contain_text("7 waiting")
    page.get_by_role("button", name="Pause live updates").click()
    expect(page.locator("#tiles")).to_contain_text("7 waiting")
