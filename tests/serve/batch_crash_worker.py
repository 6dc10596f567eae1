"""A process that answers batches until it is killed, and writes down what it asked and what it kept."""

from __future__ import annotations

import asyncio
import json
import os
import random
from pathlib import Path
from typing import Any

from tokenloom.config import BatchSettings, load_settings
from tokenloom.finetune.store import Store
from tokenloom.serve.batches.accounts import Accounts
from tokenloom.serve.batches.asking import Asker
from tokenloom.serve.batches.inner_app import Reply
from tokenloom.serve.batches.runner import BatchRunner
from tokenloom.serve.batches.store import BatchStore
from tokenloom.serve.key_limits import Meter, Meters
from tokenloom.serve.key_ring import KeyRing


class NotedStore(BatchStore):
    """Notes answers once they are said to be kept."""

    note: Any
    kept = False

    def record(self, batch_id: str, answers: Any) -> None:
        super().record(batch_id, answers)
        for answer in answers:
            self.kept = True
            self.note(kept=json.loads(answer.text)["custom_id"], answer=answer.text)


def work(home: str, notes: str, seed: int, waits: bool) -> None:
    """Run the batches of a home; every asked and every kept line becomes a line of `notes`.

    Args:
        waits: once a line is kept no other one is answered.
    """
    descriptor = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(**what: Any) -> None:
        os.write(descriptor, (json.dumps(what) + "\n").encode())

    source = random.Random(seed)
    opened = Store(Path(home))
    store = NotedStore(opened.database, opened.files)
    store.note = note

    async def ask(endpoint: str, body: dict[str, Any], meter: Meter | None) -> Reply:
        note(asked=body["name"], account=meter.account.id if meter else None)
        await asyncio.sleep(3600 if waits and store.kept else source.uniform(0, 0.01))
        ok = body["name"][-1] != "7"
        return Reply(200 if ok else 400, "req_1", {"by": seed, "name": body["name"]})

    async def serve() -> None:
        accounts = Accounts(KeyRing(load_settings({"server.api_keys": ["one", "two"]})), Meters())
        asker = Asker(ask, accounts, lambda: True, 4)  # type: ignore[arg-type]
        runner = BatchRunner(store, asker, BatchSettings(max_concurrent=4))
        runner.start()
        while store.oldest("validating", "in_progress", "finalizing", "cancelling") is not None:
            await asyncio.sleep(0.005)
        note(over=True)
        await asyncio.sleep(3600)

    asyncio.run(serve())
