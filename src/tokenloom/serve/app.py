"""The application: routers over one engine, what stands before them, and the process that runs it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Generator, Sequence

import uvicorn
from fastapi import APIRouter, FastAPI
from fastapi.middleware.cors import CORSMiddleware

from tokenloom.config import ConfigError, Settings
from tokenloom.engine.async_engine import AsyncEngine
from tokenloom.serve.adapter_folder import AdapterFolder
from tokenloom.serve.adapters import AdapterLoader, adapters_router
from tokenloom.serve.basic import embeddings_router, health_router, models_router, tokens_router
from tokenloom.serve.batches import batches_router, open_batches
from tokenloom.serve.chat import chat_router
from tokenloom.serve.completions import completions_router
from tokenloom.serve.context import RequestContext
from tokenloom.serve.errors import install_error_handlers
from tokenloom.serve.jobs import Jobs, open_jobs
from tokenloom.serve.metrics import Metrics, metrics_router
from tokenloom.serve.models import Models
from tokenloom.serve.responses.routes import responses_router
from tokenloom.serve.security import LOOPBACK, BodyLimit, ConcurrencyLimit, HostCheck, KeyCheck
from tokenloom.version import __version__


def create_app(
    engine: AsyncEngine,
    settings: Settings,
    routers: Sequence[APIRouter] = (),
    jobs: Jobs | None = None,
) -> FastAPI:
    """The ASGI application. Its lifespan starts and stops the engine, the jobs and the adapters' folder.

    Args:
        routers: more routes, behind the same checks and error handlers; the ones that read JSON should be
            built with `route_class=JSONRoute`.
        jobs: files and fine-tuning jobs (`open_jobs`); None leaves their routes out.
    """
    metrics = Metrics(engine)
    loader = AdapterLoader(engine, settings)
    folder = AdapterFolder(loader) if settings.adapters.watch else None
    models = Models(engine, loader, jobs.service if jobs else None, metrics.count_request)
    answering = (
        chat_router(engine, models),
        completions_router(engine, models),
        embeddings_router(engine, models),
        responses_router(engine, models),
    )
    batches = open_batches(engine, jobs.service.store, answering) if jobs and jobs.service else None

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
        *(jobs.routers() if jobs else ()),
        *([batches_router(batches)] if batches else ()),
        *routers,
    ):
        app.include_router(router)
    _add_checks(app, settings, metrics)
    return app


def _add_checks(app: FastAPI, settings: Settings, metrics: Metrics) -> None:
    """From the inside out: the one added last sees a request first."""
    app.add_middleware(BodyLimit, settings=settings)
    app.add_middleware(ConcurrencyLimit, settings=settings)
    if settings.server.api_keys:
        app.add_middleware(KeyCheck, settings=settings)
    if settings.server.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.server.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type", "idempotency-key", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    if settings.server.host in LOOPBACK:
        app.add_middleware(HostCheck, settings=settings)
    app.add_middleware(RequestContext, count=metrics.count_answer)


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
    """
    server = settings.server
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((server.host, server.port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"server.host, server.port: cannot listen on {server.host}:{server.port}: {error}"
        ) from error
    host = f"[{server.host}]" if family == socket.AF_INET6 else server.host
    url = f"http://{host}:{listener.getsockname()[1]}"
    jobs = open_jobs(engine, settings)
    config = uvicorn.Config(
        create_app(engine, settings, jobs=jobs),
        log_level="warning",
        access_log=False,
        ws="none",
        # The engine has drained by then; what remains are idle connections and slow readers.
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=64 * 1024,
    )

    async def serve() -> None:
        process = _Server(config, engine, server.drain_timeout_s, jobs)
        running = asyncio.create_task(process.serve(sockets=[listener]))
        while not process.started and not running.done():
            await asyncio.sleep(0.01)
        if process.started:
            announce(url)
        await running

    try:
        asyncio.run(serve())
    finally:
        jobs.stop()
        engine.shutdown()
        jobs.close()
