"""Curves of `tokenloom bench drafting`: what to compare for one, and what became of a table as it warmed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from tokenloom.errors import RequestError

CURVES = {
    "k": [f"token_recycling(k={k}, tree=paper80)" for k in (2, 4, 8, 16)],
    "tree": [f"token_recycling(tree={tree})" for tree in ("n4", "n8", "n16", "n32", "paper80")],
}
"""Candidates of a token, and nodes of the tree; all of them are verified in every pass."""
MOST_COLUMNS = 8


def specs_of(curves: list[str]) -> list[str]:
    """What lies on these curves. Raises RequestError where there is none of that name."""
    for curve in curves:
        if curve not in CURVES:
            raise RequestError(f"curve: no curve {curve!r}; there are {', '.join(CURVES)}")
    return list(dict.fromkeys(spec for curve in curves for spec in CURVES[curve]))


def warming(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each temperature and drafter, in the order in which they were given: tokens per pass and repetitions
    of every answer, workload after workload. What a drafter knows grows along it."""
    found: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        found.setdefault((row["temperature"], row["spec"]), []).extend(row["answers"])
    return [
        {"temperature": temperature, "spec": spec, "answers": answers}
        for (temperature, spec), answers in found.items()
        if spec != "off"
    ]


def print_warming(results: dict[str, Any], out: Console) -> None:
    """Means of a few answers each: tokens per pass, and in brackets the share of repeated 8-grams."""
    for temperature in dict.fromkeys(row["temperature"] for row in results["rows"]):
        curves = [curve for curve in warming(results) if curve["temperature"] == temperature]
        if not curves:
            continue
        count = len(curves[0]["answers"])
        parts = min(MOST_COLUMNS, count)
        edges = [round(i * count / parts) for i in range(parts + 1)]
        ranges = list(pairwise(edges))
        table = Table(
            Column("drafter", overflow="fold", min_width=12),
            *(Column(_range(begin, end), justify="right", no_wrap=True) for begin, end in ranges),
            title=f"tokens per pass by answer (repeats), temperature {temperature:g}",
            box=SIMPLE,
            padding=(0, 1, 0, 0),
        )
        for curve in curves:
            cells = [_mean(curve["answers"][begin:end]) for begin, end in ranges]
            table.add_row(curve["spec"], *cells)
        out.print(table)


def _range(begin: int, end: int) -> str:
    return f"{end}" if end == begin + 1 else f"{begin + 1}-{end}"


def _mean(answers: list[dict[str, Any]]) -> str:
    per_pass = sum(a["tokens"] for a in answers) / sum(a["passes"] for a in answers)
    return f"{per_pass:.2f} ({sum(a['repeated'] for a in answers) / len(answers):.0%})"
