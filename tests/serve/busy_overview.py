"""What a busy engine would tell of itself."""

from __future__ import annotations

from tokenloom.engine.composition import Rows
from tokenloom.engine.overview import BlocksOverview, Overview, RequestOverview, TrainingOverview


def busy(now: int, age_s: float = 2.5) -> Overview:
    """Two requests, the first of them `age_s` old, a job that trains, and three seconds of iterations before
    `now`."""
    seen = [
        RequestOverview(
            "req-a",
            "decode",
            age_s,
            0.2,
            40,
            16,
            51,
            12,
            64,
            1,
            4,
            "sailor",
            "snapkv(budget=64)+pyramid()",
            None,
        ),
        RequestOverview("req-\x1b[2Jb", "waiting", 0.5, None, 7, 0, 0, 0, None, 1, 0, None, None, "ngram()"),
    ]
    seconds = [
        Rows(now - 3 + i, 10, prefill=20, decode=30, drafted=0, training=50, busy_ms=500) for i in range(3)
    ]
    return Overview(seen, 5, BlocksOverview(16, "rrrttcff"), [TrainingOverview(7, 1.25)], False, seconds)
