"""Who a request is from: the keys of the settings and those of the database, as accounts."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pydantic import SecretStr
from sqlalchemy.exc import SQLAlchemyError

from tokenloom.config import ConfigError, LimitSettings, Settings, home
from tokenloom.finetune.errors import StoreError
from tokenloom.finetune.store import DATABASE_FILE
from tokenloom.serve.key_store import KeyStore, StoredKey, parse_key

logger = logging.getLogger("tokenloom.serve")

REFRESH_S = 1.0
"""A key that is made or revoked while the server runs is known after this long."""


@dataclass(frozen=True)
class Account:
    """Who has a key. `id` may be logged; of the limits, 0 is none.

    `cache_salt` parts its cached prefixes from those of others; empty: they are shared.
    """

    id: str
    admin: bool
    rpm: int
    tpm: int
    max_concurrent: int
    cache_salt: str


class KeyRing:
    """Finds the account of a key. The settings' keys are held as digests, under a key of this process.

    Args:
        store: keys of the database, looked at again after `REFRESH_S`; None for none.

    Raises:
        ConfigError: the database cannot be read. A server that cannot know its keys does not start.
    """

    def __init__(self, settings: Settings, store: KeyStore | None = None) -> None:
        server = settings.server
        self._limits = settings.limits
        self._cache_per_key = server.cache_per_key
        self._secret = secrets.token_bytes(32)
        # Without admin keys in the settings, their other keys open everything: they are one operator's.
        self._configured = {
            **self._accounts("api", server.api_keys, admin=not server.admin_keys),
            **self._accounts("admin", server.admin_keys, admin=True),
        }
        self._asks = bool(server.api_keys)
        self._store = store
        self._stored: dict[str, tuple[StoredKey, Account]] = {}
        self._state = (0, 0)
        self._fresh_until = 0.0
        self._refreshing = asyncio.Lock()
        # A thread of its own: nobody may be kept out because others wait for a slow template or a disk.
        self._thread = ThreadPoolExecutor(1, "tokenloom-keys")
        try:
            self._read()
        except (SQLAlchemyError, StoreError, OSError) as error:
            raise ConfigError(f"the database that may hold API keys cannot be read: {error}") from error

    @property
    def asks(self) -> bool:
        """Whether requests need a key: there is one for users in the settings, or any in the database, be it
        revoked."""
        return self._asks or self._state[0] > 0

    async def refresh(self) -> None:
        """Look into the database if that was long ago. If it cannot be read, what is known goes on."""
        if self._store is None or time.monotonic() < self._fresh_until:
            return
        async with self._refreshing:
            if time.monotonic() < self._fresh_until:
                return
            try:
                await asyncio.get_running_loop().run_in_executor(self._thread, self._read)
            except (SQLAlchemyError, StoreError, OSError):
                logger.exception("API keys cannot be read; those known so far go on")
            self._fresh_until = time.monotonic() + REFRESH_S

    def find(self, authorization: str) -> Account | None:
        """The account that an Authorization header names."""
        scheme, _, key = authorization.partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            return None
        # Looking up a keyed digest takes a time that tells nothing about the keys.
        account = self._configured.get(self._digest(key.encode("latin-1")))
        parsed = parse_key(key)
        if account is None and parsed is not None and parsed[0] in self._stored:
            stored, owner = self._stored[parsed[0]]
            account = owner if stored.fits(parsed[1]) else None
        return account

    def account(self, account_id: str) -> Account | None:
        """The account with that id; None once its key is not valid any more."""
        if account_id in self._stored:
            return self._stored[account_id][1]
        return next((found for found in self._configured.values() if found.id == account_id), None)

    def close(self) -> None:
        self._thread.shutdown()
        if self._store is not None:
            self._store.close()

    def _read(self) -> None:
        if self._store is None:
            return
        state = self._store.state()
        if state != self._state:
            alive = [key for key in self._store.list() if key.revoked_at is None]
            self._stored = {key.id: (key, self._account(key)) for key in alive}
            self._state = state
            logger.info("%d API keys of the database are valid, %d are revoked", len(alive), state[1])

    def _account(self, key: StoredKey) -> Account:
        # The server's limits are for users: an operator's key has those that it was given.
        usual = LimitSettings(key_rpm=0, key_tpm=0, key_max_concurrent=0) if key.admin else self._limits
        return Account(
            key.id,
            key.admin,
            usual.key_rpm if key.rpm is None else key.rpm,
            usual.key_tpm if key.tpm is None else key.tpm,
            usual.key_max_concurrent if key.max_concurrent is None else key.max_concurrent,
            self._salt(key.id),
        )

    def _accounts(self, kind: str, keys: Iterable[SecretStr], *, admin: bool) -> dict[bytes, Account]:
        limits = self._limits if kind == "api" else LimitSettings()
        return {
            self._digest(key.get_secret_value().encode()): Account(
                f"{kind}-{number}",
                admin,
                limits.key_rpm,
                limits.key_tpm,
                limits.key_max_concurrent,
                self._salt(f"{kind}-{number}"),
            )
            for number, key in enumerate(keys, start=1)
        }

    def _salt(self, account: str) -> str:
        # Nobody can send it as their own `cache_salt`, since they do not know this process's secret.
        return self._digest(f"salt of {account}".encode()).hex() if self._cache_per_key else ""

    def _digest(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, digest_size=32, key=self._secret).digest()


def open_key_store(settings: Settings) -> KeyStore:
    """The keys beside this home folder's files and jobs."""
    return KeyStore(settings.jobs.database_url or home() / DATABASE_FILE)
