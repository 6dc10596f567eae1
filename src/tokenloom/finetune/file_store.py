"""Files: their rows and their bytes."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, func, or_, select, update
from sqlalchemy.exc import IntegrityError

from tokenloom.durable import sync
from tokenloom.errors import RequestError
from tokenloom.finetune.blobs import Blob, Quota, remove_orphans
from tokenloom.finetune.database import Database, claim_key, is_id, page
from tokenloom.finetune.errors import NotFoundError, StorageFullError
from tokenloom.finetune.principal import OPERATOR, Principal
from tokenloom.finetune.records import LIVE, FileRecord, Page
from tokenloom.finetune.schema import LIVE_BATCHES, batches, files, jobs

logger = logging.getLogger("tokenloom.finetune")

MAX_FILE_BYTES = 512 * 2**20
UPLOAD_PURPOSES = ("fine-tune", "assistants", "batch", "vision", "user_data", "evals")
RESULTS_PURPOSE = "fine-tune-results"
MIN_EXPIRY_S, MAX_EXPIRY_S = 3600, 2_592_000


class FileStore:
    """Uploaded and produced files under one folder."""

    def __init__(self, database: Database, folder: Path, *, max_file_bytes: int, quota_bytes: int) -> None:
        """
        Args:
            max_file_bytes: size limit of one file.
            quota_bytes: limit of all files together; 0 for none.
        """
        self._database = database
        self._folder = folder
        self.max_file_bytes = max_file_bytes
        self._quota_bytes = quota_bytes
        self._quota = Quota(quota_bytes, self._stored_bytes)
        folder.mkdir(parents=True, exist_ok=True)

    def begin(self, *, within_quota: bool = True) -> Blob:
        """Open a new file for writing. Raises StorageFullError if no room is left.

        Results of a job are written outside the quota and the size limit, which must not lose a finished job.
        """
        quota = self._quota if self._quota_bytes and within_quota else None
        if quota is not None:
            quota.take(0)
        max_bytes = self.max_file_bytes if within_quota else sys.maxsize
        return Blob(self._folder, max_bytes=max_bytes, quota=quota)

    def add(
        self,
        blob: Blob,
        filename: str,
        purpose: str,
        expires_after_s: int | None = None,
        idempotency_key: str | None = None,
        who: Principal = OPERATOR,
    ) -> FileRecord:
        """Make a written blob a file; durable when this returns.

        Raises RequestError for a bad name, purpose, expiry or reused key, StorageFullError without room.
        """
        filename = clean_filename(filename)
        check_upload(filename, purpose, expires_after_s)
        body = json.dumps([filename, purpose, expires_after_s, blob.sha256])
        body_sha256 = hashlib.sha256(body.encode()).hexdigest()
        blob.seal()
        try:
            file_id = self._commit(
                blob, filename, purpose, expires_after_s, idempotency_key, body_sha256, who
            )
        except IntegrityError:  # another process claimed the key between our look and our insert
            file_id = self._commit(
                blob, filename, purpose, expires_after_s, idempotency_key, body_sha256, who
            )
        if file_id == blob.id:
            blob.keep()
        return self.get(file_id)

    def _commit(
        self,
        blob: Blob,
        filename: str,
        purpose: str,
        expires_after_s: int | None,
        key: str | None,
        body_sha256: str,
        who: Principal,
    ) -> str:
        with self._database.write() as connection:
            file_id = claim_key(connection, "files", key, body_sha256, blob.id, who)
            if file_id == blob.id:
                if self._quota_bytes and self._used(connection) + blob.size_bytes > self._quota_bytes:
                    raise StorageFullError("the quota for files is used up; delete some files first")
                self.insert(connection, blob, filename, purpose, expires_after_s, who.account)
        return file_id

    def insert(
        self,
        connection: Connection,
        blob: Blob,
        filename: str,
        purpose: str,
        expires_after_s: int | None = None,
        account: str | None = None,
    ) -> None:
        """Add the row of a sealed blob, a file of `account`, within the caller's transaction."""
        now = int(time.time())
        connection.execute(
            files.insert().values(
                id=blob.id,
                account=account,
                filename=filename,
                purpose=purpose,
                bytes=blob.size_bytes,
                sha256=blob.sha256,
                created_at=now,
                expires_at=None if expires_after_s is None else now + expires_after_s,
            )
        )

    def get(self, file_id: str, param: str | None = None, who: Principal = OPERATOR) -> FileRecord:
        """Raises NotFoundError if the file does not exist for `who`, was deleted or has expired."""
        with self._database.read() as connection:
            return self.get_in(connection, file_id, param, who)

    def get_in(
        self,
        connection: Connection,
        file_id: str,
        param: str | None = None,
        who: Principal = OPERATOR,
        *,
        lock: bool = False,
        even_expired: bool = False,
    ) -> FileRecord:
        """The same within a transaction; `lock` keeps others from deleting the file before its end.

        Args:
            even_expired: for whoever keeps the file from being removed.
        """
        alive = [files.c.deleted_at.is_(None)] if even_expired else _alive()
        query = select(files).where(files.c.id == file_id, *alive, *who.only(files.c.account))
        query = query.with_for_update() if lock else query
        row = connection.execute(query).one_or_none() if is_id(file_id) else None
        if row is None:
            raise NotFoundError("file", file_id, param)
        return self._record(row)

    def list_files(
        self,
        *,
        after: str | None,
        limit: int,
        newest_first: bool = True,
        purpose: str | None = None,
        who: Principal = OPERATOR,
    ) -> Page[FileRecord]:
        """One page of the files that `who` may see. Raises RequestError if `after` is unknown."""
        where = _alive() + ([] if purpose is None else [files.c.purpose == purpose])
        with self._database.read() as connection:
            return page(
                connection,
                files,
                where,
                self._record,
                after=after,
                limit=limit,
                newest_first=newest_first,
                within=who.only(files.c.account),
            )

    def delete(self, file_id: str, who: Principal = OPERATOR) -> None:
        """Delete a file.

        Raises NotFoundError, or RequestError naming the job that still needs it.
        """
        with self._database.write() as connection:
            record = self.get_in(connection, file_id, who=who, lock=True)
            user = _live_user(connection, file_id)
            if user is not None:
                raise RequestError(
                    f"file {file_id} is in use by {user}; cancel that first", code="file_in_use"
                )
            self._bury(connection, file_id)
        record.path.unlink(missing_ok=True)
        sync(self._folder)

    def path(self, file_id: str) -> Path:
        """Where the bytes of a file are; for ids that come from our own rows only."""
        return self._folder / file_id

    def recover(self) -> None:
        """At start: drop what has expired and what a crash left without a row."""
        now = int(time.time())
        with self._database.write() as connection:
            expired = select(files.c.id).where(files.c.deleted_at.is_(None), files.c.expires_at <= now)
            for (file_id,) in connection.execute(expired).all():
                if _live_user(connection, file_id) is None:
                    self._bury(connection, file_id)
            known = set(connection.execute(select(files.c.id).where(files.c.deleted_at.is_(None))).scalars())
        for name in remove_orphans(self._folder, known):
            logger.info("removed %s, which an interrupted upload or deletion left behind", name)

    def _bury(self, connection: Connection, file_id: str) -> None:
        buried = update(files).where(files.c.id == file_id).values(deleted_at=int(time.time()))
        connection.execute(buried)

    def _stored_bytes(self) -> int:
        with self._database.read() as connection:
            return self._used(connection)

    def _used(self, connection: Connection) -> int:
        total = select(func.coalesce(func.sum(files.c.bytes), 0)).where(files.c.deleted_at.is_(None))
        return int(connection.execute(total).scalar_one())

    def _record(self, row: Row[Any]) -> FileRecord:
        return FileRecord(
            id=row.id,
            filename=row.filename,
            purpose=row.purpose,
            bytes=row.bytes,
            sha256=row.sha256,
            created_at=row.created_at,
            expires_at=row.expires_at,
            path=self.path(row.id),
        )


