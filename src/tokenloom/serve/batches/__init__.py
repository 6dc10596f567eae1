"""/v1/batches: files of requests, answered beside interactive ones and kept whatever happens."""

from __future__ import annotations

from collections.abc import Iterable

from fastapi import APIRouter

from tokenloom.engine.async_engine import AsyncEngine
from tokenloom.finetune.store import Store
from tokenloom.serve.batches.accounts import Accounts
from tokenloom.serve.batches.asking import Asker
from tokenloom.serve.batches.inner_app import InnerApp
from tokenloom.serve.batches.routes import batches_router
from tokenloom.serve.batches.runner import BatchRunner
from tokenloom.serve.batches.store import BatchStore
from tokenloom.serve.key_limits import Meters
from tokenloom.serve.key_ring import KeyRing

__all__ = ["batches_router", "open_batches"]


def open_batches(
    engine: AsyncEngine, store: Store, routers: Iterable[APIRouter], keys: KeyRing, meters: Meters
) -> BatchRunner:
    """The batches of a store, whose lines are answered by `routers` while no other request waits, within the
    limits of the keys that made them."""

    def free() -> bool:
        return engine.ready and engine.stats().waiting == 0

    batches = BatchStore(store.database, store.files)
    settings = engine.settings.batches
    asker = Asker(InnerApp(routers).ask, Accounts(keys, meters), free, settings.max_concurrent)
    return BatchRunner(batches, asker, settings)
