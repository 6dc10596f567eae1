"""Tables of files, jobs and batches, in SQL that SQLite and PostgreSQL both speak.

Rows are listed in the order of `seq`, because many can be created within one second.

A column that may be null can be added at any time: `Database` adds it to tables that were made without it,
and programs that do not know it leave it null. Any other change is another `SCHEMA_VERSION`.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

SCHEMA_VERSION = 1

metadata = MetaData()


def _seq() -> Column[int]:
    # SQLite counts up by itself only in a column of exactly the type INTEGER.
    kind = BigInteger().with_variant(Integer(), "sqlite")
    return Column("seq", kind, primary_key=True, autoincrement=True)


def _id() -> Column[str]:
    return Column("id", String(64), nullable=False, unique=True)


def _account() -> Column[str]:
    # Whose key made it; null where no key was asked for.
    return Column("account", String(64))


def _job() -> Column[str]:
    return Column("job_id", String(64), ForeignKey("jobs.id"), nullable=False, index=True)


store = Table(
    "store",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("schema_version", Integer, nullable=False),
)
"""One row: which store this is. The folder of files holds the same id, so that the two cannot be mixed up."""

api_keys = Table(
    "api_keys",
    metadata,
    _seq(),
    _id(),
    Column("name", Text, nullable=False),
    Column("admin", Boolean, nullable=False),
    Column("salt", LargeBinary(16), nullable=False),
    Column("digest", LargeBinary(32), nullable=False),
    Column("rpm", BigInteger),
    Column("tpm", BigInteger),
    Column("max_concurrent", BigInteger),
    Column("created_at", BigInteger, nullable=False),
    # Rows are never deleted: a server whose last key was revoked must not open to everybody.
    Column("revoked_at", BigInteger),
    sqlite_autoincrement=True,
)

files = Table(
    "files",
    metadata,
    _seq(),
    _id(),
    _account(),
    Column("filename", Text, nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    # A deleted file keeps its row: listings that walk and delete go on after it.
    Column("deleted_at", BigInteger),
    sqlite_autoincrement=True,
)

jobs = Table(
    "jobs",
    metadata,
    _seq(),
    _id(),
    _account(),
    Column("name", Text, nullable=False, unique=True),
    Column("model", Text, nullable=False),
    Column("suffix", String(64)),
    Column("status", String(32), nullable=False, index=True),
    Column("training_file", String(64), ForeignKey("files.id"), nullable=False),
    Column("validation_file", String(64), ForeignKey("files.id")),
    Column("requested", JSON, nullable=False),
    Column("hyperparameters", JSON(none_as_null=True)),
    Column("seed", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("finished_at", BigInteger),
    Column("estimated_finish", BigInteger),
    Column("trained_tokens", BigInteger),
    Column("fine_tuned_model", Text),
    Column("result_file", String(64), ForeignKey("files.id")),
    Column("error_code", String(64)),
    Column("error_message", Text),
    Column("error_param", String(64)),
    Column("adapter_path", Text),
    sqlite_autoincrement=True,
)

job_metadata = Table(
    "job_metadata",
    metadata,
    Column("job_id", String(64), ForeignKey("jobs.id"), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("value", String(512), nullable=False),
)

events = Table(
    "events",
    metadata,
    _seq(),
    _id(),
    _job(),
    Column("created_at", BigInteger, nullable=False),
    Column("level", String(8), nullable=False),
    Column("type", String(16), nullable=False),
    Column("message", Text, nullable=False),
    Column("step", BigInteger),
    Column("data", JSON(none_as_null=True)),
    UniqueConstraint("job_id", "step"),
    sqlite_autoincrement=True,
)

checkpoints = Table(
    "checkpoints",
    metadata,
    _seq(),
    _id(),
    _job(),
    Column("created_at", BigInteger, nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("name", Text, nullable=False, unique=True),
    Column("metrics", JSON, nullable=False),
    Column("path", Text, nullable=False),
    UniqueConstraint("job_id", "step"),
    sqlite_autoincrement=True,
)

batches = Table(
    "batches",
    metadata,
    _seq(),
    _id(),
    _account(),
    Column("endpoint", String(32), nullable=False),
    Column("input_file", String(64), ForeignKey("files.id"), nullable=False),
    Column("status", String(16), nullable=False, index=True),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("times", JSON, nullable=False),
    Column("total", BigInteger, nullable=False),
    # Of lines whose answers are in the output files; those of the others are counted in batch_lines.
    Column("completed", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    Column("tokens", JSON, nullable=False),
    Column("errors", JSON(none_as_null=True)),
    Column("model", Text),
    Column("output_file", String(64), ForeignKey("files.id")),
    Column("error_file", String(64), ForeignKey("files.id")),
    Column("metadata", JSON(none_as_null=True)),
    Column("output_expires_after_s", BigInteger),
    sqlite_autoincrement=True,
)

LIVE_BATCHES = ("validating", "in_progress", "finalizing", "cancelling")
"""States of a batch that is not over: its input file must stay."""

batch_lines = Table(
    "batch_lines",
    metadata,
    Column("batch_id", String(64), ForeignKey("batches.id"), primary_key=True),
    Column("line", BigInteger, primary_key=True, autoincrement=False),
    Column("ok", Boolean, nullable=False),
    Column("answer", Text, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
)
"""Answers of a batch that is not over. The key is why no line can be answered twice."""

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("scope", String(16), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("body_sha256", String(64), nullable=False),
    Column("object_id", String(64), nullable=False),
)
