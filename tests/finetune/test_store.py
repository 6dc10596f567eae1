"""The store on disk: what is refused, what is mended at start, what happens when there is no room."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from finetune_fakes import DATA, names_below
from tokenloom.errors import RequestError
from tokenloom.finetune import blobs
from tokenloom.finetune.blobs import Blob
from tokenloom.finetune.database import Database
from tokenloom.finetune.errors import NotFoundError, StorageFullError, StoreError
from tokenloom.finetune.file_store import clean_filename
from tokenloom.finetune.job_request import parse_job
from tokenloom.finetune.records import FileRecord
from tokenloom.finetune.schema import batches
from tokenloom.finetune.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path)
    yield store
    store.close()


def add(store: Store, data: bytes = DATA, **options: Any) -> FileRecord:
    with store.files.begin() as blob:
        blob.write(data)
        return store.files.add(blob, "train.jsonl", "fine-tune", **options)


def test_a_home_has_one_process_at_a_time(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="in use by another"):
        Store(tmp_path)


def test_a_home_refuses_another_database(tmp_path: Path) -> None:
    store = Store(tmp_path)
    kept = add(store)
    store.close()
    with pytest.raises(StoreError, match="belong to another job database"):
        Store(tmp_path, f"sqlite:///{tmp_path / 'other.sqlite'}")
    (tmp_path / "store-id").unlink()
    with pytest.raises(StoreError, match="not empty"):
        Store(tmp_path)
    assert kept.path.read_bytes() == DATA


@pytest.mark.parametrize("url", ["no url", "mysterydb://x", "sqlite:////no/such/folder/x.sqlite"])
def test_a_bad_database_url_is_one_clear_error(tmp_path: Path, url: str) -> None:
    with pytest.raises(StoreError, match="database"):
        Store(tmp_path, url)
    Store(tmp_path).close()


def test_a_database_of_another_version_is_refused(tmp_path: Path) -> None:
    Store(tmp_path).close()
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE store SET schema_version = 99"))
    engine.dispose()
    with pytest.raises(StoreError, match="schema version 99"):
        Store(tmp_path)


def test_an_older_database_gains_the_columns_that_it_lacks(tmp_path: Path) -> None:
    store = Store(tmp_path)
    kept = add(store)
    store.close()
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    with engine.begin() as connection:
        for table in ("files", "jobs", "batches"):
            connection.execute(sa.text(f"ALTER TABLE {table} DROP COLUMN account"))
        insert = sa.text(
            "INSERT INTO batches (id, endpoint, input_file, status, created_at, expires_at, times, total, "
            "completed, failed, tokens) VALUES ('batch_old', '', :file, 'failed', 0, 0, '{}', 0, 0, 0, '')"
        )
        connection.execute(insert, {"file": kept.id})
    engine.dispose()
    store = Store(tmp_path)
    with store.database.read() as connection:
        rows = connection.execute(sa.select(batches.c.id, batches.c.account)).all()
    assert store.files.get(kept.id) == kept
    store.close()
    assert rows == [("batch_old", None)]


def test_sqlite_runs_in_its_safe_modes(store: Store, tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    with database.read() as connection:
        modes = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
    database.close()
    assert modes == ["wal", 2, 1]


def test_orphans_are_removed_at_start(tmp_path: Path) -> None:
    store = Store(tmp_path)
    kept, gone = add(store), add(store)
    store.close()
    (tmp_path / "files" / "file-stray").write_bytes(b"x")
    (tmp_path / "files" / "file-half.part").write_bytes(b"x")
    gone.path.unlink()
    Store(tmp_path).close()
    assert names_below(tmp_path / "files") == {kept.id}


def test_expired_files_are_removed_at_start_unless_a_job_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    used, unused = add(store, expires_after_s=3600), add(store, expires_after_s=3600)
    store.jobs.create(parse_job({"model": "tiny", "training_file": used.id}))
    store.close()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 4000)
    store = Store(tmp_path)
    for record in (used, unused):
        with pytest.raises(NotFoundError):
            store.files.get(record.id)
    store.close()
    assert names_below(tmp_path / "files") == {used.id}


def test_an_expired_file_starts_no_job(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    file = add(store, expires_after_s=3600)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 4000)
    with pytest.raises(RequestError) as caught:
        store.jobs.create(parse_job({"model": "tiny", "training_file": file.id}))
    assert (caught.value.param, caught.value.code) == ("training_file", "file_not_found")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(blobs.os, call, full)
    with pytest.raises(StorageFullError, match="disk that holds the files is full"):
        add(store)
    monkeypatch.undo()
    assert not names_below(tmp_path / "files")
    assert not store.files.list_files(after=None, limit=10).data


def test_a_full_disk_is_noticed_while_writing(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    blob = Blob(tmp_path, max_bytes=2**30, quota=None)
    blob._file.close()
    blob._file = Path("/dev/full").open("wb")  # noqa: SIM115
    with blob, pytest.raises(StorageFullError):
        blob.write(b"x" * 2**20)
    assert not names_below(tmp_path)


def test_a_full_database_is_one_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def shrink(connection: Any, _: Any) -> None:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count={pages}")

    engine = store._database.engine
    sa.event.listen(engine, "connect", shrink)
    engine.dispose()
    with pytest.raises(StorageFullError, match="disk of the job database is full"):
        for _ in range(100):
            add(store)
    sa.event.remove(engine, "connect", shrink)
    engine.dispose()
    rows = store.files.list_files(after=None, limit=1000).data
    assert names_below(tmp_path / "files") == {row.id for row in rows}
    store.close()


@pytest.mark.parametrize(
    ("name", "label"),
    [("a/b.jsonl", "b.jsonl"), ("a\\b", "b"), ("\0\n", "upload"), ("...", "upload"), ("x" * 300, "x" * 255)],
)
def test_names_from_clients_are_cleaned(name: str, label: str) -> None:
    assert clean_filename(name) == label


def test_paths_move_with_the_home(tmp_path: Path) -> None:
    store = Store(tmp_path / "old")
    job = store.jobs.create(parse_job({"model": "tiny", "training_file": add(store).id}))
    store.log.add_checkpoint(job.id, 1, job.checkpoint_dir / "1", {})
    store.close()
    (tmp_path / "old").rename(tmp_path / "new")
    store = Store(tmp_path / "new")
    assert [model.adapter_path for model in store.log.models()] == [
        tmp_path / "new" / "jobs" / job.id / "checkpoints" / "1"
    ]
    store.close()


def test_metrics_that_json_cannot_hold_become_null(store: Store) -> None:
    job = store.jobs.create(parse_job({"model": "tiny", "training_file": add(store).id}))
    store.log.add_metrics(job.id, 1, "nan \0 \ud800", {"train_loss": float("nan")}, 1, None)
    assert store.log.metrics(job.id) == [{"train_loss": None}]


def test_uploads_at_the_same_time_share_one_quota(tmp_path: Path) -> None:
    store = Store(tmp_path, quota_bytes=1000)
    first, second = store.files.begin(), store.files.begin()
    first.write(b"x" * 600)
    with pytest.raises(StorageFullError, match="quota"):
        second.write(b"x" * 600)
    first.discard()
    third = store.files.begin()
    third.write(b"x" * 600)
    store.files.add(third, "a.jsonl", "fine-tune")
    second.write(b"x" * 400)
    with pytest.raises(StorageFullError, match="quota"):
        store.files.begin().write(b"x")
    store.close()
