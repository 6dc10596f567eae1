"""The durable store of files, jobs and batches: a database, and a home folder for bytes."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from sqlalchemy import URL

from tokenloom.durable import sync
from tokenloom.finetune.database import Database
from tokenloom.finetune.errors import StoreError
from tokenloom.finetune.file_store import MAX_FILE_BYTES, FileStore
from tokenloom.finetune.job_log import JobLog
from tokenloom.finetune.job_store import JobStore

DATABASE_FILE = "jobs.sqlite"
"""In the home folder, unless a database URL is given."""


class Store:
    """Files and jobs under one home folder, for one process at a time.

    Layout: `HOME/jobs.sqlite` (unless a database URL is given), `HOME/files/<id>`, `HOME/jobs/<id>/`,
    `HOME/store-id` (which database the folder belongs to) and `HOME/lock`.
    """

    def __init__(
        self,
        home: Path,
        url: str | None = None,
        *,
        max_file_bytes: int = MAX_FILE_BYTES,
        quota_bytes: int = 0,
    ) -> None:
        """Open the store, and mend what an interrupted process left.

        Args:
            home: created if it does not exist.
            url: of a PostgreSQL database; None takes SQLite in `home`.
            max_file_bytes: limit of one file; `quota_bytes` of all together, 0 for none.

        Raises StoreError if another process has the folder, or the database is not the folder's.
        """
        self.home = home.absolute()
        self.home.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.home / "lock")
        try:
            self._database = Database(url or URL.create("sqlite", database=str(self.home / DATABASE_FILE)))
        except StoreError:
            os.close(self._lock)
            raise
        try:
            _check_store_id(self.home, self._database.store_id)
            self.files = FileStore(
                self._database, self.home / "files", max_file_bytes=max_file_bytes, quota_bytes=quota_bytes
            )
            self.jobs = JobStore(self._database, self.files, self.home)
            self.log = JobLog(self._database, self.home)
            self.jobs.recover()
            self.files.recover()
        except BaseException:
            self.close()
            raise

    @property
    def database(self) -> Database:
        """For stores of other things beside it."""
        return self._database

    def close(self) -> None:
        self._database.close()
        os.close(self._lock)


def _lock(path: Path) -> int:
    # The system frees it when the process ends, however it ends.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise StoreError(f"{path.parent} is in use by another tokenloom process") from None
    return descriptor


def _check_store_id(home: Path, store_id: str) -> None:
    # With a wrong database every file would look like an orphan and be removed.
    path = home / "store-id"
    if path.exists():
        if path.read_text().strip() != store_id:
            raise StoreError(f"the files in {home} belong to another job database than the one given")
        return
    if (home / "files").exists() and any((home / "files").iterdir()):
        raise StoreError(f"{home}/files is not empty, and {path} that names its database is missing")
    temporary = path.with_suffix(".part")
    with temporary.open("w") as file:
        file.write(store_id + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(home)
