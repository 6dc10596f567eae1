"""What the dashboard tells those who cannot see it, see no colours, or use no mouse."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from busy_overview import busy
from dashboard_rig import Visits, expect, live
from dashboard_site import Site, answering, ask, focused, said
from tokenloom.finetune.records import JobError
from tuning_server import rows


@pytest.fixture(scope="module")
def visits(browser: Any) -> Iterator[Visits]:
    visits = Visits(browser)
    yield visits
    visits.close()
    assert not visits.complaints


@pytest.fixture(scope="module")
def overview(site: Site, visits: Visits) -> Any:
    """The first view, for tests that leave it as it is."""
    site.seem_busy()
    page = visits(site.server)
    live(page)
    return page


@pytest.fixture(scope="module")
def answered(site: Site, visits: Visits) -> Any:
    """The playground after an answer of four words, each less likely than the one after it."""
    page = visits(site.server, "#playground")
    answering(page, -3.0, -1.5, -0.7, -0.2)
    ask(page)
    return page


# -- what is told instead of pictures and colours ------------------------------------------------------------


def test_the_chart_of_rows_says_its_numbers(overview):
    chart = overview.get_by_role("img", name="Rows at")
    label = re.compile("last two minutes: Prefill 60, Decode 90, Drafted 0, Training 150")
    expect(chart).to_have_attribute("aria-label", label)


def test_each_second_of_the_chart_can_be_read_by_the_keyboard(overview):
    slider = overview.get_by_role("slider", name="Second shown by the legend")
    slider.focus()
    seen = set()
    while len(seen) < 2:
        overview.keyboard.press("ArrowLeft")
        seen.add(re.sub(r"^[\d:]+", "", slider.get_attribute("aria-valuetext")))
    assert " Prefill 20, Decode 30, Drafted 0, Training 50, busy 50 %" in seen
    expect(overview.locator("#rows-legend")).to_contain_text("busy 50 %")


@pytest.mark.parametrize(
    ("title", "numbers"),
    [
        ("To the first token", "p50 300 ms, .*; 0 % of 1 on target"),
        ("Between tokens", "p50 20 ms, .*; 100 %"),
    ],
)
def test_a_chart_of_latencies_says_its_numbers(overview, title, numbers):
    chart = overview.get_by_role("img", name=title)
    expect(chart).to_have_attribute("aria-label", re.compile(f"{title}: {numbers}"))


def test_the_map_of_the_pool_says_its_numbers(overview):
    label = "Map of the KV pool, 8 blocks, 63 % in use: Requests 3, Cached prefixes 1, Training 2, Free 2"
    expect(overview.locator("#kv-map")).to_have_attribute("aria-label", label)


def test_the_curve_of_a_job_says_its_numbers(site, visit):
    chart = visit(site.server, "#finetuning").locator("#loss-chart")
    expect(chart).to_have_attribute("aria-label", "Training loss: from 3.500 to 1.125 after 3 steps")


def test_what_is_told_of_a_picture_changes_at_a_calm_rate(site, visit):
    """A screen reader would begin anew with every change."""
    page = visit(site.server)
    page.clock.install()
    page.evaluate(
        """async () => {
            const { describe } = await import("/dashboard/dom.js");
            window.heard = [];
            const element = document.createElement("div");
            new MutationObserver(() => heard.push(element.ariaLabel)).observe(element, { attributes: true });
            for (let i = 0; i < 36; i += 1) setTimeout(() => describe(element, String(i)), i * 100);
        }"""
    )
    page.clock.run_for(3550)
    assert page.evaluate("heard") == ["0", "30"]


def test_rows_of_the_table_stay_where_only_numbers_change(site, overview):
    """Else whoever reads it by a screen reader would lose the place each second."""
    cell = overview.locator("#requests td").first.element_handle()
    site.server.engine.seen = busy(int(time.time()), age_s=9.0)
    expect(overview.locator("#requests td").nth(5)).to_have_text("9.0 s")
    assert cell.evaluate("cell => cell.isConnected")


def test_where_the_system_chooses_the_colours_those_with_a_meaning_stay(overview):
    overview.emulate_media(forced_colors="active")
    colours = "all => all.map((one) => getComputedStyle(one).backgroundColor)"
    assert len(set(overview.locator("#rows-legend i").evaluate_all(colours))) == 4


def test_how_likely_tokens_were_is_told_by_lines_too(answered):
    styles = "all => all.map((one) => getComputedStyle(one).borderBottomStyle)"
    assert answered.locator(".token").evaluate_all(styles) == ["solid", "dashed", "dotted", "none"]


def test_a_focused_token_is_described_by_its_likelihood(answered):
    answered.locator(".token").first.focus()
    described = re.compile("sea 5.0 %.*lake < 0.1 %")
    expect(answered.locator(".token").first).to_have_accessible_description(described)


def test_what_is_told_of_a_token_can_be_pointed_at_and_sent_away(answered):
    """WCAG 1.4.13: hoverable and dismissible."""
    answered.locator(".token").last.hover()
    tip = answered.get_by_role("tooltip")
    tip.hover()
    answered.wait_for_timeout(400)
    expect(tip).to_be_visible()
    answered.keyboard.press("Escape")
    expect(tip).not_to_be_visible()


# -- what happens is said ------------------------------------------------------------------------------------


def test_changes_are_said_without_an_interruption(overview):
    """Both roles are polite, unless an attribute says otherwise."""
    expect(overview.locator("#status")).to_have_role("status")
    expect(said(overview)).not_to_have_attribute("aria-live", re.compile(""))


def test_the_end_of_a_job_is_said(site, visit):
    job = site.job("gull", "queued", "running")
    page = visit(site.server, "#finetuning")
    expect(page.locator("#jobs")).to_contain_text("gull")
    site.store.jobs.fail(job, JobError("out_of_memory", "no room", None))
    expect(said(page)).to_contain_text("gull: failed")


def test_an_answer_is_said_once_and_not_word_by_word(answered):
    expect(answered.get_by_role("log", name="Conversation A")).to_have_attribute("aria-live", "off")
    assert said(answered).locator("p").all_inner_texts() == ["Answering", "Answer A: sea sea sea sea"]


def test_the_same_answer_is_not_said_twice(site, visit):
    page = visit(site.server, "#playground")
    answering(page, -0.5)
    ask(page, of_both=True)
    expect(said(page).locator("p").last).to_have_text("Answer B: same text as A")


def test_a_refusal_is_said(site, visit):
    page = visit(site.server, "#playground")
    live(page)
    page.get_by_label("KV method of A").fill("nonsense")
    ask(page)
    expect(said(page)).to_contain_text("Answer A: failed: ")
    expect(said(page)).to_contain_text("no method 'nonsense'")


def test_what_cannot_be_done_with_a_job_is_said(site, visit):
    page = visit(site.server, "#finetuning")
    page.locator("#jobs button", has_text="sailor").click()
    refusal = {"error": {"message": "the job is over already", "param": None}}
    page.route("**/pause", lambda route: route.fulfill(status=409, json=refusal))
    page.locator("#job-actions").get_by_role("button", name="Pause").click()
    expect(said(page)).to_contain_text("the job is over already")


def test_what_is_wrong_is_tied_to_the_input_that_it_is_about(site, visit, tmp_path):
    page = visit(site.server, "#finetuning")
    file = tmp_path / "rows.jsonl"
    file.write_bytes(rows(2))
    refusal = {"error": {"message": "training.learning_rate: too high", "param": "training.learning_rate"}}
    page.route("**/v1/fine_tuning/jobs", lambda route: route.fulfill(status=400, json=refusal))
    page.get_by_role("button", name="New job").click()
    page.set_input_files("#training-file", file)
    page.get_by_role("button", name="Upload and start").click()
    rate = page.get_by_label("Learning rate")
    expect(rate).to_have_attribute("aria-invalid", "true")
    expect(rate).to_have_accessible_description("training.learning_rate: too high")
    expect(rate).to_be_focused()
    expect(page.get_by_label("Epochs")).to_have_accessible_description("")


# -- where the focus is --------------------------------------------------------------------------------------


def test_the_head_of_the_page_is_told_as_what_it_is(overview):
    expect(overview.get_by_role("banner")).to_match_aria_snapshot(
        """
        - navigation "Views":
          - link "Overview"
          - link "Playground"
          - link "Fine-tuning"
          - link "Models"
        - text: fake
        - status: Live
        - button "Pause live updates"
        - 'button "Colour theme: system"'
        """
    )


def test_the_link_past_the_menu_stays_in_its_view(site, visit):
    page = visit(site.server, "#playground")
    page.locator(".skip").press("Enter")
    assert focused(page) == "main"
    expect(page.locator("#view-playground")).to_be_visible()


def test_a_new_view_begins_with_its_heading(site, visit):
    page = visit(site.server)
    page.get_by_role("link", name="Models").press("Enter")
    expect(page.get_by_role("heading", name="Models", exact=True)).to_be_focused()
    expect(page).to_have_title("Models · tokenloom")


def test_the_focus_goes_back_to_where_a_dialog_was_opened(site, visit):
    page = visit(site.server, "#finetuning")
    page.get_by_role("button", name="New job").press("Enter")
    expect(page.get_by_label("Training file")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="New job")).to_be_focused()


def test_the_focus_stays_with_a_jobs_actions(site, visit):
    site.job("tern", "queued")
    page = visit(site.server, "#finetuning")
    page.locator("#jobs button", has_text="tern").click()
    actions = page.locator("#job-actions")
    for name, then in (("Pause", "Resume"), ("Resume", "Pause")):
        actions.get_by_role("button", name=name).press("Enter")
        expect(actions.get_by_role("button", name=then)).to_be_focused()
    actions.get_by_role("button", name="Cancel").press("Enter")
    expect(page.locator("#job-title")).to_be_focused()


def test_the_focus_stays_on_a_button_that_is_off_for_a_while(site, visit):
    page = visit(site.server, "#playground")
    answering(page, -0.5)
    page.fill("#prompt", "what of it?")
    page.locator("#send").press("Enter")
    expect(said(page)).to_contain_text("Answer A")
    expect(page.locator("#send")).to_be_focused()


def test_nothing_moves_where_that_is_asked_for(overview):
    moving = (
        "[...document.querySelectorAll('*')].filter((one) => getComputedStyle(one).transition !== 'none')"
    )
    assert overview.evaluate(f"document.getAnimations().length + {moving}.length") == 0
