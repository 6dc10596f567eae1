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


def parts(query):
    """The nodes of a query as Prometheus' grammar reads it, once Grafana has put its interval in."""
    promql = pytest.importorskip("promql_parser", reason="needs promql-parser (dev extra)")
    nodes = []
    promql.walk(promql.parse(query.replace("$__rate_interval", "1m")), nodes.append)
    return nodes


def of_kind(nodes, kind):
    return [node for node in nodes if type(node).__name__ == kind]


def exported(families, name):
    """The labels of a series; its name must be that of a sample."""
    for _, _, _, names, labels in families.values():
        if name in names:
            return labels
    raise AssertionError(f"/metrics has no {name}")


@pytest.mark.parametrize("query", list(queries()))
def test_every_query_of_the_dashboard_asks_for_what_is_exported(families, query):
    nodes = parts(query)
    series = of_kind(nodes, "VectorSelector")
    assert series
    grouped = {
        label
        for node in of_kind(nodes, "AggregateExpr")
        for label in (node.modifier.labels if node.modifier else ())
    }
    for each in series:
        labels = exported(families, each.name) | OF_THE_SCRAPE
        assert {matcher.name for matcher in each.matchers.matchers} <= labels, each.name
        assert grouped <= labels, each.name


@pytest.mark.parametrize("query", list(queries()))
def test_rates_are_of_what_only_grows_and_of_nothing_else(families, query):
    """A rate of a gauge is nonsense, and so is a counter without one; Prometheus computes either."""
    nodes = parts(query)
    rated = {
        arg.vector_selector.name
        for call in of_kind(nodes, "Call")
        if call.func.name in ("rate", "increase")
        for arg in call.args
    }
    for each in of_kind(nodes, "VectorSelector"):
        kind = next(family[0] for family in families.values() if each.name in family[3])
        assert (each.name in rated) == (kind in ("counter", "histogram", "summary")), each.name


def test_grafanas_own_model_of_a_dashboard_reads_it_to_the_last_key():
    pytest.importorskip("grafana_foundation_sdk", reason="needs grafana-foundation-sdk (dev extra)")
    from grafana_foundation_sdk.cog import encoder, plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()  # panels and queries are read by their types' models
    read = json.loads(encoder.JSONEncoder().encode(Dashboard.from_json(DASHBOARD)))
    unread = list(lost(DASHBOARD, read))
    # Grafana's editor writes it beside `query`, which is what counts.
    assert [path for path in unread if not re.fullmatch(r"/templating/list/\d/definition", path)] == []


def lost(given, read, path=""):
    """Paths of what is in `given` and not, or otherwise, in `read`."""
    if type(given) is not type(read):
        yield path
    elif isinstance(given, dict):
        for key, value in given.items():
            yield from lost(value, read.get(key), f"{path}/{key}")
    elif isinstance(given, list):
        if len(given) != len(read):
            yield path
        for i, (one, other) in enumerate(zip(given, read, strict=False)):
            yield from lost(one, other, f"{path}/{i}")
    elif given != read:
        yield path


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