def clean_filename(filename: str) -> str:
    """The last part of a client's file name, without control characters; it only ever serves as a label."""
    name = filename.replace("\\", "/").rpartition("/")[2]
    name = "".join(character for character in name if character.isprintable()).strip()
    return name[-255:] if name.strip(".") else "upload"


def check_upload(filename: str, purpose: str, expires_after_s: int | None) -> None:
    """Raises RequestError naming the field of an upload that is not acceptable."""
    if purpose not in UPLOAD_PURPOSES:
        raise RequestError(f"purpose: must be one of {', '.join(UPLOAD_PURPOSES)}", param="purpose")
    if purpose == "fine-tune" and "." in filename and not filename.lower().endswith(".jsonl"):
        raise RequestError("file: a file for fine-tuning must be a .jsonl file", param="file")
    if expires_after_s is not None and not MIN_EXPIRY_S <= expires_after_s <= MAX_EXPIRY_S:
        raise RequestError(
            f"expires_after.seconds: must be from {MIN_EXPIRY_S} to {MAX_EXPIRY_S}",
            param="expires_after.seconds",
        )


def _alive() -> list[ColumnElement[bool]]:
    now = int(time.time())
    return [files.c.deleted_at.is_(None), or_(files.c.expires_at.is_(None), files.c.expires_at > now)]


def _live_user(connection: Connection, file_id: str) -> str | None:
    """The job or batch that is not over and reads a file."""
    either = or_(jobs.c.training_file == file_id, jobs.c.validation_file == file_id)
    job = connection.execute(select(jobs.c.id).where(either, jobs.c.status.in_(sorted(LIVE))).limit(1))
    if (user := job.scalar()) is not None:
        return f"job {user}"
    reads = (batches.c.input_file == file_id, batches.c.status.in_(LIVE_BATCHES))
    batch = connection.execute(select(batches.c.id).where(*reads).limit(1))
    return None if (user := batch.scalar()) is None else f"batch {user}"
