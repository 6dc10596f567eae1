"""A table of what `measure` found, and its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table


def write_json(results: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    path.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return path


def print_table(results: dict[str, Any], out: Console) -> None:
    """Tokens/s are of decoding alone; `x` is against no drafting on the same prompts, in turn with it. So
    many `ms` of a pass go into guessing, besides its rows."""
    names = ("tok/s", "x", "tok/pass", "no loops", "accepted", "ms", "repeats", "same")
    for temperature in dict.fromkeys(row["temperature"] for row in results["rows"]):
        table = Table(
            Column("drafter", overflow="fold", min_width=12),
            *(Column(name, justify="right", no_wrap=True) for name in names),
            title=f"temperature {temperature:g}",
            box=SIMPLE,
            padding=(0, 1, 0, 0),
        )
        workload = ""
        for row in results["rows"]:
            if row["temperature"] != temperature:
                continue
            if row["workload"] != workload:
                workload = row["workload"]
                table.add_section()
                table.add_row(f"[bold]{workload}[/]")
            straight = row["tokens_per_pass_without_loops"]
            table.add_row(
                row["spec"],
                f"{row['tokens_per_s']:.1f}",
                f"{row['speedup']:.2f}",
                f"{row['tokens_per_pass']:.2f}",
                "" if straight is None else f"{straight:.2f}",
                f"{row['accepted']}/{row['drafted']}",
                f"{row['guessing_ms_per_pass']:.2f}",
                f"{row['repeated']:.0%}",
                "yes" if row["same_text"] else "NO",
            )
        out.print(table)
