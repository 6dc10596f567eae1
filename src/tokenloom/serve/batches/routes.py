"""/v1/batches: create, list, retrieve, cancel."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request

from tokenloom.serve.batches.protocol import Batch, BatchList, CreateBatch, batch_object
from tokenloom.serve.batches.runner import BatchRunner
from tokenloom.serve.errors import ERROR_RESPONSES
from tokenloom.serve.key_ring import Account
from tokenloom.serve.store_route import IdempotencyKey, StoreRoute


def batches_router(runner: BatchRunner) -> APIRouter:
    """The routes over the store of a runner, which is told of what changes."""
    router = APIRouter(prefix="/v1", tags=["batches"], responses=ERROR_RESPONSES, route_class=StoreRoute)
    store = runner.store

    @router.post("/batches")
    def create_batch(body: CreateBatch, request: Request, idempotency_key: IdempotencyKey = None) -> Batch:
        """Start a batch over an uploaded file. It is on disk when the answer comes; its lines are checked
        after that."""
        account: Account | None = request.state.account
        record = store.create(body, idempotency_key, account.id if account else None)
        runner.wake()
        return batch_object(record)

    @router.get("/batches")
    def list_batches(after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> BatchList:
        """Batches, newest first."""
        found = store.list_batches(after=after, limit=limit)
        data = [batch_object(record) for record in found.data]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return BatchList(data=data, first_id=first, last_id=last, has_more=found.has_more)

    @router.get("/batches/{batch_id}")
    def get_batch(batch_id: str) -> Batch:
        """One batch."""
        return batch_object(store.get(batch_id))

    @router.post("/batches/{batch_id}/cancel")
    def cancel_batch(batch_id: str) -> Batch:
        """Stop a batch. What was answered by then goes to its output file."""
        record = store.move(batch_id, "cancelling")
        runner.wake()
        return batch_object(record)

    return router
