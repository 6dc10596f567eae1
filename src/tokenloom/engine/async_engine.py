"""The engine in a thread of its own, so that HTTP never stalls it nor it HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from tokenloom.cache.policy import KVMethod
from tokenloom.config import Settings
from tokenloom.engine.adapters import LoadedAdapter
from tokenloom.engine.draft import DraftMethod
from tokenloom.engine.engine import Engine
from tokenloom.engine.isolation import Isolation
from tokenloom.engine.outputs import Delta, FinishReason, StepOutput
from tokenloom.engine.overview import Overview, overview
from tokenloom.engine.request import Request
from tokenloom.engine.revival import carry_over, successor
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.engine.state import EngineState, engine_state
from tokenloom.engine.stats import EngineStats, TrainingCounter
from tokenloom.engine.stream import Stream, put_all
from tokenloom.engine.turns import Turns
from tokenloom.engine.watchdog import Life, Watchdog
from tokenloom.errors import EngineBusyError, EngineStoppedError, GenerationError, RequestError
from tokenloom.logs import fields

logger = logging.getLogger("tokenloom.engine")


class AsyncEngine:
    """Runs an `Engine` in a thread and speaks asyncio to the outside.

    All methods may be called from any event loop; `generate` and `embed` from inside a running one.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        """The one at work. Another takes its place when the loop is started again."""
        self.settings: Settings = engine.settings
        self.model_name = engine.settings.server.served_model_name or engine.name
        self.tokenizer = engine.tokenizer
        self.config = engine.config
        self.max_model_len = engine.max_model_len
        self.on_failure: Callable[[], None] = lambda: None
        """Called when the loop has failed for good."""
        self._inbox: deque[Callable[[], StepOutput | None]] = deque()
        self._streams: dict[str, Stream] = {}
        self._wake = threading.Condition()
        # Between a life that gives outputs and the next, which takes them over.
        self._fence = threading.RLock()
        self._num_queued = 0  # requests sent to the loop but not yet taken
        self._turns = Turns()
        self._draining = False
        self._stopping = False
        self._failure: BaseException | None = None
        self._restarts: deque[float] = deque()
        self._life = self._new_life()
        self._watchdog: Watchdog | None = None
        self.observe: Callable[[Stream], None] = lambda stream: None
        """Called with each answer that is begun, in its caller's context; it may keep it and watch it."""

    # -- life -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the loop; does nothing if it runs."""
        if self._life.started:
            return
        # The loop holds the GIL for microseconds at a time between torch calls; with the default
        # interval of 5 ms a busy HTTP thread would stall each of them for that long.
        sys.setswitchinterval(0.0005)
        self._start(self._life)
        if self.settings.watchdog.iteration_s:
            limit_s = self.settings.watchdog.iteration_s
            self._watchdog = Watchdog(limit_s, lambda: self._life, self._begin_again)
            self._watchdog.start()

    def _new_life(self) -> Life:
        engine = self.engine
        engine.coserver.arrivals = lambda: bool(self._inbox)
        return Life(engine, Isolation(engine), TrainingCounter(engine.counters, engine.coserver))

    def _start(self, life: Life) -> None:
        life.thread = threading.Thread(target=self._run, args=(life,), name="tokenloom-engine", daemon=True)
        life.thread.start()

    @property
    def ready(self) -> bool:
        """Whether new requests are taken."""
        return self.alive and not self._draining

    @property
    def alive(self) -> bool:
        """Whether the loop runs."""
        return self._life.alive and self._failure is None

    @property
    def failed(self) -> bool:
        """Whether the loop stopped for good."""
        return self._failure is not None

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, let running ones finish, and abort what is left after `timeout_s`."""
        if not self._draining:
            logger.info("draining", extra=fields(requests=len(self._streams), timeout_s=timeout_s))
        self._draining = True
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._streams and not self.failed and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        for request_id in list(self._streams):
            self._send(partial(self._end, request_id))

    def shutdown(self) -> None:
        """Stop the loop and wait for it; requests that still run are aborted."""
        self._draining = self._stopping = True
        with self._wake:
            self._wake.notify_all()
        if self._watchdog is not None:
            self._watchdog.stop()
        thread, tier = self._life.thread, self.engine.pool.tier
        if thread is None or thread is threading.current_thread():
            return
        thread.join(self.settings.watchdog.iteration_s or None)
        if tier is not None and not thread.is_alive():
            tier.close()

    # -- requests ---------------------------------------------------------------------------------------

    def generate(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str | None = None,
        adapter: LoadedAdapter | None = None,
        kv: KVMethod | None = None,
        draft: DraftMethod | None = None,
        compress_upto: int | None = None,
    ) -> Stream:
        """Start a request; `adapter` is one of `engine.adapters`, `kv` how its cache is kept and read,
        `draft` who guesses ahead, `compress_upto` how many tokens are compressed before the others are
        computed.

        Raises:
            RequestError: it can never be served; the message names the field.
            EngineBusyError: the queue is full.
            EngineStoppedError: the engine is draining or has stopped.
        """
        request = Request(
            request_id,
            prompt_token_ids,
            params,
            priority=priority,
            cache_salt=cache_salt,
            adapter=adapter,
            kv=kv,
            draft=draft,
            compress_upto=compress_upto,
        )
        return self._submit(request)

    async def embed(
        self, prompt_token_ids: list[int], *, request_id: str, adapter: LoadedAdapter | None = None
    ) -> list[float]:
        """The mean of the prompt's last hidden states, `[hidden_size]`. Raises as `generate` does,
        and GenerationError."""
        params = SamplingParams(max_tokens=0)
        stream = self._submit(Request(request_id, prompt_token_ids, params, kind="embed", adapter=adapter))
        async with contextlib.aclosing(stream):
            async for output in stream:
                if output.embedding is not None:
                    return output.embedding
                if output.deltas and output.deltas[0].error is not None:
                    raise GenerationError(output.deltas[0].error)
        raise EngineStoppedError(f"request {request_id} was aborted")

    def _submit(self, request: Request) -> Stream:
        if self._draining:
            raise EngineStoppedError("the server is shutting down")
        if self.failed or not self._life.started:  # one that is started again finds them in the inbox
            raise EngineStoppedError("the engine stopped")
        if self.settings.coserve.mode == "ft_only":
            raise EngineStoppedError("coserve.mode is ft_only: this server trains and answers no requests")
        waiting = self._num_queued + len(self.engine.scheduler.waiting)
        limit = self.settings.scheduler.max_waiting
        if waiting >= limit:
            message = f"the queue is full: {waiting} requests wait, at most {limit} may"
            raise EngineBusyError(message, retry_after_s=self._turns.next_s())
        self.engine.validate(request)
        if request.request_id in self._streams:
            raise RequestError(f"request id {request.request_id!r} is in use", param="request_id")
        stream = Stream(request, self._abort)
        self._streams[request.request_id] = stream
        self.observe(stream)
        with self._wake:
            self._num_queued += 1
        self._send(partial(self._take, request))
        if self.failed:  # meanwhile: whoever ended the others may not have seen this one
            self._end_all()
        return stream

    def run(self, command: Callable[[], None]) -> None:
        """Have something done on the engine's thread, between two iterations."""
        self._send(command)

    def stats(self) -> EngineStats:
        stats, coserver = self.engine.stats(), self.engine.coserver
        stats.training_jobs = len(coserver.trainings)
        stats.training_restarts = coserver.num_restarts
        held = {block for s in list(self.engine.scheduler.running) for block in s.blocks}
        stats.rows = coserver.composition.total
        # The loop goes on meanwhile, so the difference may be off for a moment.
        stats.kv_blocks_training = max(0, stats.kv_blocks_used - len(held)) if stats.training_jobs else 0
        return stats

    def overview(self) -> Overview:
        """Requests, blocks and training as they are now."""
        return overview(self.engine)

    def state(self, iterations: int) -> EngineState:
        """Everything that the engine holds, with that many of the last iterations, to look for a fault."""
        return engine_state(self, iterations)

    def backlog(self) -> dict[str, int]:
        """`inbox`: commands that the loop has not taken; `streams`: answers that somebody waits for."""
        return {"inbox": len(self._inbox), "streams": len(self._streams)}

    # -- between the threads ----------------------------------------------------------------------------

    def _abort(self, request_id: str) -> None:
        self._leave(request_id)
        self._send(partial(self._end, request_id))

    def _leave(self, request_id: str) -> None:
        if self._streams.pop(request_id, None) is not None:
            self._turns.ended(idle=not self._streams)

    def _end(self, request_id: str) -> StepOutput | None:
        return self.engine.abort(request_id)

    def _send(self, command: Callable[[], StepOutput | None]) -> None:
        self._inbox.append(command)
        with self._wake:
            self._wake.notify_all()

    def _take(self, request: Request) -> StepOutput | None:
        with self._wake:
            self._num_queued -= 1
        try:
            self.engine.add(request)
        except Exception as error:  # it was valid when it came
            logger.exception("request %s could not be queued", request.request_id)
            return _last_words(
                request, "error", f"the engine failed on this request ({type(error).__name__})"
            )
        return None

    # -- the loop ---------------------------------------------------------------------------------------

    def _run(self, life: Life) -> None:
        logger.info("the engine loop runs", extra=fields(model=self.model_name))
        try:
            while not (self._stopping or life.over):
                life.beats, life.busy = life.beats + 1, True
                outputs = self._obey(life)
                life.trained.count()  # jobs that have just come or gone
                if life.isolation.has_work:
                    outputs += life.isolation.step()
                    life.trained.count()
                if outputs:
                    self._deliver(life, outputs)
                with self._wake:
                    if not (self._inbox or life.isolation.has_work or self._stopping or life.over):
                        life.busy = False
                        self._wake.wait()
        except BaseException as error:  # nobody's fault but ours
            logger.exception("the engine's loop failed")
            self._begin_again(life, error, False)
        if self._stopping and not life.over:
            self._obey(life)
            self._end_all()
            logger.info("the engine loop ended")

    def _obey(self, life: Life) -> list[StepOutput]:
        outputs = []
        while self._inbox and not life.over:
            command = self._inbox.popleft()
            try:
                output = command()
            except Exception:
                logger.exception("a command failed")
                continue
            if output is not None:
                outputs.append(output)
        return outputs

    def _deliver(self, life: Life, outputs: list[StepOutput]) -> None:
        with self._fence:
            if not life.over:
                self._tell(outputs)

    def _tell(self, outputs: list[StepOutput]) -> None:
        """Hand the outputs over, waking each event loop once."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, StepOutput]]] = {}
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                by_loop.setdefault(stream.loop, []).append((stream, output))
                stream.told.add(output)
                if output.finished:
                    self._leave(output.request_id)
        for loop, pairs in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the event loop was closed: nobody listens any more
                loop.call_soon_threadsafe(put_all, pairs)

    # -- when it fails ----------------------------------------------------------------------------------

    def _begin_again(self, life: Life, error: BaseException, deserted: bool) -> None:
        """Put a new life in the place of one that failed or hangs; its requests go on where they are.

        Args:
            deserted: its thread may still be at work.
        """
        watchdog, now = self.settings.watchdog, time.monotonic()
        with self._fence:
            if life.over or self._stopping:
                return
            life.over = True
            while self._restarts and now - self._restarts[0] > watchdog.window_s:
                self._restarts.popleft()
            if len(self._restarts) >= watchdog.max_restarts:
                return self._give_up(error)
            self._restarts.append(now)
            logger.error("the engine's loop is started again (%s)", error)
            running = {sequence.request.request_id for sequence in life.engine.scheduler.running}
            try:
                self.engine = successor(life.engine, deserted=deserted)
                self.engine.counters.restarts += 1
                self._carry_over(running)
                heir = self._new_life()
                self._start(heir)
                self._life = heir
            except Exception as error:
                logger.exception("the engine's loop cannot be started again")
                self._give_up(error)

    def _carry_over(self, running: set[str]) -> None:
        for stream in list(self._streams.values()):
            if not stream.request.sequences:
                continue  # still in the inbox
            stream.failures += stream.request_id in running
            if stream.failures > 1:  # it may well be the cause
                self._tell(
                    [_last_words(stream.request, "error", "the engine failed repeatedly on this request")]
                )
            else:
                stream.request = carry_over(self.engine, stream.request, stream.told)

    def _give_up(self, error: BaseException) -> None:
        self._failure = error
        logger.critical("the engine's loop failed for good: %s", error)
        self._end_all()
        self.on_failure()

    def _end_all(self) -> None:
        """Nobody may wait for what will not come."""
        with self._fence:
            self._tell(
                [_last_words(stream.request, "abort", None) for stream in list(self._streams.values())]
            )


def _last_words(request: Request, reason: FinishReason, error: str | None) -> StepOutput:
    deltas = [Delta(i, "", [], finish_reason=reason, error=error) for i in range(request.params.n)]
    return StepOutput(request.request_id, deltas, finished=True)
