"""Files and fine-tuning jobs of a server: opened over its engine, or the reason why there are none."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter

from tokenloom.config import JobSettings, Settings, home
from tokenloom.engine.async_engine import AsyncEngine
from tokenloom.finetune.errors import StoreError
from tokenloom.finetune.product import LoraProduct
from tokenloom.finetune.reporter import JobReporter
from tokenloom.finetune.retained import slots_per_token
from tokenloom.finetune.runner import EngineRunner
from tokenloom.finetune.service import JobService, TrainableModel
from tokenloom.finetune.store import Store
from tokenloom.methods.drafting.ppd_job import PromptProduct
from tokenloom.serve.errors import ERROR_RESPONSES, ApiError
from tokenloom.serve.files import files_router
from tokenloom.serve.fine_tuning import fine_tuning_router
from tokenloom.serve.tracing import Tracing

logger = logging.getLogger("tokenloom.serve")

_SPARE_BLOCKS = 3  # what a pass claims beyond its tokens; see Trainer.slots_needed and Coserver
_SHORTEST_TOKENS = 8


@dataclass
class Jobs:
    """What a server has of files and jobs.

    Attributes:
        service: None if the store cannot be used.
        closed: why there are no jobs (without a service), or why none is taken; empty if all is well.
    """

    service: JobService | None
    closed: str = ""
    _runs: bool = False
    _open: bool = True

    def routers(self) -> list[APIRouter]:
        if self.service is None:
            return [_unavailable_router(self.closed)]
        return [files_router(self.service), fine_tuning_router(self.service, self.closed)]

    def start(self) -> None:
        """Take up the jobs that wait; the engine runs."""
        if self.service is not None:
            self._runs = True
            self.service.start()

    def stop(self) -> None:
        """Let running jobs leave a checkpoint and go back into the queue; the engine still runs."""
        if self.service is not None and self._runs:
            self._runs = False
            self.service.stop()

    def close(self) -> None:
        """Let go of the home folder."""
        if self.service is not None and self._open:
            self._open = False
            self.service.store.close()


def open_jobs(engine: AsyncEngine, settings: Settings, tracing: Tracing | None = None) -> Jobs:
    """Open the store in the home folder. A server whose store cannot be used still serves: it says so in the
    log, and answers 503 on the routes of files, jobs and batches. With `tracing` a job's runs are spans."""
    try:
        store = _open_store(home(), settings.jobs)
    except (StoreError, OSError) as error:
        logger.warning("no files and no fine-tuning: %s", error)
        return Jobs(None, f"files and fine-tuning are not available here: {_for_clients(error, settings)}")
    closed = ""
    models: dict[str, TrainableModel] = {}
    if settings.coserve.mode == "off":
        closed = "coserve.mode is off: this server trains nothing"
    else:
        longest = longest_example_tokens(engine, settings)
        if longest < _SHORTEST_TOKENS:
            closed = "the KV pool of this server is too small to train in (cache.kv_bytes, ft.mem_frac)"
        else:
            models[engine.model_name] = TrainableModel(engine.tokenizer, longest)
    runner = EngineRunner(engine, home(), {"lora": LoraProduct, "ppd": PromptProduct})
    service = JobService(
        store,
        runner,
        models,
        max_concurrent=settings.jobs.max_concurrent,
        report=tracing.reporter if tracing is not None else JobReporter,
    )
    return Jobs(service, closed)


def longest_example_tokens(engine: AsyncEngine, settings: Settings) -> int:
    """Tokens of the longest example that can be trained on: the context, or what fits into training's part
    of the KV pool with "lean" retention."""
    pool = engine.engine.pool
    blocks = int(pool.num_blocks * settings.ft.mem_frac) - _SPARE_BLOCKS
    fits = int(blocks * pool.block_size / slots_per_token(engine.config, "lean"))
    return min(engine.max_model_len, fits)


def _open_store(folder: Path, jobs: JobSettings) -> Store:
    return Store(
        folder,
        jobs.database_url or None,
        max_file_bytes=jobs.max_file_bytes,
        quota_bytes=jobs.quota_bytes,
    )


def _for_clients(error: Exception, settings: Settings) -> str:
    """The reason without a path of this machine, nor the address of a database."""
    if isinstance(error, StoreError) and not settings.jobs.database_url:
        return str(error).replace(str(home().absolute()), "the home folder")
    return "the store cannot be opened; the server's log tells why"


def _unavailable_router(reason: str) -> APIRouter:
    """503 on every route of files, jobs and batches."""
    router = APIRouter(prefix="/v1", tags=["files", "fine-tuning"], responses=ERROR_RESPONSES)

    async def unavailable() -> Any:
        raise ApiError(503, reason, code="store_unavailable")

    for path in (
        "/files",
        "/files/{rest:path}",
        "/fine_tuning/{rest:path}",
        "/batches",
        "/batches/{rest:path}",
    ):
        router.add_api_route(
            path, unavailable, methods=["GET", "POST", "DELETE"], name="unavailable", include_in_schema=False
        )
    return router
