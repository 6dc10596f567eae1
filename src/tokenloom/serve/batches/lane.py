"""The batches of one account: answered one after another, beside those of other accounts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from itertools import islice
from typing import Literal

from tokenloom.finetune.blobs import Blob
from tokenloom.serve.batches.accounts import KeyGoneError
from tokenloom.serve.batches.asking import Asker
from tokenloom.serve.batches.background import Disk, for_ever
from tokenloom.serve.batches.input_file import Line
from tokenloom.serve.batches.line_answers import UNREADABLE, InputLostError, answer_of, given_up, unanswered
from tokenloom.serve.batches.records import BatchRecord, Status
from tokenloom.serve.batches.store import BatchStateError, BatchStore

logger = logging.getLogger("tokenloom.serve")

End = Literal["completed", "cancelled", "expired", "failed"]

CHECKED: tuple[Status, ...] = ("cancelling", "finalizing", "in_progress")
"""States of a batch that is not over, and whose lines need no more checking."""
_CHUNK_LINES = 256
_LEFT = {
    "cancelled": ("batch_cancelled", "The batch was cancelled before this request was answered."),
    "expired": ("batch_expired", "The batch's completion window ended before this request was answered."),
    "revoked": ("invalid_api_key", "The batch's API key was revoked before this request was answered."),
}


class Lane:
    """A task of the server's event loop that answers lines.

    Args:
        account: None for the batches that no key made.
        workers: lines that it asks for at the same time.
    """

    def __init__(
        self, account: str | None, store: BatchStore, disk: Disk, asker: Asker, workers: int
    ) -> None:
        self.account = account
        self._store = store
        self._disk = disk
        self._asker = asker
        self._workers = workers
        self._changed = asyncio.Event()
        self.task = asyncio.create_task(for_ever(self._advance_next, self._changed))

    def wake(self) -> None:
        """A batch may have come, or been cancelled."""
        self._changed.set()

    async def _advance_next(self) -> bool:
        batch = await self._disk.do(self._store.oldest_of, self.account, *CHECKED)
        if batch is None:
            return False
        end: End = "completed"
        if batch.status == "cancelling":
            end = "cancelled"
        elif batch.status == "in_progress":
            end = await self._answer(batch)
            if end == "completed":
                with contextlib.suppress(BatchStateError):  # cancelled meanwhile
                    await self._disk.do(self._store.move, batch.id, "finalizing")
                return True
        await self._disk.do(self._finish, batch, end)
        return True

    async def _answer(self, batch: BatchRecord) -> End:
        """Answer the lines that have no answer yet, until the batch is over in one way or another."""
        path = (await self._disk.do(self._store.input, batch)).path
        answered = await self._disk.do(self._store.answered, batch.id)
        left = unanswered(path, batch, answered)
        workers = {asyncio.create_task(self._work(batch, left)) for _ in range(self._workers)}
        all_done = asyncio.create_task(asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION))
        try:
            while True:
                self._changed.clear()
                changed = asyncio.create_task(self._changed.wait())
                remaining = batch.expires_at - time.time()
                await asyncio.wait(
                    {all_done, changed}, timeout=max(0, remaining), return_when=asyncio.FIRST_COMPLETED
                )
                changed.cancel()
                if all_done.done():
                    for worker in all_done.result()[0]:
                        worker.result()
                    return "completed"
                if time.time() >= batch.expires_at:
                    return "expired"
                if (await self._disk.do(self._store.get, batch.id)).status == "cancelling":
                    return "cancelled"
                # None of the others is at work, so they need not wait for their turn to end.
                while other := await self._disk.do(self._store.oldest_of, self.account, "cancelling"):
                    if other.id == batch.id:
                        return "cancelled"
                    await self._disk.do(self._finish, other, "cancelled")
        except InputLostError:
            logger.exception("the input file of batch %s cannot be read", batch.id)
            return "failed"
        finally:
            for task in (all_done, *workers):
                task.cancel()
            await asyncio.gather(all_done, *workers, return_exceptions=True)

    async def _work(self, batch: BatchRecord, left: Iterator[Line]) -> None:
        for line in left:
            try:
                reply = await self._asker.answer(batch, line)
            except KeyGoneError:  # what the other workers have begun is still answered
                rest = [line, *islice(left, _CHUNK_LINES)]
                answers = [given_up(line, *_LEFT["revoked"]) for line in rest]
            else:
                answers = [answer_of(line, reply)]
            await self._disk.do(self._store.record, batch.id, answers)

    # -- on the disk's thread ---------------------------------------------------------------------------

    def _finish(self, batch: BatchRecord, end: End) -> None:
        """Write the output files, which take every answer along, and end the batch."""
        faults = None
        if end == "failed":
            faults = [UNREADABLE]
        elif end != "completed" and batch.counts.total:  # 0: its lines were not checked yet
            self._give_up_rest(batch, end)
        with contextlib.ExitStack() as open_blobs:
            output, errors = (self._write(batch, ok, open_blobs) for ok in (True, False))
            self._store.publish(batch.id, end, output, errors, faults)

    def _give_up_rest(self, batch: BatchRecord, end: End) -> None:
        """An error as the answer to each line that has none."""
        path = self._store.input(batch).path
        rest = unanswered(path, batch, self._store.answered(batch.id))
        try:
            while chunk := list(islice(rest, _CHUNK_LINES)):
                self._store.record(batch.id, [given_up(line, *_LEFT[end]) for line in chunk])
        except InputLostError:
            logger.exception("the input file of batch %s cannot be read", batch.id)

    def _write(self, batch: BatchRecord, ok: bool, open_blobs: contextlib.ExitStack) -> Blob | None:
        answers = self._store.answers(batch.id, ok=ok)
        first = next(answers, None)
        if first is None:
            return None
        blob = open_blobs.enter_context(self._store.files.begin(within_quota=False))
        for text in (first, *answers):
            blob.write(text.encode() + b"\n")
        blob.seal()
        return blob
