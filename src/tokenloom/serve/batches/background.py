"""What goes on beside the requests: steps that are taken for ever, and a thread for the disk."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from tokenloom.errors import TokenloomError

logger = logging.getLogger("tokenloom.serve")

T = TypeVar("T")

RETRY_S = 2.0
_TROUBLE = (OSError, SQLAlchemyError, TokenloomError)


class Disk:
    """One thread, for whatever touches the store.

    It does things in the order of the calls, so that nothing that was begun is still under way when the next
    thing, or the end, comes.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")

    async def do(self, call: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *args)

    async def close(self) -> None:
        await asyncio.to_thread(self._thread.shutdown)


async def for_ever(step: Callable[[], Awaitable[bool]], changed: asyncio.Event) -> None:
    """Take steps while there are any (`step` says so), and then whenever something has changed."""
    while True:
        changed.clear()
        try:
            while await step():
                continue
            await changed.wait()
        except _TROUBLE:  # the disk may be full, the database away
            logger.exception("batches have to wait")
            await asyncio.sleep(RETRY_S)
