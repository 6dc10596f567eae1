"""No view and no dialog breaks a rule of WCAG 2.1 or 2.2, A or AA: axe-core looks, in both themes."""

from __future__ import annotations

from typing import Any

import pytest

from dashboard_rig import VIEWS, expect, live
from dashboard_site import answering, ask

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe (dev extra)")

RULES = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice")
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 800}
LIGHT, DARK = (("light", DESK), ("light", PHONE)), ("dark", DESK)
STATES = ("live", "lost", "draining", "decode", "prefill", "waiting", "preempted", "queued", "paused")
LAST_CLASS = "all => all.map((one) => one.classList[1])"


class Axe:
    """axe-core in a page."""

    def __init__(self, page: Any) -> None:
        self.page = page
        page.evaluate(axe.Axe().axe_script)

    def broken(self, *rules: str) -> str:
        """What breaks these rules, in words; empty if nothing."""
        options = {"runOnly": rules, "resultTypes": ["violations"]}
        found = self.page.evaluate("options => axe.run(document, options)", options)
        return axe.AxeResults(found).generate_report() if found["violations"] else ""

    def broken_in_any_look(self, looks: Any = (*LIGHT, DARK)) -> str:
        """Between themes nothing but the colours changes, and they do not change with the width."""
        reports = []
        for scheme, size in looks:
            self.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            self.page.set_viewport_size(size)
            expect(self.page.locator("html")).to_have_attribute("data-theme", scheme)
            reports.append(self.broken(*(RULES if scheme == "light" else ("color-contrast",))))
        return "".join(reports)


@pytest.mark.parametrize("view", VIEWS)
def test_no_view_breaks_a_rule(site, visit, view):
    page = visit(site.server, f"#{view}")
    live(page)
    if view == "overview":
        expect(page.locator("#requests tr")).to_have_count(2)
    if view == "finetuning":
        expect(page.locator("#job-events li").first).to_be_visible()
    assert Axe(page).broken_in_any_look() == ""


def test_no_rule_is_broken_by_answers_whatever_their_tokens_colours(site, visit):
    page = visit(site.server, "#playground")
    answering(page, -3.0, -1.5, -0.7, -0.2, -0.01)
    ask(page, of_both=True)
    page.locator(".token").first.focus()
    expect(page.get_by_role("tooltip")).to_be_visible()
    assert {f"p{i}" for i in range(5)} == set(page.locator(".token").evaluate_all(LAST_CLASS))
    assert Axe(page).broken_in_any_look([LIGHT[0], DARK]) == ""


def test_no_rule_is_broken_by_a_refused_message(site, visit):
    page = visit(site.server, "#playground")
    live(page)
    page.get_by_label("KV method of A").fill("nonsense")
    ask(page)
    expect(page.locator(".answer.failed")).to_be_visible()
    assert Axe(page).broken_in_any_look([LIGHT[0], DARK]) == ""


def test_no_rule_is_broken_by_the_chip_of_any_state(site, visit):
    page = visit(site.server)
    live(page)
    expect(page.locator("#requests .chip").first).to_be_visible()
    page.get_by_role("button", name="Pause live updates").click()
    page.evaluate(
        """states => states.forEach((state) => {
            const chip = document.querySelector("#requests .chip").cloneNode();
            chip.dataset.state = chip.textContent = state;
            document.querySelector("#requests td").append(chip);
        })""",
        STATES,
    )
    assert Axe(page).broken_in_any_look([LIGHT[0], DARK]) == ""


def test_no_dialog_breaks_a_rule(site, visit):
    page = visit(site.server, "#finetuning")
    live(page)
    page.get_by_role("button", name="New job").click()
    page.evaluate("document.getElementById('job-problem').textContent = 'learning_rate: must be less'")
    axe_core = Axe(page)
    assert axe_core.broken_in_any_look() == ""
    page.get_by_role("button", name="Cancel").last.click()
    page.evaluate("document.getElementById('key-problem').textContent = 'the key is not valid'")
    page.evaluate("document.getElementById('key-dialog').showModal()")
    assert axe_core.broken_in_any_look() == ""


COLOURS = ("--card", "--prefill", "--decode", "--drafted", "--training", "--cached", "--edge")
RGB = """names => {
    const style = getComputedStyle(document.documentElement);
    const hex = (name) => style.getPropertyValue(name).trim();
    return names.map((name) => [1, 3, 5].map((i) => parseInt(hex(name).slice(i, i + 2), 16)));
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_is_drawn_stands_out_by_three_to_one(site, visit, scheme):
    """WCAG 1.4.11, which axe-core cannot see: lines, areas and squares, and the edges of inputs."""

    def luminance(rgb: list[int]) -> float:
        red, green, blue = (
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
            for part in (value / 255 for value in rgb)
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    page = visit(site.server, color_scheme=scheme)
    ground, *found = (luminance(rgb) + 0.05 for rgb in page.evaluate(RGB, COLOURS))
    for name, over in zip(COLOURS[1:], found, strict=True):
        assert max(over, ground) / min(over, ground) >= 3, name
