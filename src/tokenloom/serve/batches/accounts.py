"""Who has made a batch, as things are when its next line is to be asked."""

from __future__ import annotations

from tokenloom.serve.key_limits import Meter, Meters
from tokenloom.serve.key_ring import KeyRing


class KeyGoneError(Exception):
    """The key that made a batch is not valid any more."""


class Accounts:
    """The keys of a server, found by their ids."""

    def __init__(self, keys: KeyRing, meters: Meters) -> None:
        self._keys = keys
        self._meters = meters

    async def meter(self, account: str | None) -> Meter | None:
        """What counts for an account; None for batches that no key made. Raises KeyGoneError."""
        if account is None:
            return None
        await self._keys.refresh()
        found = self._keys.account(account)
        if found is None:
            raise KeyGoneError(account)
        return self._meters.of(found)
