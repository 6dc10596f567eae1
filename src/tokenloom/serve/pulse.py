"""The last resort: a process in which nothing runs any more ends, so that its supervisor starts another."""

from __future__ import annotations

import asyncio
import faulthandler

PATIENCE = 5
"""How many times as long as an iteration may take the event loop may stand still."""


async def prove_life(limit_s: float) -> None:
    """Until cancelled, put off the end of this process, which comes with status 1 and all stacks on stderr
    once the event loop has stood still for `limit_s`; 0: never. It works even if some code never lets go of
    the interpreter's lock, which the engine's watchdog needs."""
    if not limit_s:
        return
    try:
        while True:
            faulthandler.dump_traceback_later(limit_s, exit=True)
            await asyncio.sleep(min(1.0, limit_s / 4))
    finally:
        faulthandler.cancel_dump_traceback_later()
