"""/v1/batches: create, list, retrieve, cancel."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from tokenloom.serve.batches.protocol import Batch, BatchList, CreateBatch, batch_object
from tokenloom.serve.batches.runner import BatchRunner
from tokenloom.serve.errors import ERROR_RESPONSES
from tokenloom.serve.store_route import IdempotencyKey, StoreRoute, Who


def batches_router(runner: BatchRunner) -> APIRouter:
    """The routes over the store of a runner, which is told of what changes."""
    router = APIRouter(prefix="/v1", tags=["batches"], responses=ERROR_RESPONSES, route_class=StoreRoute)
    store = runner.store

    @router.post("/batches")
    def create_batch(body: CreateBatch, who: Who, idempotency_key: IdempotencyKey = None) -> Batch:
        """Start a batch over an uploaded file. It is on disk when the answer comes; its lines are checked
        after that."""
        record = store.create(body, idempotency_key, who)
        runner.wake()
        return batch_object(record)

    @router.get("/batches")
    def list_batches(
        who: Who, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
    ) -> BatchList:
        """Batches, newest first."""
        found = store.list_batches(after=after, limit=limit, who=who)
        data = [batch_object(record) for record in found.data]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return BatchList(data=data, first_id=first, last_id=last, has_more=found.has_more)

    @router.get("/batches/{batch_id}")
    def get_batch(batch_id: str, who: Who) -> Batch:
        """One batch."""
        return batch_object(store.get(batch_id, who))

    @router.post("/batches/{batch_id}/cancel")
    def cancel_batch(batch_id: str, who: Who) -> Batch:
        """Stop a batch. What was answered by then goes to its output file."""
        record = store.move(store.get(batch_id, who).id, "cancelling")
        runner.wake()
        return batch_object(record)

    return router
