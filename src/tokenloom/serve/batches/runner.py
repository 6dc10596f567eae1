"""Answers batches one after another, a few lines at a time, behind whatever else the server does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from tokenloom.config import BatchSettings
from tokenloom.errors import TokenloomError
from tokenloom.finetune.blobs import Blob
from tokenloom.serve.batches import input_file
from tokenloom.serve.batches.inner_app import Reply
from tokenloom.serve.batches.input_file import Line
from tokenloom.serve.batches.records import BatchRecord, Endpoint, LineAnswer, LineFault, Tokens
from tokenloom.serve.batches.store import BatchStateError, BatchStore

logger = logging.getLogger("tokenloom.serve")

Ask = Callable[[Endpoint, dict[str, Any]], Awaitable[Reply]]
End = Literal["completed", "cancelled", "expired", "failed"]
T = TypeVar("T")

PRIORITY = 2**30
"""Of every line: with `scheduler.policy = "priority"` all other requests go first."""
LOOK_S = 0.05
RETRY_S = 2.0
_CHUNK_LINES = 256
_BUSY, _STOPPING = 429, 503
_LEFT: dict[End, tuple[str, str]] = {
    "cancelled": ("batch_cancelled", "The batch was cancelled before this request was answered."),
    "expired": ("batch_expired", "The batch's completion window ended before this request was answered."),
}
_TROUBLE = (OSError, SQLAlchemyError, TokenloomError)


class BatchRunner:
    """Two tasks of the server's event loop: one checks new input files, one answers lines.

    Whatever touches the store goes through one thread in the order of the calls, so that nothing that was
    begun is still under way when the next thing, or the end, comes.

    Args:
        ask: answers a line as the server's routes would.
        free: whether a line may begin: the engine takes requests and nobody waits.
    """

    def __init__(
        self, store: BatchStore, ask: Ask, settings: BatchSettings, free: Callable[[], bool]
    ) -> None:
        self.store = store
        self._ask = ask
        self._settings = settings
        self._free = free
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._to_check = asyncio.Event()
        self._changed = asyncio.Event()
        self._turn = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Take up the batches that are not over, then new ones."""
        self._loop = asyncio.get_running_loop()
        self._tasks = [
            asyncio.create_task(self._for_ever(self._check_next, self._to_check)),
            asyncio.create_task(self._for_ever(self._advance_next, self._changed)),
        ]

    def wake(self) -> None:
        """A batch is new, or was cancelled. May be called from any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._to_check.set)
            self._loop.call_soon_threadsafe(self._changed.set)

    async def stop(self) -> None:
        """Leave everything as it is on disk; lines at work are asked again at the next start."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._disk.shutdown)

    async def _for_ever(self, step: Callable[[], Awaitable[bool]], changed: asyncio.Event) -> None:
        while True:
            changed.clear()
            try:
                while await step():
                    continue
                await changed.wait()
            except _TROUBLE:  # the disk may be full, the database away
                logger.exception("batches have to wait")
                await asyncio.sleep(RETRY_S)

    async def _do(self, call: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, call, *args)

    # -- checking ---------------------------------------------------------------------------------------

    async def _check_next(self) -> bool:
        batch = await self._do(self.store.oldest, "validating")
        if batch is None:
            return False
        with contextlib.suppress(BatchStateError):  # cancelled meanwhile
            path = (await self._do(self.store.input, batch)).path
            try:
                found = await asyncio.to_thread(
                    input_file.check, path, batch.endpoint, self._settings.max_lines
                )
            except OSError:
                logger.exception("the input file of batch %s cannot be read", batch.id)
                await self._do(self.store.fail, batch.id, [_unreadable()])
                return True
            if found.faults:
                await self._do(self.store.fail, batch.id, found.faults)
            else:
                await self._do(lambda: self.store.begin(batch.id, found.total, found.model))
                self._changed.set()
        return True

    # -- answering --------------------------------------------------------------------------------------

    async def _advance_next(self) -> bool:
        batch = await self._do(self.store.oldest, "cancelling", "finalizing", "in_progress")
        if batch is None:
            return False
        end: End = "completed"
        if batch.status == "cancelling":
            end = "cancelled"
        elif batch.status == "in_progress":
            end = await self._answer(batch)
            if end == "completed":
                with contextlib.suppress(BatchStateError):  # cancelled meanwhile
                    await self._do(self.store.move, batch.id, "finalizing")
                return True
        await self._do(self._finish, batch, end)
        return True

    async def _answer(self, batch: BatchRecord) -> End:
        """Answer the lines that have no answer yet, until the batch is over in one way or another."""
        path = (await self._do(self.store.input, batch)).path
        answered = await self._do(self.store.answered, batch.id)
        left = _unanswered(path, batch, answered)
        workers = {asyncio.create_task(self._work(batch, left)) for _ in range(self._settings.max_concurrent)}
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
                if (await self._do(self.store.get, batch.id)).status == "cancelling":
                    return "cancelled"
                # None of the others is at work, so they need not wait for their turn to end.
                while (other := await self._do(self.store.oldest, "cancelling")) is not None:
                    if other.id == batch.id:
                        return "cancelled"
                    await self._do(self._finish, other, "cancelled")
        except _InputLostError:
            logger.exception("the input file of batch %s cannot be read", batch.id)
            return "failed"
        finally:
            for task in (all_done, *workers):
                task.cancel()
            await asyncio.gather(all_done, *workers, return_exceptions=True)

    async def _work(self, batch: BatchRecord, left: Iterator[Line]) -> None:
        for line in left:
            while True:
                async with self._turn:  # one at a time looks, on behalf of all
                    while not self._free():
                        await asyncio.sleep(LOOK_S)
                reply = await self._ask(batch.endpoint, {**line.body, "priority": PRIORITY})
                if reply.status not in (_BUSY, _STOPPING):
                    break
                await asyncio.sleep(RETRY_S if reply.status == _BUSY else LOOK_S)
            await self._do(self.store.record, batch.id, [_answer_of(line, reply)])

    # -- on the disk's thread ---------------------------------------------------------------------------

    def _finish(self, batch: BatchRecord, end: End) -> None:
        """Write the output files, which take every answer along, and end the batch."""
        faults = None
        if end == "failed":
            faults = [_unreadable()]
        elif end != "completed" and batch.counts.total:  # 0: its lines were not checked yet
            self._give_up_rest(batch, end)
        with contextlib.ExitStack() as open_blobs:
            output, errors = (self._write(batch, ok, open_blobs) for ok in (True, False))
            self.store.publish(batch.id, end, output, errors, faults)

    def _give_up_rest(self, batch: BatchRecord, end: End) -> None:
        """An error as the answer to each line that has none."""
        code, message = _LEFT[end]
        error = {"code": code, "message": message}
        path = self.store.input(batch).path
        rest = _unanswered(path, batch, self.store.answered(batch.id))
        try:
            while chunk := list(islice(rest, _CHUNK_LINES)):
                self.store.record(batch.id, [_line_answer(line, None, error) for line in chunk])
        except _InputLostError:
            logger.exception("the input file of batch %s cannot be read", batch.id)

    def _write(self, batch: BatchRecord, ok: bool, open_blobs: contextlib.ExitStack) -> Blob | None:
        answers = self.store.answers(batch.id, ok=ok)
        first = next(answers, None)
        if first is None:
            return None
        blob = open_blobs.enter_context(self.store.files.begin(within_quota=False))
        for text in (first, *answers):
            blob.write(text.encode() + b"\n")
        blob.seal()
        return blob


