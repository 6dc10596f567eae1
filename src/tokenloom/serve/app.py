"""The application: routers over one engine, what stands before them, and the process that runs it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Generator, Sequence

import uvicorn
from fastapi import APIRouter, FastAPI
from fastapi.middleware.cors import CORSMiddleware

from tokenloom.config import ConfigError, Settings
from tokenloom.engine.async_engine import AsyncEngine
from tokenloom.errors import EngineStoppedError
from tokenloom.serve.adapter_folder import AdapterFolder
from tokenloom.serve.adapters import AdapterLoader, adapters_router
from tokenloom.serve.basic import embeddings_router, health_router, models_router, tokens_router
from tokenloom.serve.batches import batches_router, open_batches
from tokenloom.serve.chat import chat_router
from tokenloom.serve.completions import completions_router
from tokenloom.serve.context import RequestContext
from tokenloom.serve.debug import debug_router
from tokenloom.serve.errors import install_error_handlers
from tokenloom.serve.jobs import Jobs, open_jobs
from tokenloom.serve.key_limits import RATE_HEADERS, KeyLimits, Meters
from tokenloom.serve.key_ring import KeyRing, open_key_store
from tokenloom.serve.listening import listen
from tokenloom.serve.live import live_router
from tokenloom.serve.methods import methods_router
from tokenloom.serve.metrics import Metrics, metrics_router
from tokenloom.serve.models import Models
from tokenloom.serve.pulse import PATIENCE, prove_life
from tokenloom.serve.request_log import RequestLog
from tokenloom.serve.request_record import note_answer, note_model
from tokenloom.serve.responses.routes import responses_router
from tokenloom.serve.security import LOOPBACK, BodyLimit, ConcurrencyLimit, HostCheck, KeyCheck
from tokenloom.serve.static import static_router
from tokenloom.serve.tracing import Tracing, open_tracing
from tokenloom.version import __version__

logger = logging.getLogger("tokenloom.serve")


def create_app(
    engine: AsyncEngine,
    settings: Settings,
    routers: Sequence[APIRouter] = (),
    jobs: Jobs | None = None,
    tracing: Tracing | None = None,
    keys: KeyRing | None = None,
) -> FastAPI:
    """The ASGI application. Its lifespan starts and stops the engine, the jobs and the adapters' folder.

    Args:
        routers: more routes, behind the same checks and error handlers; the ones that read JSON should be
            built with `route_class=JSONRoute`.
        jobs: files and fine-tuning jobs (`open_jobs`); None leaves their routes out.
        tracing: of requests (`open_tracing`); None: no traces.
        keys: who may use it; None takes the keys of the settings alone.
    """
    metrics = Metrics(engine)
    loader = AdapterLoader(engine, settings)
    folder = AdapterFolder(loader) if settings.adapters.watch else None
    engine.observe = note_answer

    def named(model: str) -> None:
        metrics.count_request(model)
        note_model(model)

    models = Models(engine, loader, jobs.service if jobs else None, named)
    answering = (
        chat_router(engine, models),
        completions_router(engine, models),
        embeddings_router(engine, models),
        responses_router(engine, models),
    )
    keys, meters = keys or KeyRing(settings), Meters()
    metrics.registry.register(meters)
    batches = None
    if jobs is not None and jobs.service is not None:
        batches = open_batches(engine, jobs.service.store, answering, keys, meters)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if folder is not None:
            await asyncio.to_thread(folder.start)
        engine.start()
        if jobs is not None:
            jobs.start()
        if batches is not None:
            batches.start()
        yield
        if batches is not None:
            await batches.stop()
        if folder is not None:
            await asyncio.to_thread(folder.stop)
        if jobs is not None:
            await asyncio.to_thread(jobs.stop)  # while the engine still runs: training leaves a checkpoint
        await engine.drain(settings.server.drain_timeout_s)
        await asyncio.to_thread(engine.shutdown)
        if jobs is not None:
            await asyncio.to_thread(jobs.close)

    app = FastAPI(
        title="tokenloom",
        version=__version__,
        summary="Serve language models behind the OpenAI API.",
        lifespan=lifespan,
        docs_url=None,  # both pages would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    install_error_handlers(app)
    for router in (
        *answering,
        models_router(models),
        adapters_router(loader, settings),
        tokens_router(engine, models),
        health_router(engine),
        metrics_router(metrics),
        live_router(engine, settings),
        debug_router(engine, settings, jobs.service if jobs else None),
        methods_router(),
        static_router(),
        *(jobs.routers() if jobs else ()),
        *([batches_router(batches)] if batches else ()),
        *routers,
    ):
        app.include_router(router)
    _add_checks(app, settings, keys, meters)
    log = RequestLog(settings.logging, engine.tokenizer)
    app.add_middleware(RequestContext, count=metrics.count_answer, done=log, tracing=tracing)
    return app


def _add_checks(app: FastAPI, settings: Settings, keys: KeyRing, meters: Meters) -> None:
    """From the inside out: the one added last sees a request first."""
    app.add_middleware(BodyLimit, settings=settings)
    app.add_middleware(ConcurrencyLimit, settings=settings)
    app.add_middleware(KeyLimits, meters=meters)
    app.add_middleware(KeyCheck, keys=keys)
    if settings.server.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.server.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type", "idempotency-key", "x-request-id"],
            expose_headers=["x-request-id", "retry-after", *RATE_HEADERS],
        )
    if settings.server.host in LOOPBACK:
        app.add_middleware(HostCheck, settings=settings)


class _Server(uvicorn.Server):
    """uvicorn that drains the engine first: running answers finish, new ones get a 503, then it closes.
    Meanwhile jobs that train leave their checkpoints."""

    def __init__(
        self, config: uvicorn.Config, engine: AsyncEngine, drain_timeout_s: float, jobs: Jobs | None = None
    ) -> None:
        super().__init__(config)
        self.engine = engine
        self.drain_timeout_s = drain_timeout_s
        self.jobs = jobs

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        drained = self.engine.drain(self.drain_timeout_s)
        if self.jobs is None:
            await drained
        else:
            await asyncio.gather(drained, asyncio.to_thread(self.jobs.stop))
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        # uvicorn's own version raises the signal again at the end, which would skip whatever comes after us.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)


def run_server(
    engine: AsyncEngine, settings: Settings, announce: Callable[[str], None] = lambda url: None
) -> None:
    """Serve until SIGTERM or SIGINT, then drain and return.

    Args:
        announce: called with the server's URL once it listens.

    Raises:
        ConfigError: the address cannot be listened on.
        EngineStoppedError: the engine failed for good; whoever watches this process should start it again.
    """
    server = settings.server
    listener = listen(server)
    host = f"[{server.host}]" if listener.family == socket.AF_INET6 else server.host
    url = f"http://{host}:{listener.getsockname()[1]}"
    tracing = open_tracing(settings.tracing)
    jobs = open_jobs(engine, settings, tracing)
    try:
        keys = KeyRing(settings, open_key_store(settings))
    except ConfigError:
        jobs.close()
        listener.close()
        raise
    if server.host not in LOOPBACK and not keys.asks:
        logger.warning("everybody who reaches %s may use this server: it has no API keys", url)
    config = uvicorn.Config(
        create_app(engine, settings, jobs=jobs, tracing=tracing, keys=keys),
        log_level="warning",
        log_config=None,  # its lines go where ours go
        access_log=False,
        ws="none",
        # The engine has drained by then; what remains are idle connections and slow readers.
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=64 * 1024,
    )

    async def serve() -> None:
        process = _Server(config, engine, server.drain_timeout_s, jobs)
        engine.on_failure = lambda: setattr(process, "should_exit", True)
        running = asyncio.create_task(process.serve(sockets=[listener]))
        pulse = asyncio.create_task(prove_life(PATIENCE * settings.watchdog.iteration_s))
        while not process.started and not running.done():
            await asyncio.sleep(0.01)
        if process.started:
            announce(url)
        await running
        pulse.cancel()

    try:
        asyncio.run(serve())
    finally:
        jobs.stop()
        engine.shutdown()
        jobs.close()
        keys.close()
        if tracing is not None:
            tracing.close()
    if engine.failed:
        raise EngineStoppedError("the engine failed for good; the log tells why")
