"""Asking for the answer to a line, once nobody else waits and its key has not used up its limits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from tokenloom.serve.batches.accounts import Accounts
from tokenloom.serve.batches.inner_app import Reply
from tokenloom.serve.batches.input_file import Line
from tokenloom.serve.batches.records import BatchRecord, Endpoint
from tokenloom.serve.key_limits import Meter

Ask = Callable[[Endpoint, dict[str, Any], Meter | None], Awaitable[Reply]]

PRIORITY = 2**30
"""Of every line: with `scheduler.policy = "priority"` all other requests go first."""
LOOK_S = 0.05
RETRY_S = 2.0
_BUSY, _STOPPING = 429, 503


class Asker:
    """Asks for lines of all batches.

    Args:
        ask: answers a line as the server's routes would.
        accounts: whose limits it must keep.
        free: whether a line may begin: the engine takes requests and nobody waits.
        max_concurrent: lines at work at the same time.
    """

    def __init__(self, ask: Ask, accounts: Accounts, free: Callable[[], bool], max_concurrent: int) -> None:
        self._ask = ask
        self._accounts = accounts
        self._free = free
        self._room = asyncio.Semaphore(max_concurrent)
        self._turn = asyncio.Lock()

    async def answer(self, batch: BatchRecord, line: Line) -> Reply:
        """The answer to a line, however long that takes. Raises KeyGoneError."""
        while True:
            wait_s = _wait_s(await self._accounts.meter(batch.account))
            if not wait_s:  # whoever waits for its limits takes no room from the lines of others
                async with self._room:
                    async with self._turn:  # one at a time looks, on behalf of all
                        while not self._free():
                            await asyncio.sleep(LOOK_S)
                    # Meanwhile other lines may have taken what was left, or the key may be gone.
                    meter = await self._accounts.meter(batch.account)
                    wait_s = _wait_s(meter)
                    if not wait_s:
                        reply = await self._ask(batch.endpoint, {**line.body, "priority": PRIORITY}, meter)
                        if reply.status not in (_BUSY, _STOPPING):
                            return reply
                        wait_s = LOOK_S if reply.status == _STOPPING else max(RETRY_S, reply.retry_after_s)
            await asyncio.sleep(wait_s)


def _wait_s(meter: Meter | None) -> float:
    """How long a key's limits hold a line; or how long to sleep before a look at whether it was revoked."""
    return 0.0 if meter is None else min(RETRY_S, meter.wait_s())
