"""Who reads /metrics: the Grafana dashboard asks for what is exported, the documentation says what it is."""

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fake_engine import FakeEngine, timing
from running import Running, settings

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "deploy/grafana/tokenloom.json").read_text())
DOCS = (ROOT / "docs/observability.md").read_text()
OF_THE_SCRAPE = {"instance", "job"}
UNITS = {"seconds", "bytes", "tokens", "blocks", "rows", "requests", "sequences", "share", "loss", "count"}


@pytest.fixture(scope="module")
def families():
    """What a server exports once everything has happened at least once: family to (type, help, labels)."""
    engine = FakeEngine(settings(server__api_keys=["k"], server__admin_keys=["boss"], limits__key_rpm=2))
    counters = engine.counters
    counters.finished.append(timing())
    counters.training_loss = 1.5
    counters.drafts.add(2, 1)
    engine.engine.adapters.put("sailor", None, Path())
    server = Running(engine)
    body = {"model": "fake", "prompt": "a", "max_tokens": 1}
    for _ in range(3):  # the last one is over the key's limit
        server.http.post("/v1/completions", json=body, headers={"authorization": "Bearer k"})
    text = server.http.get("/metrics", headers={"authorization": "Bearer boss"}).text
    server.stop()
    found = {}
    for family in text_string_to_metric_families(text):
        if family.name.endswith("_created"):  # the client library's own: when a series began
            continue
        labels = {name for sample in family.samples for name in sample.labels}
        names = {sample.name for sample in family.samples}
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found[name] = (family.type, family.documentation, labels - {"le"}, names, labels)
    return found


def queries():
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield pytest.param(target["expr"], id=f"{panel['title']}-{target['refId']}")


def exported(families, name):
    """The labels of a series; its name must be that of a sample."""
    for _, _, _, names, labels in families.values():
        if name in names:
            return labels
    raise AssertionError(f"/metrics has no {name}")


@pytest.mark.parametrize("query", list(queries()))
def test_every_query_of_the_dashboard_asks_for_what_is_exported(families, query):
    series = re.findall(r"((?:tokenloom:|process_)\w+)(?:\{([^}]*)\})?", query)
    assert series
    grouped = {label for group in re.findall(r"by \(([^)]*)\)", query) for label in re.split(r",\s*", group)}
    for name, matchers in series:
        labels = exported(families, name) | OF_THE_SCRAPE
        assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)) <= labels, name
        assert grouped <= labels, name


def test_its_variables_are_of_series_that_are_exported(families):
    chosen = [v for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
    assert {v["name"] for v in chosen} == {"model", "instance"}
    for variable in chosen:
        name, label = re.fullmatch(r"label_values\((\S+), (\w+)\)", variable["definition"]).groups()
        assert label in exported(families, name) | OF_THE_SCRAPE


def test_no_two_panels_lie_on_one_another():
    taken = {}
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert (x, y) not in taken, (panel["title"], taken[x, y])
                taken[x, y] = panel["title"]
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def documented():
    """The rows of the documentation's table: name to its cells."""
    rows = re.findall(r"^\| `((?:tokenloom:|process_)\w+)` \|(.*)\|$", DOCS, re.MULTILINE)
    return {name: [cell.strip() for cell in rest.split("|")] for name, rest in rows}


def test_the_documentation_has_every_metric_with_its_type_unit_labels_and_meaning(families):
    rows = documented()
    missing = [
        f"| `{name}` | {kind} | UNIT | {', '.join(sorted(labels))} | {text} |"
        for name, (kind, text, labels, _, _) in families.items()
        if [rows.get(name, [None] * 4)[i] for i in (0, 2, 3)] != [kind, ", ".join(sorted(labels)), text]
    ]
    assert not missing, "docs/observability.md lacks, or has otherwise:\n" + "\n".join(missing)
    assert set(rows) == set(families)
    assert {unit for _, unit, *_ in rows.values()} <= UNITS


def test_every_metric_says_what_it_is(families):
    for name, (_, text, *_) in families.items():
        assert text.endswith(".") and len(text) > 10, name
