"""One frame of `tokenloom top`: what a server's `GET /live` tells, as tables and bars of a terminal."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

RATE_S = 10
"""Rates are of so many last seconds."""
HISTORY_S = 180
KINDS = {"prefill": "blue", "decode": "green", "drafted": "magenta", "training": "yellow"}
BLOCKS = {"running": "green", "training": "yellow", "cached": "cyan", "free": "grey37"}
_BARS = " ▁▂▃▄▅▆▇█"
_BAR_WIDTH = 60


class View:
    """The last snapshot, the seconds that it and those before it told, and the jobs.

    Snapshots are those of `tokenloom.serve.live`, as JSON; jobs those of OpenAI's API.
    """

    def __init__(self) -> None:
        self.snapshot: dict[str, Any] = {}
        self.seconds: deque[dict[str, Any]] = deque(maxlen=HISTORY_S)
        self.jobs: list[dict[str, Any]] = []
        self.note = ""
        """What is wrong with the connection, if anything."""

    def update(self, snapshot: dict[str, Any]) -> None:
        """Take in the next snapshot."""
        self.snapshot, self.note = snapshot, ""
        known = self.seconds[-1]["at_s"] if self.seconds else 0
        self.seconds.extend(second for second in snapshot["seconds"] if second["at_s"] > known)

    def rate(self, field: str) -> float:
        """Of a field of the seconds, per second."""
        since = int(self.snapshot["at_s"]) - RATE_S
        return sum(s[field] for s in self.seconds if s["at_s"] >= since) / RATE_S

    def history(self, field: str, width: int) -> list[float]:
        """That field in each of the last seconds, oldest first; 0 where no iteration ran."""
        by_second = {second["at_s"]: second[field] for second in self.seconds}
        now = int(self.snapshot["at_s"])
        return [by_second.get(second, 0) for second in range(now - width, now)]


def frame(view: View, most_requests: int = 12) -> RenderableType:
    """Everything, top to bottom."""
    if not view.snapshot:
        return Text(view.note or "waiting for the server", style="yellow")
    parts: list[RenderableType] = [
        _head(view),
        Panel(_iterations(view), title="iterations", title_align="left"),
        Panel(_latencies(view.snapshot), title="latency", title_align="left"),
        Panel(_pool(view.snapshot["blocks"]), title="KV pool", title_align="left"),
        Panel(_requests(view.snapshot, most_requests), title="requests", title_align="left"),
    ]
    if view.jobs or view.snapshot["trainings"]:
        parts.append(Panel(_jobs(view), title="jobs", title_align="left"))
    return Group(*parts)


def _head(view: View) -> Text:
    now = view.snapshot
    colour = {"ready": "green", "draining": "yellow"}.get(now["status"], "red")
    text = Text.assemble(
        (_plain(now["model"]), "bold"),
        f"  tokenloom {now['version']}  ",
        (now["status"], colour),
        f"  up {timedelta(seconds=int(now['uptime_s']))}",
        f"  {now['running']} running  {now['waiting']} waiting",
    )
    if now["adapters"]:
        names = ", ".join(f"{_plain(a['name'])}@{a['version']}" for a in now["adapters"][:4])
        more = len(now["adapters"]) - 4
        text.append(f"  adapters {names}{f' and {more} more' if more > 0 else ''}")
    if view.note:
        text.append(f"\n{view.note}", "red")
    return text


def _iterations(view: View) -> RenderableType:
    rates = {kind: view.rate(kind) for kind in KINDS}
    table = Table.grid(padding=(0, 2))
    for kind, colour in KINDS.items():
        table.add_row(
            Text(kind, colour),
            Text(f"{rates[kind]:.1f} rows/s", justify="right"),
            Text(_spark(view.history(kind, _BAR_WIDTH)), colour),
        )
    totals = view.snapshot["totals"]
    busy = view.rate("busy_ms") / 1e3
    words = [f"{view.rate('iterations'):.1f} iterations/s", f"busy {min(busy, 1):.0%}"]
    if totals["draft_tokens"]:
        words.append(f"guesses accepted {totals['draft_accepted'] / totals['draft_tokens']:.0%}")
    if totals["prefix_queries_tokens"]:
        words.append(f"prefix hits {totals['prefix_hits_tokens'] / totals['prefix_queries_tokens']:.0%}")
    if totals["preemptions"]:
        words.append(f"{totals['preemptions']} preemptions")
    return Group(_stacked(rates, KINDS), table, Text("  ".join(words), "dim"))


def _latencies(snapshot: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("", "p50", "p90", "p99", "target", "met"):
        table.add_column(name, justify="left" if not name else "right")
    for name, words in (("ttft", "first token"), ("itl", "between tokens")):
        told = snapshot[name]
        row = [Text(words)]
        for percentile in ("p50_ms", "p90_ms", "p99_ms"):
            value = told[percentile]
            late = value is not None and value > told["target_ms"]
            row.append(Text("–" if value is None else f"{value:.0f} ms", "red" if late else "green"))
        within = told["within"]
        row += [Text(f"{told['target_ms']:.0f} ms"), Text("–" if within is None else f"{within:.1%}")]
        table.add_row(*row)
    return table


def _pool(blocks: dict[str, Any]) -> RenderableType:
    legend = Text()
    for kind, colour in BLOCKS.items():
        legend.append(f"{kind} {blocks[kind]}", colour).append("  ")
    legend.append(f"of {blocks['total']} blocks of {blocks['block_size']} tokens", "dim")
    return Group(_stacked({kind: blocks[kind] for kind in BLOCKS}, BLOCKS), legend)


def _requests(snapshot: dict[str, Any], most: int) -> RenderableType:
    if not snapshot["requests"]:
        return Text("none", "dim")
    table = Table(box=None, pad_edge=False)
    for name in ("id", "state", "age", "prompt", "cached", "output", "blocks", "adapter", "methods"):
        table.add_column(name, justify="right" if name in _NUMBERS else "left", no_wrap=True)
    for request in snapshot["requests"][:most]:
        specs = [_plain(request[name]) for name in ("kv", "draft") if request[name]]
        methods = " ".join(re.sub(r"\([^)]*\)", "", spec) for spec in specs)  # names, without their knobs
        output = f"{request['output_tokens']}"
        if request["max_tokens"] is not None:
            output += f"/{request['max_tokens'] * request['choices']}"
        table.add_row(
            _plain(request["id"])[:20],
            request["state"],
            f"{request['age_s']:.1f} s",
            str(request["prompt_tokens"]),
            str(request["cached_tokens"]),
            output,
            str(request["kv_blocks"]),
            _plain(request["adapter"] or "–"),
            methods or "–",
        )
    left = snapshot["num_requests"] - min(most, len(snapshot["requests"]))
    return Group(table, Text(f"and {left} more", "dim")) if left > 0 else table


_NUMBERS = ("age", "prompt", "cached", "output", "blocks")


def _jobs(view: View) -> RenderableType:
    table = Table(box=None, pad_edge=False)
    for name in ("job", "status", "model", "trained tokens"):
        table.add_column(name, justify="right" if name == "trained tokens" else "left", no_wrap=True)
    for job in view.jobs:
        model = job.get("fine_tuned_model") or job["model"]
        table.add_row(job["id"], job["status"], _plain(model), str(job.get("trained_tokens") or "–"))
    parts: list[RenderableType] = [table] if view.jobs else []
    steps = [
        f"step {t['step']}" + ("" if t["loss"] is None else f", loss {t['loss']:.4f}")
        for t in view.snapshot["trainings"]
    ]
    if steps:
        parts.append(Text(f"training now: {'; '.join(steps)}", "yellow"))
    if view.snapshot["profiling"]:
        parts.append(Text("jobs wait until this machine's latency profile is measured", "dim"))
    return Group(*parts)


def _stacked(values: dict[str, float], colours: dict[str, str]) -> Text:
    """One bar whose parts are as long as their values; a value above 0 is never left out."""
    total = sum(values.values())
    if not total:
        return Text("░" * _BAR_WIDTH, "grey37")
    widths = {name: max(round(value / total * _BAR_WIDTH), value > 0) for name, value in values.items()}
    widths[max(widths, key=widths.__getitem__)] += _BAR_WIDTH - sum(widths.values())
    text = Text()
    for name, width in widths.items():
        text.append("█" * width, colours[name])
    return text


def _spark(values: Iterable[float]) -> str:
    values = list(values)
    top = max(values, default=0)
    if not top:
        return " " * len(values)
    last = len(_BARS) - 1
    return "".join(_BARS[max(round(value / top * last), value > 0)] for value in values)


def _plain(text: str) -> str:
    """A server's words without what would drive the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
