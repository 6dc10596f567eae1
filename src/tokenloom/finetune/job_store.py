"""Jobs, and the only legal ways from one state to the next."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, insert, select, update
from sqlalchemy.exc import IntegrityError

from tokenloom.errors import RequestError
from tokenloom.finetune.blobs import Blob
from tokenloom.finetune.database import Database, claim_key, new_id, page
from tokenloom.finetune.errors import IllegalTransitionError, NotFoundError
from tokenloom.finetune.file_store import RESULTS_PURPOSE, FileStore
from tokenloom.finetune.hyperparameters import Hyperparameters, JobOptions
from tokenloom.finetune.job_log import add_event, job_row, storable, stored_path
from tokenloom.finetune.job_request import MAX_SEED, CreateJob
from tokenloom.finetune.principal import OPERATOR, Principal
from tokenloom.finetune.records import SOURCES, TERMINAL, JobError, JobRecord, Level, Page, Status
from tokenloom.finetune.schema import job_metadata, jobs


class JobStore:
    """Rows of jobs. Every method is one transaction."""

    def __init__(self, database: Database, files: FileStore, home: Path) -> None:
        self._database = database
        self._files = files
        self._home = home

    def create(
        self, request: CreateJob, idempotency_key: str | None = None, who: Principal = OPERATOR
    ) -> JobRecord:
        """Create a job in validating_files; durable when this returns.

        Raises RequestError: a file is unknown to `who` or not for fine-tuning, two places of the request
        disagree, or the key came with another request before.
        """
        options = request.options().model_dump(mode="json", exclude_unset=True)
        body = json.dumps(request.model_dump(mode="json", exclude_unset=True), sort_keys=True)
        body_sha256 = hashlib.sha256(body.encode()).hexdigest()
        try:
            job_id = self._insert(request, options, idempotency_key, body_sha256, who)
        except IntegrityError:  # another process claimed the key between our look and our insert
            job_id = self._insert(request, options, idempotency_key, body_sha256, who)
        return self.get(job_id)

    def _insert(
        self,
        request: CreateJob,
        options: dict[str, Any],
        key: str | None,
        body_sha256: str,
        who: Principal,
    ) -> str:
        with self._database.write() as connection:
            new = new_id("ftjob-")
            job_id = claim_key(connection, "jobs", key, body_sha256, new, who)
            if job_id != new:
                return job_id
            for param in ("training_file", "validation_file"):
                file_id = getattr(request, param)
                if file_id is not None:
                    self._check_file(connection, file_id, param, who)
            connection.execute(
                insert(jobs).values(
                    id=new,
                    account=who.account,
                    name=f"ft:{request.model}:{request.suffix or ''}:{secrets.token_hex(6)}",
                    model=request.model,
                    suffix=request.suffix,
                    status="validating_files",
                    training_file=request.training_file,
                    validation_file=request.validation_file,
                    requested=options,
                    seed=secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed,
                    created_at=int(time.time()),
                )
            )
            pairs = [{"job_id": new, "key": k, "value": v} for k, v in (request.metadata or {}).items()]
            if pairs:
                connection.execute(insert(job_metadata), pairs)
            add_event(connection, new, f"Created fine-tuning job {new}")
        return new

    def _check_file(self, connection: Connection, file_id: str, param: str, who: Principal) -> None:
        try:
            record = self._files.get_in(connection, file_id, param, who, lock=True)
        except NotFoundError as error:
            raise RequestError(f"{param}: {error}", param=param, code="file_not_found") from None
        if record.purpose != "fine-tune":
            raise RequestError(
                f"{param}: {file_id} was uploaded with purpose {record.purpose}; it must be fine-tune",
                param=param,
                code="wrong_purpose",
            )

    def get(self, job_id: str, who: Principal = OPERATOR) -> JobRecord:
        """Raises NotFoundError, also for a job that `who` may not see."""
        with self._database.read() as connection:
            return self._records(connection, [job_row(connection, job_id, who=who)])[0]

    def list_jobs(
        self,
        *,
        after: str | None = None,
        limit: int = 20,
        metadata: dict[str, str] | None = None,
        no_metadata: bool = False,
        who: Principal = OPERATOR,
    ) -> Page[JobRecord]:
        """One page of the jobs that `who` may see, newest first.

        Args:
            metadata: pairs that the jobs must carry.
            no_metadata: only jobs that carry none.

        Raises RequestError if `after` is unknown.
        """
        where: list[ColumnElement[bool]] = []
        pairs = job_metadata.c
        own = pairs.job_id == jobs.c.id
        for key, value in (metadata or {}).items():
            same = select(pairs.key).where(own, pairs.key == storable(key), pairs.value == storable(value))
            where.append(same.exists())
        if no_metadata:
            where.append(~select(pairs.key).where(own).exists())
        with self._database.read() as connection:
            mine = who.only(jobs.c.account)
            rows = page(connection, jobs, where, lambda row: row, after=after, limit=limit, within=mine)
            return Page(self._records(connection, rows.data), rows.has_more)

    def oldest(
        self, status: Status, models: Iterable[str], excluding: Iterable[str] = ()
    ) -> JobRecord | None:
        """The job that was created first among those of certain base models in `status`."""
        query = select(jobs).where(
            jobs.c.status == status, jobs.c.model.in_(list(models)), jobs.c.id.not_in(list(excluding))
        )
        with self._database.read() as connection:
            row = connection.execute(query.order_by(jobs.c.seq).limit(1)).one_or_none()
            return None if row is None else self._records(connection, [row])[0]

    def move(
        self,
        job_id: str,
        target: Status,
        message: str,
        *,
        source: Status | None = None,
        level: Level = "info",
        **values: Any,
    ) -> JobRecord:
        """Take a job to another state, with the event that says so, or leave everything as it is.

        Args:
            source: the only state it may come from; None allows all legal ones.
            values: further columns to set with it.

        Raises NotFoundError, or IllegalTransitionError naming both states.
        """
        with self._database.write() as connection:
            if source is not None:
                status = job_row(connection, job_id, lock=True).status
                if status != source:
                    raise IllegalTransitionError(job_id, status, target)
            return self._move(connection, job_id, target, message, level, values)

    def _move(
        self,
        connection: Connection,
        job_id: str,
        target: Status,
        message: str,
        level: Level,
        values: dict[str, Any],
    ) -> JobRecord:
        values = {"status": target, **values, "estimated_finish": None}
        if target in TERMINAL:
            values["finished_at"] = int(time.time())
        allowed = jobs.c.status.in_(sorted(SOURCES[target]))
        moved = connection.execute(update(jobs).where(jobs.c.id == job_id, allowed).values(values))
        if moved.rowcount != 1:
            raise IllegalTransitionError(job_id, job_row(connection, job_id).status, target)
        add_event(connection, job_id, message, level)
        return self._records(connection, [job_row(connection, job_id)])[0]

    def fail(self, job_id: str, error: JobError) -> JobRecord:
        """Raises IllegalTransitionError if the job is over already."""
        return self.move(
            job_id,
            "failed",
            f"The job failed: {error.message}",
            level="error",
            error_code=error.code,
            error_message=storable(error.message),
            error_param=error.param,
        )

    def succeed(self, job_id: str, adapter: Path | None, trained_tokens: int, results: Blob) -> JobRecord:
        """Publish the model (if there is one) and the file of results, which is of the same account, with the
        last change of state, all or nothing.

        Raises IllegalTransitionError if the job is over already.
        """
        results.seal()
        with self._database.write() as connection:
            job = job_row(connection, job_id)
            name = job.name
            self._files.insert(connection, results, "step_metrics.csv", RESULTS_PURPOSE, account=job.account)
            values: dict[str, Any] = {"trained_tokens": trained_tokens, "result_file": results.id}
            if adapter is not None:
                add_event(connection, job_id, f"New fine-tuned model created: {name}")
                values |= {"fine_tuned_model": name, "adapter_path": stored_path(self._home, adapter)}
            message = "The job has successfully completed"
            record = self._move(connection, job_id, "succeeded", message, "info", values)
        results.keep()
        return record

    def resolve(self, job_id: str, hyperparameters: Hyperparameters, warnings: list[str]) -> JobRecord:
        """Files are good: record what "auto" came to and put the job into the queue.

        Raises IllegalTransitionError if the job was cancelled meanwhile.
        """
        with self._database.write() as connection:
            for warning in warnings:
                add_event(connection, job_id, warning, "warn")
            values = {"hyperparameters": hyperparameters.model_dump(mode="json")}
            message = "Files validated, the job is queued"
            return self._move(connection, job_id, "queued", message, "info", values)

    def recover(self) -> None:
        """At start: what was running when the process died waits in the queue again."""
        with self._database.write() as connection:
            running = select(jobs.c.id).where(jobs.c.status == "running").order_by(jobs.c.seq)
            for job_id in connection.execute(running).scalars().all():
                message = "The server restarted; the job goes on from its last checkpoint"
                self._move(connection, job_id, "queued", message, "warn", {})

    def _records(self, connection: Connection, rows: list[Row[Any]]) -> list[JobRecord]:
        pairs: dict[str, dict[str, str]] = {}
        of_these = select(job_metadata).where(job_metadata.c.job_id.in_([row.id for row in rows]))
        for pair in connection.execute(of_these.order_by(job_metadata.c.key)):
            pairs.setdefault(pair.job_id, {})[pair.key] = pair.value
        return [self._record(row, pairs.get(row.id)) for row in rows]

    def _record(self, row: Row[Any], metadata: dict[str, str] | None) -> JobRecord:
        error = None
        if row.error_code is not None:
            error = JobError(row.error_code, row.error_message, row.error_param)
        resolved = row.hyperparameters
        directory = self._home / "jobs" / row.id
        return JobRecord(
            id=row.id,
            name=row.name,
            model=row.model,
            suffix=row.suffix,
            status=row.status,
            training_file=row.training_file,
            validation_file=row.validation_file,
            training_path=self._files.path(row.training_file),
            validation_path=None if row.validation_file is None else self._files.path(row.validation_file),
            requested=JobOptions.model_validate(row.requested),
            hyperparameters=None if resolved is None else Hyperparameters.model_validate(resolved),
            seed=row.seed,
            metadata=metadata,
            created_at=row.created_at,
            finished_at=row.finished_at,
            estimated_finish=row.estimated_finish,
            trained_tokens=row.trained_tokens,
            fine_tuned_model=row.fine_tuned_model,
            result_files=[] if row.result_file is None else [row.result_file],
            error=error,
            directory=directory,
            checkpoint_dir=directory / "checkpoints",
            adapter_path=None if row.adapter_path is None else self._home / row.adapter_path,
        )
