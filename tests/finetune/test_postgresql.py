"""The same store on PostgreSQL: every statement compiles for it, and a whole job runs on a real server."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from finetune_fakes import DATA, FakeRunner, trainable, wait_until
from tokenloom.errors import RequestError
from tokenloom.finetune import schema
from tokenloom.finetune.database import Database
from tokenloom.finetune.job_request import parse_job
from tokenloom.finetune.service import JobService
from tokenloom.finetune.store import Store


def whole_story(store: Store) -> None:
    """Use everything that the store can do."""
    service = JobService(store, FakeRunner(), trainable())
    service.start()
    made = [service.create_file([DATA], "train.jsonl", expires_after_s=3600) for _ in range(3)]
    service.files.delete(made[2].id)
    walk = service.files.list_files(after=made[2].id, limit=1, purpose="fine-tune")
    assert ([file.id for file in walk.data], walk.has_more) == ([made[1].id], True)
    body = {
        "model": "tiny",
        "training_file": made[0].id,
        "validation_file": made[1].id,
        "metadata": {"a": "b"},
    }
    body["training"] = {"save_total_limit": 2}
    jobs: list[str] = []
    threads = [
        threading.Thread(target=lambda: jobs.append(service.create_job(parse_job(body), "key").id))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(jobs) == 8 and len(set(jobs)) == 1
    with pytest.raises(RequestError):
        service.create_job(parse_job({**body, "seed": 1}), "key")
    done = wait_until(lambda: store.jobs.get(jobs[0]).fine_tuned_model and store.jobs.get(jobs[0]))
    assert [model.step for model in service.models()] == [None, 2, 3]
    assert store.files.get(done.result_files[0]).path.read_text().count("\n") == 4
    assert store.jobs.list_jobs(metadata={"a": "b"}).data == [done]
    assert store.jobs.list_jobs(metadata={"a": "\0"}).data == []
    assert store.jobs.list_jobs(no_metadata=True).data == []
    events = store.log.list_events(done.id, after=None, limit=3)
    assert store.log.list_events(done.id, after=events.data[-1].id, limit=3).has_more
    with pytest.raises(RequestError, match="cannot become paused"):
        service.pause(done.id)
    for name in (done.name, f"{done.name}:ckpt-step-2"):
        service.delete_model(name)
    service.stop()
    store.jobs.recover()
    store.files.recover()


def test_every_statement_compiles_for_postgresql(tmp_path: Path) -> None:
    store, seen = Store(tmp_path), []
    sa.event.listen(store._database.engine, "before_execute", lambda *call: seen.append(call[1]))
    whole_story(store)
    store.close()
    dialect: Any = postgresql.dialect()  # type: ignore[no-untyped-call]
    compiled = {str(statement.compile(dialect=dialect)) for statement in seen}
    assert len(compiled) > 30
    assert any("FOR UPDATE" in text for text in compiled)
    for table in schema.metadata.sorted_tables:
        assert "CREATE TABLE" in str(CreateTable(table).compile(dialect=dialect))


@pytest.fixture(scope="module")
def postgres_url() -> Iterator[str]:
    """A throw-away server on a Unix socket. PostgreSQL refuses to run as root."""
    pytest.importorskip("pg8000", reason="the PostgreSQL driver pg8000 is not installed")
    for program in ("initdb", "pg_ctl"):
        if shutil.which(program) is None:
            pytest.skip(f"PostgreSQL's {program} is not installed")
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    user = {"user": "postgres"} if os.geteuid() == 0 else {}
    if user:
        shutil.chown(folder, "postgres")

    def call(*command: str) -> None:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
        subprocess.run(command, check=True, cwd=folder, timeout=60, **quiet, **user)  # type: ignore[call-overload]

    data = str(folder / "data")
    settings = f"-c listen_addresses='' -c fsync=off -k {folder}"
    call("initdb", "-D", data, "-U", "tester", "-A", "trust", "-N", "-E", "UTF8", "--no-locale")
    call("pg_ctl", "-D", data, "-w", "-o", settings, "-l", str(folder / "log"), "start")
    try:
        yield f"postgresql+pg8000://tester@/postgres?unix_sock={folder}/.s.PGSQL.5432"
    finally:
        call("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder)


def test_a_whole_job_on_a_real_server(tmp_path: Path, postgres_url: str) -> None:
    store = Store(tmp_path, postgres_url)
    whole_story(store)
    store.close()
    store = Store(tmp_path, postgres_url)
    assert [job.status for job in store.jobs.list_jobs().data] == ["succeeded"]
    assert not (tmp_path / "jobs.sqlite").exists()
    store.close()


def test_an_older_database_on_a_real_server_gains_the_columns_that_it_lacks(postgres_url: str) -> None:
    Database(postgres_url).close()
    engine = sa.create_engine(postgres_url)
    with engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE batches DROP COLUMN account"))
    engine.dispose()
    opened = Database(postgres_url)
    with opened.read() as connection:
        assert connection.execute(sa.select(schema.batches.c.account)).all() == []
    opened.close()
