"""What happens in jobs: events, metrics of steps, checkpoints, and the models that come of them."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select, update

from tokenloom.finetune.database import Database, is_id, new_id, page
from tokenloom.finetune.errors import NotFoundError
from tokenloom.finetune.principal import OPERATOR, Principal
from tokenloom.finetune.records import CheckpointRecord, EventRecord, Level, Page, TunedModel
from tokenloom.finetune.schema import checkpoints, events, jobs
from tokenloom.logs import fields

logger = logging.getLogger("tokenloom.finetune")

_LOG_LEVELS: dict[Level, int] = {"info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}


class JobLog:
    """Rows of events and checkpoints. Every method is one transaction."""

    def __init__(self, database: Database, home: Path) -> None:
        self._database = database
        self._home = home

    def add_event(self, job_id: str, message: str, level: Level = "info") -> None:
        with self._database.write() as connection:
            add_event(connection, job_id, message, level)

    def add_metrics(
        self,
        job_id: str,
        step: int,
        message: str,
        data: dict[str, Any],
        trained_tokens: int,
        finish: int | None,
    ) -> None:
        """Record a step. A step that a restarted run does again replaces what was known of it."""
        values = {"message": storable(message), "data": _finite(data)}
        with self._database.write() as connection:
            own = (events.c.job_id == job_id, events.c.step == step)
            if connection.execute(update(events).where(*own).values(values)).rowcount == 0:
                add_event(connection, job_id, message, type="metrics", step=step, data=values["data"])
            progress = {"trained_tokens": trained_tokens, "estimated_finish": finish}
            running = (jobs.c.id == job_id, jobs.c.status == "running")
            connection.execute(update(jobs).where(*running).values(progress))

    def metrics(self, job_id: str) -> list[dict[str, Any]]:
        """Data of all steps, in order."""
        query = select(events.c.data).where(events.c.job_id == job_id, events.c.step.is_not(None))
        with self._database.read() as connection:
            return list(connection.execute(query.order_by(events.c.step)).scalars())

    def add_checkpoint(self, job_id: str, step: int, path: Path, metrics: dict[str, float]) -> str:
        """Record a checkpoint and return the name it is served by; again for the same step changes nothing
        but its path and metrics."""
        values: dict[str, Any] = {"path": stored_path(self._home, path), "metrics": _finite(metrics)}
        with self._database.write() as connection:
            own = (checkpoints.c.job_id == job_id, checkpoints.c.step == step)
            name = f"{job_row(connection, job_id).name}:ckpt-step-{step}"
            if connection.execute(update(checkpoints).where(*own).values(values)).rowcount == 0:
                values |= {"id": new_id("ftckpt_"), "job_id": job_id, "step": step, "name": name}
                values["created_at"] = int(time.time())
                connection.execute(insert(checkpoints).values(values))
                add_event(connection, job_id, f"Checkpoint created at step {step}: {name}")
            return name

    def delete_checkpoint(self, name: str) -> None:
        """Forget the checkpoint that is served under `name`."""
        with self._database.write() as connection:
            connection.execute(delete(checkpoints).where(checkpoints.c.name == name))

    def forget_adapter(self, job_id: str) -> None:
        """The finished model is deleted; the job still tells its name."""
        with self._database.write() as connection:
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(adapter_path=None))

    def list_events(self, job_id: str, *, after: str | None, limit: int) -> Page[EventRecord]:
        """One page of events, newest first. Raises NotFoundError, or RequestError if `after` is unknown."""
        with self._database.read() as connection:
            job_row(connection, job_id)
            own = events.c.job_id == job_id
            return page(connection, events, [], _event, after=after, limit=limit, within=[own])

    def list_checkpoints(self, job_id: str, *, after: str | None, limit: int) -> Page[CheckpointRecord]:
        """One page of checkpoints, newest first. Raises as `list_events`."""
        with self._database.read() as connection:
            job_row(connection, job_id)
            own = checkpoints.c.job_id == job_id
            return page(connection, checkpoints, [], self._checkpoint, after=after, limit=limit, within=[own])

    def models(self) -> list[TunedModel]:
        """All adapters of finished jobs, and all checkpoints, oldest first."""
        done = select(jobs).where(jobs.c.adapter_path.is_not(None)).order_by(jobs.c.seq)
        steps = select(checkpoints, jobs.c.model).join(jobs, jobs.c.id == checkpoints.c.job_id)
        with self._database.read() as connection:
            finished = [
                TunedModel(row.name, row.model, row.id, row.finished_at, self._home / row.adapter_path, None)
                for row in connection.execute(done)
            ]
            return finished + [
                TunedModel(row.name, row.model, row.job_id, row.created_at, self._home / row.path, row.step)
                for row in connection.execute(steps.order_by(checkpoints.c.seq))
            ]

    def _checkpoint(self, row: Row[Any]) -> CheckpointRecord:
        return CheckpointRecord(
            row.id, row.job_id, row.created_at, row.step, row.name, row.metrics, self._home / row.path
        )


def job_row(
    connection: Connection, job_id: str, *, lock: bool = False, who: Principal = OPERATOR
) -> Row[Any]:
    """A job's row; `lock` keeps it as it is until the transaction ends. Raises NotFoundError."""
    query = select(jobs).where(jobs.c.id == job_id, *who.only(jobs.c.account))
    query = query.with_for_update() if lock else query
    row = connection.execute(query).one_or_none() if is_id(job_id) else None
    if row is None:
        raise NotFoundError("fine-tuning job", job_id)
    return row


def add_event(
    connection: Connection, job_id: str, message: str, level: Level = "info", **values: Any
) -> None:
    """Add an event within the caller's transaction; its type is "message" unless `values` say otherwise.

    The process's log has it, too: steps (metrics) as debug lines.
    """
    row = {"type": "message", "message": storable(message), "level": level, **values}
    now = int(time.time())
    connection.execute(insert(events).values(id=new_id("ftevent-"), job_id=job_id, created_at=now, **row))
    shown = logging.DEBUG if row["type"] == "metrics" else _LOG_LEVELS[level]
    logger.log(shown, "job: %s", message, extra=fields(job=job_id))


def storable(text: str) -> str:
    """Text without what PostgreSQL (NUL) or either database (half a surrogate pair) cannot hold."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def stored_path(home: Path, path: Path) -> str:
    """A path as it is kept in a row: relative where it can be, so that the home folder may move."""
    return str(path.relative_to(home) if path.is_relative_to(home) else path)


def _finite(metrics: dict[str, Any]) -> dict[str, Any]:
    # JSON has no NaN.
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in metrics.items()}


def _event(row: Row[Any]) -> EventRecord:
    return EventRecord(row.id, row.job_id, row.created_at, row.level, row.type, row.message, row.data)
