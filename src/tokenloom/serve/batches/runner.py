"""Checks new batches, and opens a lane for each account that answers them behind all else."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from tokenloom.config import BatchSettings
from tokenloom.serve.batches import input_file
from tokenloom.serve.batches.asking import Asker
from tokenloom.serve.batches.background import Disk, for_ever
from tokenloom.serve.batches.lane import CHECKED, Lane
from tokenloom.serve.batches.line_answers import UNREADABLE
from tokenloom.serve.batches.store import BatchStateError, BatchStore

logger = logging.getLogger("tokenloom.serve")


class BatchRunner:
    """Tasks of the server's event loop: one checks input files, one opens lanes, where lines are answered."""

    def __init__(self, store: BatchStore, asker: Asker, settings: BatchSettings) -> None:
        self.store = store
        self._asker = asker
        self._settings = settings
        self._disk = Disk()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._to_check = asyncio.Event()
        self._checked = asyncio.Event()
        self._lanes: dict[str | None, Lane] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Take up the batches that are not over, then new ones."""
        self._loop = asyncio.get_running_loop()
        self._tasks = [
            asyncio.create_task(for_ever(self._check_next, self._to_check)),
            asyncio.create_task(for_ever(self._open_lanes, self._checked)),
        ]

    def wake(self) -> None:
        """A batch is new, or was cancelled. May be called from any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._to_check.set)
            self._loop.call_soon_threadsafe(self._checked.set)

    async def stop(self) -> None:
        """Leave everything as it is on disk; lines at work are asked again at the next start."""
        tasks = [*self._tasks, *(lane.task for lane in self._lanes.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._disk.close()

    async def _check_next(self) -> bool:
        batch = await self._disk.do(self.store.oldest, "validating")
        if batch is None:
            return False
        with contextlib.suppress(BatchStateError):  # cancelled meanwhile
            path = (await self._disk.do(self.store.input, batch)).path
            try:
                found = await asyncio.to_thread(
                    input_file.check, path, batch.endpoint, self._settings.max_lines
                )
            except OSError:
                logger.exception("the input file of batch %s cannot be read", batch.id)
                await self._disk.do(self.store.fail, batch.id, [UNREADABLE])
                return True
            if found.faults:
                await self._disk.do(self.store.fail, batch.id, found.faults)
            else:
                await self._disk.do(self.store.begin, batch.id, found.total, found.model)
                self._checked.set()
        return True

    async def _open_lanes(self) -> bool:
        for account in await self._disk.do(self.store.accounts, *CHECKED):
            if account in self._lanes:
                self._lanes[account].wake()
            else:
                self._lanes[account] = Lane(
                    account, self.store, self._disk, self._asker, self._settings.max_concurrent
                )
        return False
