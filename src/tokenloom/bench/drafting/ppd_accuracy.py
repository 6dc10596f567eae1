"""How often PPD's guesses are right, beside its paper's."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from tokenloom.engine.engine import Engine
from tokenloom.methods.calibration import load, shape_of

PAPER: dict[str, list[tuple[float, float | None]]] = {
    "Vicuna-7B": [(0.48, 0.846), (0.26, None), (0.16, None)],
    "Vicuna-13B": [(0.52, 0.857), (0.29, None), (0.18, None)],
    "MobileLLaMA-1.4B": [(0.35, 0.746), (0.18, None), (0.12, None)],
}
"""First guess and first ten, of the 1st, 2nd, ... prompt token: what the trees of the official repository
(github.com/hmarkc/parallel-prompt-decoding) imply, measured there on Alpaca-eval prompts."""


def accuracy(engine: Engine) -> list[list[float]]:
    """Of the vectors trained for this model, on the answers held out of their training: the same pairs.

    Raises:
        RequestError: none were trained.
    """
    table = load("ppd", shape_of(engine, 1), hook="draft", made_by="train")["accuracy"]
    return [[float(row[0]), float(row.sum())] for row in table]


def print_accuracy(found: list[list[float]], model: str, out: Console) -> None:
    rows: dict[str, Any] = {model: found, **{f"{name}, by the paper": pairs for name, pairs in PAPER.items()}}
    longest = max(map(len, rows.values()))
    kinds = [f"{i} ahead, {kind}" for i in range(2, 2 + longest) for kind in ("first", "first 10")]
    table = Table(
        "model",
        *(Column(kind, justify="right") for kind in kinds),
        title="how often ppd's guesses are right, on held-out answers",
        box=SIMPLE,
    )
    for name, pairs in rows.items():
        table.add_row(name, *("" if value is None else f"{value:.0%}" for pair in pairs for value in pair))
    out.print(table)
