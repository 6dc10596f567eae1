"""For whom the store acts: whose things it makes, and whose it shows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from sqlalchemy import Column, ColumnElement


@dataclass(frozen=True)
class Principal:
    """Who asks.

    Attributes:
        account: what is made is recorded as this account's; None where nobody asks for an account.
        sees_all: whether things of others are there for it, too. What is not is as if it did not exist.
    """

    account: str | None
    sees_all: bool

    def only(self, owner: Column[str]) -> list[ColumnElement[bool]]:
        """The condition for rows that it may see; `owner` is the column that says whose they are."""
        return [] if self.sees_all else [owner == self.account]

    def own_key(self, key: str) -> str:
        """An idempotency key as it is kept: two accounts may choose the same."""
        if self.account is None:
            return key
        return hashlib.sha256(f"{self.account}:{key}".encode()).hexdigest()


OPERATOR = Principal(None, True)
"""The process itself, and whoever uses a server that asks for no key."""
