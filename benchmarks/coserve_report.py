"""What `coserve.py` measured: a line per mode and load, pictures, and the targets beside what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HEADER = (
    f"{'mode':17s} {'load':>5s} {'req/s':>6s} {'n':>4s} {'SLO':>5s} {'TTFT p50':>9s} {'p99':>7s} "
    f"{'gap p50':>8s} {'p99':>7s} {'ft tok/s':>9s} {'out tok/s':>9s} {'restarts':>8s}"
)


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['mode']:17s} {row['load']:5.2f} {row['rate']:6.2f} {row['requests']:4d} "
        f"{row['attainment']:5.0%} {row['ttft_ms']['p50']:9.0f} {row['ttft_ms']['p99']:7.0f} "
        f"{row['gap_ms']['p50']:8.0f} {row['gap_ms']['p99']:7.0f} {row['finetuning_tokens_per_s']:9.1f} "
        f"{row['inference_tokens_per_s']:9.1f} {row['restarts']:8d}",
        flush=True,
    )


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.2))
    pictures = [
        ("SLO attainment", lambda r: 100 * r["attainment"], "%"),
        ("p99 gap between tokens", lambda r: r["gap_ms"]["p99"], "ms"),
        ("finetuning", lambda r: r["finetuning_tokens_per_s"], "tokens/s"),
    ]
    for axis, (title, value, unit) in zip(axes, pictures, strict=True):
        for mode in dict.fromkeys(row["mode"] for row in rows):
            if mode == "ft_only" and unit != "tokens/s":
                continue
            points = sorted((row["load"], value(row)) for row in rows if row["mode"] == mode)
            style = ":" if mode.startswith("separate") else "-"
            axis.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=mode)
        axis.set(title=title, xlabel="load (1 = saturated by inference alone)", ylabel=unit)
    axes[1].set_yscale("log")
    axes[2].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def verdict(rows: list[dict[str, Any]]) -> None:
    """The targets, each beside what was found."""
    at = {(row["mode"], row["load"]): row for row in rows}
    loads = sorted({row["load"] for row in rows})
    print("\nload  attainment co-serving - off (points)  gap p99 temporal / co-serving  share of ft_only")
    for load in loads:
        if any((mode, load) not in at for mode in ("off", "coserve", "temporal")):
            continue
        off, co, temporal = at["off", load], at["coserve", load], at["temporal", load]
        alone = at["ft_only", load]["finetuning_tokens_per_s"]
        print(
            f"{load:4.2f}  {100 * (co['attainment'] - off['attainment']):20.1f}"
            f"  {temporal['gap_ms']['p99'] / max(1e-9, co['gap_ms']['p99']):31.1f}"
            f"  {co['finetuning_tokens_per_s'] / alone:27.0%}"
        )
    print("\nwhere another mode trains faster at an attainment no lower than co-serving's less 3 points:")
    lost = [
        (row["mode"], row["load"], row["finetuning_tokens_per_s"], at["coserve", row["load"]])
        for row in rows
        if row["mode"] not in ("off", "coserve", "ft_only")
        and row["finetuning_tokens_per_s"] > at["coserve", row["load"]]["finetuning_tokens_per_s"]
        and row["attainment"] >= at["coserve", row["load"]]["attainment"] - 0.03
    ]
    for mode, load, rate, co in lost:
        print(f"  {mode} at load {load}: {rate:.1f} against {co['finetuning_tokens_per_s']:.1f} tokens/s")
    if not lost:
        print("  nowhere")
