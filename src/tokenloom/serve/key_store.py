"""API keys in the server's database: made, listed and revoked here, never readable again.

A key is `tl-ID-SECRET`. The id finds its row; the secret has 192 random bits, of which the row holds a salted
BLAKE2b digest. A slow hash (scrypt, argon2) would buy nothing: it makes guessing dear, and nobody guesses 192
bits; but every request would pay for it, those with made-up keys included.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Row, func, make_url, select, update

from tokenloom.errors import RequestError
from tokenloom.finetune.database import Database, is_id, new_id
from tokenloom.finetune.errors import NotFoundError
from tokenloom.finetune.schema import api_keys

_PREFIX = "key-"
_TOKEN = re.compile(r"tl-([0-9a-f]{24})-([0-9a-f]{48})")
MAX_NAME_CHARACTERS = 128


@dataclass(frozen=True)
class StoredKey:
    """A key as the database knows it. Limits are per minute; None takes the server's own, 0 is no limit."""

    id: str
    name: str
    admin: bool
    rpm: int | None
    tpm: int | None
    max_concurrent: int | None
    created_at: int
    revoked_at: int | None
    salt: bytes
    digest: bytes

    def fits(self, secret: str) -> bool:
        """Whether this is the key's secret; how long that takes tells nothing about it."""
        return hmac.compare_digest(self.digest, _digest(secret, self.salt))


class KeyStore:
    """Keys in a database, for any number of processes at the same time.

    Args:
        url: of the database that also has the files and jobs (`jobs.database_url`), or the path of SQLite's
            file. A file that does not exist holds no keys, and is made with the first one.
    """

    def __init__(self, url: str | Path) -> None:
        self._path = url if isinstance(url, Path) else None
        self._url = make_url(url) if isinstance(url, str) else URL.create("sqlite", database=str(url))
        self._database: Database | None = None

    def close(self) -> None:
        if self._database is not None:
            self._database.close()

    def create(
        self,
        name: str = "",
        *,
        admin: bool = False,
        rpm: int | None = None,
        tpm: int | None = None,
        max_concurrent: int | None = None,
    ) -> tuple[StoredKey, str]:
        """A new key: its row, and the key itself, which cannot be had again.

        Raises:
            RequestError: naming the argument that is not acceptable.
            StoreError: the database cannot be opened.
        """
        if len(name) > MAX_NAME_CHARACTERS or not name.isprintable():
            raise RequestError(f"name: must be at most {MAX_NAME_CHARACTERS} printable characters")
        limits = {"rpm": rpm, "tpm": tpm, "max_concurrent": max_concurrent}
        for field, value in limits.items():
            if value is not None and not 0 <= value < 2**53:
                raise RequestError(f"{field}: must be 0 (no limit) or more")
        key_id, secret, salt = new_id(_PREFIX), secrets.token_hex(24), secrets.token_bytes(16)
        row = {"id": key_id, "name": name, "admin": admin, "salt": salt, "digest": _digest(secret, salt)}
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._open().write() as connection:
            connection.execute(api_keys.insert().values(**row, **limits, created_at=int(time.time())))
        return self._get(key_id), f"tl-{key_id.removeprefix(_PREFIX)}-{secret}"

    def list(self) -> list[StoredKey]:
        """All keys in the order of their making, revoked ones included."""
        if not self._exists():
            return []
        with self._open().read() as connection:
            rows = connection.execute(select(api_keys).order_by(api_keys.c.seq)).all()
        return [_record(row) for row in rows]

    def revoke(self, key_id: str) -> StoredKey:
        """Take a key's rights away; running servers know it within seconds. Raises NotFoundError."""
        if self._exists() and is_id(key_id):
            with self._open().write() as connection:
                mine = (api_keys.c.id == key_id) & api_keys.c.revoked_at.is_(None)
                connection.execute(update(api_keys).where(mine).values(revoked_at=int(time.time())))
        return self._get(key_id)

    def state(self) -> tuple[int, int]:
        """How many keys there are and how many are revoked: it changes whenever a key is made or revoked."""
        if not self._exists():
            return 0, 0
        with self._open().read() as connection:
            found = connection.execute(select(func.count(), func.count(api_keys.c.revoked_at))).one()
        return int(found[0]), int(found[1])

    def _get(self, key_id: str) -> StoredKey:
        row = None
        if self._exists() and is_id(key_id):
            with self._open().read() as connection:
                row = connection.execute(select(api_keys).where(api_keys.c.id == key_id)).one_or_none()
        if row is None:
            raise NotFoundError("key", key_id)
        return _record(row)

    def _exists(self) -> bool:
        return self._path is None or self._path.exists()

    def _open(self) -> Database:
        if self._database is None:
            self._database = Database(self._url)
        return self._database


def parse_key(key: str) -> tuple[str, str] | None:
    """The id and the secret of a key; None if it has not the form of one of ours."""
    match = _TOKEN.fullmatch(key)
    return None if match is None else (_PREFIX + match[1], match[2])


def _digest(secret: str, salt: bytes) -> bytes:
    return hashlib.blake2b(secret.encode(), digest_size=32, salt=salt, person=b"tokenloom-key").digest()


def _record(row: Row[Any]) -> StoredKey:
    return StoredKey(
        id=row.id,
        name=row.name,
        admin=row.admin,
        rpm=row.rpm,
        tpm=row.tpm,
        max_concurrent=row.max_concurrent,
        created_at=row.created_at,
        revoked_at=row.revoked_at,
        salt=bytes(row.salt),
        digest=bytes(row.digest),
    )
