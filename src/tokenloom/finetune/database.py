"""The database of files and jobs: connections, transactions, listing and idempotency."""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import URL, ColumnElement, Connection, Row, Table, event, select
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.schema import CreateColumn

from tokenloom.errors import RequestError
from tokenloom.finetune import schema
from tokenloom.finetune.errors import StorageFullError, StoreError
from tokenloom.finetune.principal import OPERATOR, Principal
from tokenloom.finetune.records import Page

BUSY_TIMEOUT_S = 30

T = TypeVar("T")


class Database:
    """One engine with the tables in it. What `write()` has committed survives a crash."""

    def __init__(self, url: str | URL) -> None:
        """Connect, and create the tables where there are none, and columns that older ones lack.

        Raises StoreError if the URL is not usable, or the tables are of another version.
        """
        try:
            parsed = sa.make_url(url)
            is_sqlite = parsed.get_backend_name() == "sqlite"
            options = {"connect_args": {"timeout": BUSY_TIMEOUT_S}} if is_sqlite else {"pool_pre_ping": True}
            self.engine = sa.create_engine(parsed, **options)
        except (SQLAlchemyError, ImportError) as error:  # the driver may not be installed
            raise StoreError(f"database URL: {error}") from error
        if is_sqlite:
            event.listen(self.engine, "connect", _set_up_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        try:
            with self.write() as connection:
                schema.metadata.create_all(connection)
                self.store_id = _store_id(connection)
                _add_new_columns(connection)
        except DBAPIError as error:
            self.engine.dispose()
            raise StoreError(f"database {parsed.render_as_string()}: {error.orig}") from error
        except StoreError:
            self.engine.dispose()
            raise

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection that sees one state of the database and changes nothing."""
        with self.engine.connect() as connection:
            connection.info["writes"] = False
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction: committed and on disk at the end, or rolled back.

        Raises StorageFullError if the disk has no room for it.
        """
        try:
            with self.engine.connect() as connection:
                connection.info["writes"] = True
                with connection.begin():
                    yield connection
        except DBAPIError as error:
            if "full" in str(error.orig).lower():
                raise StorageFullError("the disk of the job database is full") from error
            raise

    def close(self) -> None:
        self.engine.dispose()


def new_id(prefix: str) -> str:
    """A fresh id that nobody can guess, e.g. `file-` and 24 hexadecimal digits."""
    return prefix + secrets.token_hex(12)


def is_id(text: str) -> bool:
    """Whether `text` has the form of an id. Anything else is not worth asking the database for."""
    return re.fullmatch(r"[a-z]+[-_][0-9a-f]{24}", text) is not None


def page(
    connection: Connection,
    table: Table,
    where: list[ColumnElement[bool]],
    record: Callable[[Row[Any]], T],
    *,
    after: str | None,
    limit: int,
    newest_first: bool = True,
    within: Sequence[ColumnElement[bool]] = (),
) -> Page[T]:
    """Up to `limit` rows that follow the row with id `after`.

    Args:
        within: what `after` must belong to, e.g. the job whose events are listed. It need not fulfil `where`:
            it may have been deleted since.

    Raises RequestError (param "after") if there is no such row.
    """
    seq = table.c.seq
    if after is not None:
        own = [table.c.id == after, *within]
        start = connection.execute(select(seq).where(*own)).scalar_one_or_none() if is_id(after) else None
        if start is None:
            raise RequestError(f"after: nothing in this list has the id {after[:128]!r}", param="after")
        where = [*where, seq < start if newest_first else seq > start]
    where = [*where, *within]
    order = seq.desc() if newest_first else seq.asc()
    found = connection.execute(select(table).where(*where).order_by(order).limit(limit + 1)).all()
    return Page([record(row) for row in found[:limit]], len(found) > limit)


def claim_key(
    connection: Connection, scope: str, key: str | None, body_sha256: str, new: str, who: Principal = OPERATOR
) -> str:
    """Bind an idempotency key to the object about to be created.

    Returns the id of the object that the key stands for: `new`, or that of an earlier, equal request.

    Raises RequestError if the key came with another body before.
    """
    if key is None:
        return new
    if not (0 < len(key) <= 255 and key.isprintable()):
        raise RequestError(
            "Idempotency-Key: must be 1 to 255 printable characters", code="invalid_idempotency_key"
        )
    keys = schema.idempotency_keys
    key = who.own_key(key)
    own = select(keys).where(keys.c.scope == scope, keys.c.key == key)
    known = connection.execute(own).one_or_none()
    if known is None:
        values = {"scope": scope, "key": key, "body_sha256": body_sha256, "object_id": new}
        connection.execute(keys.insert().values(values))
        return new
    if known.body_sha256 != body_sha256:
        raise RequestError(
            "Idempotency-Key: was used before with a different request", code="idempotency_key_reused"
        )
    return str(known.object_id)


def _set_up_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # the driver would begin transactions on its own, and too late
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A writer that began as a reader could not wait its turn: its snapshot would be out of date.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.info.get("writes") else "BEGIN")


def _add_new_columns(connection: Connection) -> None:
    inspector, dialect = sa.inspect(connection), connection.dialect
    # Two processes may open an older PostgreSQL database at the same time; of SQLite there is one writer.
    guard = "IF NOT EXISTS " if dialect.name == "postgresql" else ""
    for table in schema.metadata.sorted_tables:
        known = {column["name"] for column in inspector.get_columns(table.name)}
        for column in table.columns:
            if column.name not in known:
                kind = CreateColumn(column).compile(dialect=dialect)
                connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN {guard}{kind}")


def _store_id(connection: Connection) -> str:
    row = connection.execute(select(schema.store)).one_or_none()
    if row is None:
        store_id = new_id("store-")
        connection.execute(schema.store.insert().values(id=store_id, schema_version=schema.SCHEMA_VERSION))
        return store_id
    if row.schema_version != schema.SCHEMA_VERSION:
        raise StoreError(
            f"the job database has schema version {row.schema_version}, this program {schema.SCHEMA_VERSION}"
        )
    return str(row.id)
