"""GET /debug/state: what the server holds, for whoever operates it and looks for a fault."""

from __future__ import annotations

import asyncio
import os
import platform
import threading
import time
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel

from tokenloom.config import Settings
from tokenloom.engine.async_engine import AsyncEngine
from tokenloom.engine.state import EngineState, thread_stacks
from tokenloom.finetune.records import LIVE
from tokenloom.finetune.service import JobService
from tokenloom.serve.errors import ERROR_RESPONSES, ApiError
from tokenloom.serve.security import LOOPBACK, AdminCheck
from tokenloom.version import __version__

_MOST_JOBS = 100


class JobState(BaseModel):
    """A fine-tuning job that is not over."""

    id: str
    status: str
    model: str
    created_at: int
    trained_tokens: int | None


class ProcessState(BaseModel):
    """The process."""

    version: str
    python: str
    pid: int
    uptime_s: float
    threads: int


class DebugState(BaseModel):
    """No text of a prompt or an answer, no key, no file's content. Parts may be an iteration apart.

    `jobs` is null where files and jobs are not available; `stacks` where they were not asked for.
    """

    process: ProcessState
    model: str
    engine: EngineState
    jobs: list[JobState] | None
    stacks: dict[str, list[str]] | None


class OperatorOnly:
    """A dependency: admin keys, and, on a server that asks for no key at all, this machine alone.

    A server without keys that listens on a network shows nobody its insides.
    """

    def __init__(self, settings: Settings) -> None:
        self.admin = AdminCheck(settings)
        self.at_home = settings.server.host in LOOPBACK

    def __call__(self, request: Request) -> None:
        self.admin(request)
        if request.state.account is None and not self.at_home:
            raise ApiError(
                403,
                "this route needs an admin key, and this server has none (server.admin_keys)",
                code="admin_key_required",
            )


def debug_router(engine: AsyncEngine, settings: Settings, service: JobService | None) -> APIRouter:
    """GET /debug/state."""
    router = APIRouter(
        prefix="/debug",
        tags=["debug"],
        responses=ERROR_RESPONSES,
        dependencies=[Depends(OperatorOnly(settings))],
    )
    began_s = time.monotonic()

    def look(iterations: int, stacks: bool) -> str:
        found = thread_stacks() if stacks else None
        state = DebugState(
            process=_process(time.monotonic() - began_s),
            model=engine.model_name,
            engine=engine.state(iterations),
            jobs=None if service is None else _jobs(service),
            stacks=found,
        )
        return state.model_dump_json()

    @router.get("/state", response_model=DebugState)
    async def state(iterations: Annotated[int, Query(ge=0, le=1000)] = 32, stacks: bool = False) -> Response:
        """Requests, scheduler, KV pool, adapters, training, jobs, the last iterations; no text of requests.

        `stacks` adds where each thread stands.
        """
        # Beside the event loop: the database answers in its own time.
        text = await asyncio.to_thread(look, iterations, stacks)
        return Response(text, media_type="application/json", headers={"Cache-Control": "no-store"})

    return router


def _process(uptime_s: float) -> ProcessState:
    return ProcessState(
        version=__version__,
        python=platform.python_version(),
        pid=os.getpid(),
        uptime_s=uptime_s,
        threads=threading.active_count(),
    )


def _jobs(service: JobService) -> list[JobState]:
    jobs = service.store.jobs.list_jobs(limit=_MOST_JOBS).data
    return [
        JobState(
            id=job.id,
            status=job.status,
            model=job.model,
            created_at=job.created_at,
            trained_tokens=job.trained_tokens,
        )
        for job in jobs
        if job.status in LIVE
    ]
