"""Tables and plots of what `peers_cpu.py` measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

OURS, SAME_WEIGHTS = "tokenloom", "llama.cpp Q4_1"

# Column, its title, and how many times the best peer's figure is to be reached (None: only shown).
COLUMNS = (
    ("decode", "decode", 1.3),
    ("prefill_512", "prefill 512", 1.1),
    ("prefill_2048", "prefill 2048", 1.1),
    ("streams", "16 streams", 1.2),
    ("streams_whole", "16 streams, whole", None),
)
# The same against llama.cpp on the very same file.
SAME_WEIGHTS_TARGETS = {"prefill_512": 2.0, "prefill_2048": 2.0, "streams": 2.0}
BANDWIDTH_TARGET = 0.6
MEMORY_FACTOR = 1.5


def print_tables(results: dict[str, Any], console: Console) -> None:
    peers = results["peers"]
    bandwidth = results["bandwidth_bytes_per_s"]
    console.print(
        f"{results['machine']}; {results['threads']} threads; medians of {results['repeats']} rounds; "
        f"{results['date']}; plain read {bandwidth / 1e9:.1f} GB/s",
        highlight=False,
    )
    table = Table(
        "tokens/s", *[title for _, title, _ in COLUMNS], "peak MB", "of bandwidth", "perplexity", "weights"
    )
    for name, row in peers.items():
        used = row["decode"] * row["weight_bytes"] / bandwidth if "decode" in row else None
        table.add_row(
            f"{name} {row.get('version', '')}",
            *[_number(row.get(column), 1) for column, _, _ in COLUMNS],
            _number(row["peak_bytes"] / 1e6 if "peak_bytes" in row else None, 0),
            _number(used, 2),
            _number(row.get("perplexity"), 2),
            row.get("weights", ""),
        )
    console.print(table)
    for name, why in results["skipped"].items():
        console.print(f"left out: {name}: {why}", highlight=False, markup=False)

    contexts = {name: row["ms_per_token"] for name, row in peers.items() if "ms_per_token" in row}
    if contexts:
        lengths = list(next(iter(contexts.values())))
        table = Table("ms per decoded token at context", *lengths)
        for name, row in contexts.items():
            table.add_row(name, *[f"{row[length]:.2f}" for length in lengths])
        console.print(table)

    verdicts = list(targets(results))
    if verdicts:
        table = Table("target", "tokenloom", "against", "its figure", "ratio", "wanted", "")
        for verdict in verdicts:
            table.add_row(*verdict)
        console.print(table)


def targets(results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows of the table of targets: what, ours, whose figure it is held against, that, ratio, wanted, met."""
    peers = results["peers"]
    ours = peers.get(OURS, {})
    others = {name: row for name, row in peers.items() if name != OURS}
    for column, title, wanted in COLUMNS:
        rivals = {name: row[column] for name, row in others.items() if column in row}
        if column not in ours or not rivals:
            continue
        best = max(rivals, key=lambda name: rivals[name])
        yield _ratio(title, ours[column], f"best: {best}", rivals[best], wanted)
    for column, wanted in SAME_WEIGHTS_TARGETS.items():
        theirs = others.get(SAME_WEIGHTS, {}).get(column)
        if column in ours and theirs:
            title = next(title for name, title, _ in COLUMNS if name == column)
            yield _ratio(title, ours[column], SAME_WEIGHTS, theirs, wanted)
    if "decode" in ours:
        read = ours["decode"] * ours["weight_bytes"]
        limit = results["bandwidth_bytes_per_s"]
        yield _ratio("weights read, GB/s", read / 1e9, "plain read", limit / 1e9, BANDWIDTH_TARGET)
    llama = others.get(SAME_WEIGHTS, {}).get("peak_bytes")
    if llama and "torch_bytes" in results:
        allowed = MEMORY_FACTOR * llama + results["torch_bytes"]
        against = f"{MEMORY_FACTOR} x {SAME_WEIGHTS} + torch"
        for title, used in (
            ("peak MB, engine", ours["peak_bytes"]),
            ("peak MB, serve", results["serve"]["peak_bytes"]),
        ):
            yield (
                title,
                f"{used / 1e6:.0f}",
                against,
                f"{allowed / 1e6:.0f}",
                f"{used / allowed:.2f}x",
                "<= 1x",
                _met(used <= allowed),
            )


def _ratio(title: str, ours: float, against: str, theirs: float, wanted: float | None) -> tuple[str, ...]:
    ratio = ours / theirs
    goal, met = ("", "") if wanted is None else (f">= {wanted}x", _met(ratio >= wanted))
    return title, f"{ours:.1f}", against, f"{theirs:.1f}", f"{ratio:.2f}x", goal, met


def _met(yes: bool) -> str:
    return "[green]reached[/]" if yes else "[red]missed[/]"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def plot(results: dict[str, Any], path: Path) -> None:
    """One panel of bars per column and for memory, and decode time against context."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    peers = results["peers"]
    panels = [(column, f"{title}, tokens/s", 1.0) for column, title, target in COLUMNS if target is not None]
    panels.append(("peak_bytes", "peak memory, MB", 1e-6))
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8), layout="constrained")
    for axis, (column, title, scale) in zip(axes.flat, panels, strict=False):
        rows = [(name, row[column] * scale) for name, row in reversed(peers.items()) if column in row]
        colors = ["#d1495b" if name == OURS else "#8d99ae" for name, _ in rows]
        bars = axis.barh([name for name, _ in rows], [value for _, value in rows], color=colors)
        axis.bar_label(bars, fmt="%.0f", padding=3)
        axis.margins(x=0.15)
        axis.set_title(title)
    growth = axes.flat[-1]
    for name, row in peers.items():
        if "ms_per_token" in row:
            points = {int(length): ms for length, ms in row["ms_per_token"].items()}
            growth.plot(list(points), list(points.values()), marker="o", label=name)
    growth.set_title("decode against context, ms/token")
    growth.set_xlabel("tokens of context")
    growth.set_ylim(bottom=0)
    if growth.lines:
        growth.legend()
    figure.suptitle(f"{results['machine']}, {results['threads']} threads, {results['date']}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
