"""Notices that the engine's loop hangs or has died."""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from tokenloom.engine.engine import Engine
from tokenloom.engine.isolation import Isolation
from tokenloom.engine.stats import TrainingCounter

logger = logging.getLogger("tokenloom.engine")

TICK_S = 1.0


@dataclass(eq=False)
class Life:
    """One run of the loop, from its start to its end or to the day that it is given up."""

    engine: Engine
    isolation: Isolation
    trained: TrainingCounter
    thread: threading.Thread | None = None
    beats: int = 0
    """Iterations begun."""
    busy: bool = False
    """In an iteration, rather than waiting for work."""
    over: bool = False
    """Another life has taken its place: whatever it still does is nobody's business."""

    @property
    def started(self) -> bool:
        return self.thread is not None

    @property
    def alive(self) -> bool:
        return not self.over and self.thread is not None and self.thread.is_alive()


class Watchdog:
    """Tells when a life hangs.

    It counts its own ticks rather than seconds: a process that was stopped for a while does not hang.

    Args:
        limit_s: an iteration that takes longer hangs.
        current: the life at hand.
        hangs: called for one that hangs (True) or whose thread is gone (False).
    """

    def __init__(
        self, limit_s: float, current: Callable[[], Life], hangs: Callable[[Life, BaseException, bool], None]
    ) -> None:
        self.limit_s, self.current, self.hangs = limit_s, current, hangs
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="tokenloom-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()

    def _watch(self) -> None:
        tick_s = min(TICK_S, self.limit_s / 4)
        seen: tuple[Life, int] | None = None
        ticks = 0
        while not self._ended.wait(tick_s):
            life = self.current()
            now = (life, life.beats)
            if life.over or not life.busy or now != seen:
                seen, ticks = now, 0
                continue
            ticks += 1
            if not life.alive:
                self.hangs(life, RuntimeError("the engine's thread is gone"), False)
            elif ticks * tick_s >= self.limit_s:
                logger.error("an iteration takes more than %g s; it is here:\n%s", self.limit_s, _stack(life))
                self.hangs(life, TimeoutError(f"an iteration took more than {self.limit_s:g} s"), True)


def _stack(life: Life) -> str:
    assert life.thread is not None
    frame = sys._current_frames().get(life.thread.ident or 0)
    return "".join(traceback.format_stack(frame)) if frame is not None else "(no Python code)"
