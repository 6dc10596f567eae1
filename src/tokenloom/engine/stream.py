"""An answer as its reader gets it: filled from the engine's thread, read on an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from tokenloom.engine.outputs import StepOutput
from tokenloom.engine.request import Request
from tokenloom.engine.revival import Told


class Stream(AsyncIterator[StepOutput]):
    """The outputs of one request as they come. Closing it, or losing it, aborts the request."""

    def __init__(self, request: Request, abort: Callable[[str], None]) -> None:
        self.request = request
        self.request_id = request.request_id
        self.told = Told()
        self.failures = 0
        """Of the engine's loop while it ran."""
        self._abort = abort
        self._loop = asyncio.get_running_loop()
        self._outputs: asyncio.Queue[StepOutput] = asyncio.Queue()
        self._done = False

    def put(self, output: StepOutput) -> None:
        """Called on the event loop's thread."""
        self._outputs.put_nowait(output)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    async def __anext__(self) -> StepOutput:
        if self._done:
            raise StopAsyncIteration
        output = await self._outputs.get()
        self._done = output.finished
        return output

    async def aclose(self) -> None:
        """Abort the request unless it has finished; the engine drops it before its next iteration."""
        self._close()

    def _close(self) -> None:
        if not self._done:
            self._done = True
            self._abort(self.request_id)

    def __del__(self) -> None:
        self._close()


def put_all(pairs: list[tuple[Stream, StepOutput]]) -> None:
    """What one iteration has for the streams of one event loop; called on its thread."""
    for stream, output in pairs:
        stream.put(output)
