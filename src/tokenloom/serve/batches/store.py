"""Batches on disk: their states, and the answers of those that are not over.

An answer counts once its row is committed. When a batch ends, its rows become lines of the output files in
one transaction with its last change of state; until then a crash finds them all in place.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from tokenloom.errors import RequestError
from tokenloom.finetune.blobs import Blob
from tokenloom.finetune.database import Database, claim_key, is_id, new_id, page
from tokenloom.finetune.errors import NotFoundError
from tokenloom.finetune.file_store import FileStore
from tokenloom.finetune.principal import OPERATOR, Principal
from tokenloom.finetune.records import FileRecord, Page
from tokenloom.finetune.schema import batch_lines, batches
from tokenloom.serve.batches.protocol import WINDOW_S, CreateBatch
from tokenloom.serve.batches.records import (
    SOURCES,
    BatchRecord,
    Counts,
    LineAnswer,
    LineFault,
    Status,
    Tokens,
)

OUTPUT_PURPOSE = "batch_output"
_READ_ROWS = 256


class BatchStateError(RequestError):
    """A batch is not in a state from which it could go to the one asked for."""

    def __init__(self, batch_id: str, current: str, target: str) -> None:
        super().__init__(f"batch {batch_id} is {current} and cannot become {target}", code="invalid_state")


class BatchStore:
    """Rows of batches. Every method is one transaction."""

    def __init__(self, database: Database, files: FileStore) -> None:
        self._database = database
        self.files = files

    def create(
        self, request: CreateBatch, idempotency_key: str | None = None, who: Principal = OPERATOR
    ) -> BatchRecord:
        """Create a batch of `who` in validating; durable when this returns.

        Raises RequestError: the file is unknown or not for batches, or the key came with another request.
        """
        body = json.dumps(request.model_dump(mode="json", exclude_unset=True), sort_keys=True)
        body_sha256 = hashlib.sha256(body.encode()).hexdigest()
        try:
            return self.get(self._insert(request, idempotency_key, body_sha256, who))
        except IntegrityError:  # another process claimed the key between our look and our insert
            return self.get(self._insert(request, idempotency_key, body_sha256, who))

    def _insert(self, request: CreateBatch, key: str | None, body_sha256: str, who: Principal) -> str:
        with self._database.write() as connection:
            new, now = new_id("batch_"), int(time.time())
            batch_id = claim_key(connection, "batches", key, body_sha256, new, who)
            if batch_id != new:
                return batch_id
            self._check_file(connection, request.input_file_id, who)
            expiry = request.output_expires_after
            connection.execute(
                insert(batches).values(
                    id=new,
                    account=who.account,
                    endpoint=request.endpoint,
                    input_file=request.input_file_id,
                    status="validating",
                    created_at=now,
                    expires_at=now + WINDOW_S,
                    times={},
                    total=0,
                    completed=0,
                    failed=0,
                    tokens=Tokens(input=0, cached=0, output=0),
                    metadata=request.metadata,
                    output_expires_after_s=None if expiry is None else expiry.seconds,
                )
            )
        return new

    def _check_file(self, connection: Connection, file_id: str, who: Principal) -> None:
        try:
            record = self.files.get_in(connection, file_id, "input_file_id", who, lock=True)
        except NotFoundError as error:
            message = f"input_file_id: {error}"
            raise RequestError(message, param="input_file_id", code="file_not_found") from None
        if record.purpose != "batch":
            raise RequestError(
                f"input_file_id: {file_id} was uploaded with purpose {record.purpose}; it must be batch",
                param="input_file_id",
                code="wrong_purpose",
            )

    def get(self, batch_id: str, who: Principal = OPERATOR) -> BatchRecord:
        """Raises NotFoundError, also for a batch that `who` may not see."""
        with self._database.read() as connection:
            return self._records(connection, [self._row(connection, batch_id, who=who)])[0]

    def list_batches(
        self, *, after: str | None = None, limit: int = 20, who: Principal = OPERATOR
    ) -> Page[BatchRecord]:
        """One page of those that `who` may see, newest first. Raises RequestError if `after` is unknown."""
        with self._database.read() as connection:
            mine = who.only(batches.c.account)
            rows = page(connection, batches, [], lambda row: row, after=after, limit=limit, within=mine)
            return Page(self._records(connection, rows.data), rows.has_more)

    def oldest(self, *statuses: Status) -> BatchRecord | None:
        """The batch that was created first among those in one of the states."""
        return self._first(batches.c.status.in_(statuses))

    def oldest_of(self, account: str | None, *statuses: Status) -> BatchRecord | None:
        """The same among the batches of one account; None for those that no key made."""
        return self._first(batches.c.status.in_(statuses), batches.c.account == account)

    def accounts(self, *statuses: Status) -> set[str | None]:
        """Who has batches in one of the states."""
        query = select(batches.c.account).where(batches.c.status.in_(statuses)).distinct()
        with self._database.read() as connection:
            return set(connection.execute(query).scalars())

    def _first(self, *where: ColumnElement[bool]) -> BatchRecord | None:
        query = select(batches).where(*where).order_by(batches.c.seq).limit(1)
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
            return None if row is None else self._records(connection, [row])[0]

    def input(self, record: BatchRecord) -> FileRecord:
        """The input file, which stays while the batch is not over, even past its expiry."""
        with self._database.read() as connection:
            return self.files.get_in(connection, record.input_file_id, even_expired=True)

    def move(self, batch_id: str, target: Status, **values: Any) -> BatchRecord:
        """Take a batch to another state, with further columns. Raises NotFoundError or BatchStateError."""
        with self._database.write() as connection:
            return self._move(connection, batch_id, target, values)

    def _move(
        self, connection: Connection, batch_id: str, target: Status, values: dict[str, Any]
    ) -> BatchRecord:
        row = self._row(connection, batch_id, lock=True)
        if row.status not in SOURCES[target]:
            raise BatchStateError(batch_id, row.status, target)
        times = {**row.times, target: int(time.time())}
        own = batches.c.id == batch_id
        connection.execute(update(batches).where(own).values(status=target, times=times, **values))
        return self._records(connection, [self._row(connection, batch_id)])[0]

    def begin(self, batch_id: str, total: int, model: str | None) -> BatchRecord:
        """The input file is good. Raises BatchStateError if the batch was cancelled meanwhile."""
        return self.move(batch_id, "in_progress", total=total, model=model)

    def fail(self, batch_id: str, faults: Sequence[LineFault]) -> BatchRecord:
        """The input file is refused. Raises BatchStateError if the batch was cancelled meanwhile."""
        return self.move(batch_id, "failed", errors=list(faults))

    def record(self, batch_id: str, answers: Sequence[LineAnswer]) -> None:
        """Keep answers; they are on disk, and count, when this returns. What has an answer keeps that one.

        Raises StorageFullError: none of them is kept.
        """
        with self._database.write() as connection:
            numbers = [answer.line for answer in answers]
            own = (batch_lines.c.batch_id == batch_id, batch_lines.c.line.in_(numbers))
            known = set(connection.execute(select(batch_lines.c.line).where(*own)).scalars())
            rows = [
                {
                    "batch_id": batch_id,
                    "line": answer.line,
                    "ok": answer.ok,
                    "answer": answer.text,
                    "input_tokens": answer.tokens["input"],
                    "cached_tokens": answer.tokens["cached"],
                    "output_tokens": answer.tokens["output"],
                }
                for answer in answers
                if answer.line not in known
            ]
            if rows:
                connection.execute(insert(batch_lines), rows)

    def answered(self, batch_id: str) -> set[int]:
        """Numbers of the lines that have an answer."""
        with self._database.read() as connection:
            own = batch_lines.c.batch_id == batch_id
            return set(connection.execute(select(batch_lines.c.line).where(own)).scalars())

    def answers(self, batch_id: str, *, ok: bool) -> Iterator[str]:
        """The answers that go to the output file (`ok`) or to the error file, in the order of the input."""
        last = 0
        while True:
            query = select(batch_lines.c.line, batch_lines.c.answer).where(
                batch_lines.c.batch_id == batch_id, batch_lines.c.ok == ok, batch_lines.c.line > last
            )
            with self._database.read() as connection:
                rows = connection.execute(query.order_by(batch_lines.c.line).limit(_READ_ROWS)).all()
            if not rows:
                return
            last = rows[-1].line
            yield from (row.answer for row in rows)

    def publish(
        self,
        batch_id: str,
        target: Status,
        output: Blob | None,
        errors: Blob | None,
        faults: Sequence[LineFault] | None = None,
    ) -> BatchRecord:
        """End a batch: its sealed files become files of its account, its rows go, its state changes, all or
        nothing.

        Raises BatchStateError, or StorageFullError.
        """
        values: dict[str, Any] = {} if faults is None else {"errors": list(faults)}
        with self._database.write() as connection:
            record = self._records(connection, [self._row(connection, batch_id, lock=True)])[0]
            for column, blob, name in (("output_file", output, "output"), ("error_file", errors, "error")):
                if blob is not None:
                    filename = f"{batch_id}_{name}.jsonl"
                    keep_s = record.output_expires_after_s
                    self.files.insert(connection, blob, filename, OUTPUT_PURPOSE, keep_s, record.account)
                    values[column] = blob.id
            values |= {"completed": record.counts.completed, "failed": record.counts.failed}
            values["tokens"] = record.tokens
            connection.execute(delete(batch_lines).where(batch_lines.c.batch_id == batch_id))
            moved = self._move(connection, batch_id, target, values)
        for blob in (output, errors):
            if blob is not None:
                blob.keep()
        return moved

    def _row(
        self, connection: Connection, batch_id: str, *, lock: bool = False, who: Principal = OPERATOR
    ) -> Row[Any]:
        query = select(batches).where(batches.c.id == batch_id, *who.only(batches.c.account))
        query = query.with_for_update() if lock else query
        row = connection.execute(query).one_or_none() if is_id(batch_id) else None
        if row is None:
            raise NotFoundError("batch", batch_id)
        return row

    def _records(self, connection: Connection, rows: Sequence[Row[Any]]) -> list[BatchRecord]:
        """With what is counted of lines whose answers are still rows."""
        lines = batch_lines.c
        of_these: ColumnElement[bool] = lines.batch_id.in_([row.id for row in rows])
        sums = [func.coalesce(func.sum(column), 0) for column in (lines.input_tokens, lines.cached_tokens)]
        query = select(
            lines.batch_id, lines.ok, func.count(), *sums, func.coalesce(func.sum(lines.output_tokens), 0)
        )
        found = connection.execute(query.where(of_these).group_by(lines.batch_id, lines.ok)).all()
        counted: dict[str, list[tuple[bool, list[int]]]] = {}
        for batch_id, ok, *numbers in found:
            counted.setdefault(batch_id, []).append((bool(ok), [int(number) for number in numbers]))
        return [_record(row, counted.get(row.id, [])) for row in rows]


def _record(row: Row[Any], counted: list[tuple[bool, list[int]]]) -> BatchRecord:
    completed, failed = row.completed, row.failed
    tokens: Tokens = row.tokens
    for ok, (count, given, cached, output) in counted:
        completed, failed = (completed + count, failed) if ok else (completed, failed + count)
        tokens = Tokens(
            input=tokens["input"] + given,
            cached=tokens["cached"] + cached,
            output=tokens["output"] + output,
        )
    return BatchRecord(
        id=row.id,
        account=row.account,
        endpoint=row.endpoint,
        input_file_id=row.input_file,
        status=row.status,
        created_at=row.created_at,
        expires_at=row.expires_at,
        times=row.times,
        counts=Counts(row.total, completed, failed),
        tokens=tokens,
        errors=row.errors,
        model=row.model,
        output_file_id=row.output_file,
        error_file_id=row.error_file,
        metadata=row._mapping["metadata"],
        output_expires_after_s=row.output_expires_after_s,
    )