class _InputLostError(Exception):
    """The input file cannot be read any more, or is another one than was checked."""


def _unanswered(path: Path, batch: BatchRecord, answered: set[int]) -> Iterator[Line]:
    try:
        for line in input_file.requests(path, batch.endpoint):
            if line.number not in answered:
                yield line
    except (OSError, ValueError) as error:
        raise _InputLostError from error


def _unreadable() -> LineFault:
    return LineFault(
        code="file_unreadable", line=None, message="the file cannot be read on the server", param=None
    )


def _answer_of(line: Line, reply: Reply) -> LineAnswer:
    return _line_answer(line, reply, None)


def _line_answer(line: Line, reply: Reply | None, error: dict[str, str] | None) -> LineAnswer:
    response = None
    if reply is not None:
        response = {"status_code": reply.status, "request_id": reply.request_id, "body": reply.body}
    text = json.dumps(
        {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": line.custom_id,
            "response": response,
            "error": error,
        },
        ensure_ascii=False,
    )
    ok = reply is not None and reply.status == 200
    return LineAnswer(line.number, ok, text, _tokens(reply.body if ok and reply else {}))


def _tokens(body: dict[str, Any]) -> Tokens:
    """What an answer counted, in the words of chat completions or of responses."""
    usage = body.get("usage") or {}
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    return Tokens(
        input=usage.get("prompt_tokens", usage.get("input_tokens", 0)),
        cached=details.get("cached_tokens", 0),
        output=usage.get("completion_tokens", usage.get("output_tokens", 0)),
    )
