"""Tables and Pareto plots of what `measure` found."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import exp
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

Numbers = dict[str, float]


def _perplexity(numbers: Numbers) -> float:
    return exp(numbers["nll"])


# Column, its group of probes, what is shown of it, digits, and whether less is better.
QUALITY: tuple[tuple[str, str, str | Callable[[Numbers], float], int, bool], ...] = (
    ("KL", "text", "kl", 3, True),
    ("top-1", "text", "agreement", 2, False),
    ("perplexity", "text", _perplexity, 2, True),
    ("copy early", "copy early", "nll", 2, True),
    ("copy middle", "copy middle", "nll", 2, True),
    ("copy late", "copy late", "nll", 2, True),
    ("needle", "needle", "exact", 2, False),
    ("needle NLL", "needle", "nll", 2, True),
    ("keys", "multikey", "exact", 2, False),
    ("keys NLL", "multikey", "nll", 2, True),
    ("summary", "summary", "nll", 2, True),
    ("overlap", "summary", "overlap", 2, False),
)
# The columns that are worth a picture: one for each kind of probe.
PICTURES = {
    "KL": "text: KL to dense",
    "copy early": "copy, early block: NLL",
    "copy middle": "copy, middle block: NLL",
    "needle": "needles found",
    "keys": "keys found",
    "summary": "dense summary: NLL",
}
COSTS = (("kv_bytes", "KV after the prompt, % of dense"), ("tokens_read", "keys read by a row, % of dense"))


def value(row: dict[str, Any], column: str) -> float | None:
    """What a method has in a column of QUALITY, or None without such probes."""
    _, group, key, _, _ = next(entry for entry in QUALITY if entry[0] == column)
    numbers = row["groups"].get(group)
    if numbers is None:
        return None
    return float(key(numbers) if callable(key) else numbers[key])


def costs(results: dict[str, Any], row: dict[str, Any]) -> Numbers:
    """A method's bytes, reads and times in the first group of probes, and parts of dense attention's."""
    dense = results["methods"][0]["groups"]
    group = next(iter(dense))
    numbers, reference = row["groups"][group], dense[group]
    return {
        **{key: numbers[key] for key in ("kv_bytes", "kv_bytes_peak", "tokens_read", "ttft_ms", "tpot_ms")},
        **{f"{key}_part": numbers[key] / reference[key] for key, _ in COSTS},
    }


def print_table(results: dict[str, Any], console: Console) -> None:
    """Every method's quality, and what it costs."""
    methods = results["methods"]
    console.print(
        f"{results['model']}  {results['dtype']}  {results['device']}  backend {results['backend']}  "
        f"{results['threads']} threads  {results['machine']}  {results['text']}, seed {results['seed']}",
        highlight=False,
    )
    shown = [entry for entry in QUALITY if entry[1] in methods[0]["groups"]]
    method = Column("method", overflow="fold", min_width=16)
    title = "quality; copy and summary in nats, needle and keys: found"
    table = Table(method, *[entry[0] for entry in shown], title=title)
    for row in (row for row in methods if row["error"] is None):
        cells = [f"{value(row, entry[0]):.{entry[3]}f}" for entry in shown]
        table.add_row(row["spec"], *cells)
    console.print(table)
    absent = methods[0]["groups"].get("copy absent")
    if absent is not None:
        console.print(f"copy, without a first block: NLL {absent['nll']:.2f}", highlight=False)
    group = next(iter(methods[0]["groups"]))
    head = ("KV MB", "of dense", "KV peak MB", "keys read", "of dense", "TTFT ms", "TPOT ms")
    table = Table(method, *head, title=f"cost ({group})")
    for row in (row for row in methods if row["error"] is None):
        c = costs(results, row)
        table.add_row(
            row["spec"],
            f"{c['kv_bytes'] / 1e6:.1f}",
            f"{c['kv_bytes_part']:.0%}",
            f"{c['kv_bytes_peak'] / 1e6:.1f}",
            f"{c['tokens_read']:.0f}",
            f"{c['tokens_read_part']:.0%}",
            "-" if results["reuse_prompts"] else f"{c['ttft_ms']:.0f}",
            f"{c['tpot_ms']:.1f}",
        )
    console.print(table)
    for row in (row for row in methods if row["error"] is not None):
        console.print(f"left out: {row['spec']}: {row['error']}", highlight=False, markup=False)


def write_json(results: dict[str, Any], folder: Path) -> Path:
    """Write results.json; the folder is made where there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    file.write_text(json.dumps(results, indent=2))
    return file


def write(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write results.json, and pareto.png where matplotlib is installed; the files written."""
    files = [write_json(results, folder)]
    if all(row["error"] is not None for row in results["methods"][1:]):
        return files
    try:
        import matplotlib
    except ImportError:
        return files
    matplotlib.use("Agg")
    files.append(folder / "pareto.png")
    plot(results, files[1])
    return files


def pareto(points: list[tuple[float, float]], less_is_better: bool) -> list[tuple[float, float]]:
    """Those (cost, quality) of which no other is as cheap and better, by cost."""
    front: list[tuple[float, float]] = []
    sign = 1 if less_is_better else -1
    for cost, quality in sorted(points, key=lambda point: (point[0], sign * point[1])):
        if not front or sign * quality < sign * front[-1][1]:
            front.append((cost, quality))
    return front


def plot(results: dict[str, Any], path: Path) -> None:
    """A panel for each kind of probe and each cost; a method's budgets are one line, the best are grey."""
    from matplotlib import pyplot

    dense, *rows = results["methods"]
    rows = [row for row in rows if row["error"] is None]
    titles = [title for title in PICTURES if value(dense, title) is not None]
    size = (3.6 * len(titles), 7.2)
    figure, axes = pyplot.subplots(
        len(COSTS), len(titles), figsize=size, squeeze=False, layout="constrained", sharex="row"
    )
    families = list(dict.fromkeys(row["family"] for row in rows))
    colors = [*pyplot.colormaps["tab10"].colors, *pyplot.colormaps["Dark2"].colors]  # type: ignore[attr-defined]
    for line, (cost, label) in enumerate(COSTS):
        for axis, title in zip(axes[line], titles, strict=True):
            points = [
                (100 * costs(results, row)[f"{cost}_part"], value(row, title) or 0.0, row["family"])
                for row in rows
            ]
            less = next(entry[4] for entry in QUALITY if entry[0] == title)
            front = pareto([(x, y) for x, y, _ in points], less)
            axis.step(*zip(*front, strict=True), where="post", color="#cccccc", linewidth=5, zorder=0)
            for i, family in enumerate(families):
                own = sorted((x, y) for x, y, name in points if name == family)
                axis.plot(*zip(*own, strict=True), marker="o", color=colors[i % len(colors)], label=family)
            axis.set(title=PICTURES[title], xlabel=label)
            if title == "KL":
                axis.set_yscale("log")  # dense attention's is 0
            else:
                axis.axhline(value(dense, title) or 0.0, color="#444444", linestyle=":", linewidth=1)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)))
    figure.suptitle(
        f"{results['model']}, {results['text']}, {results['date']}; dotted: dense; grey: the best"
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
