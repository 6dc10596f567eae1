"""/v1/fine_tuning/jobs: create, list, retrieve, cancel, pause, resume, events, checkpoints."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request

from tokenloom.errors import RequestError
from tokenloom.finetune.job_request import CreateJob
from tokenloom.finetune.service import JobService
from tokenloom.serve.errors import ERROR_RESPONSES
from tokenloom.serve.jobs_protocol import (
    CheckpointList,
    EventList,
    Job,
    JobList,
    checkpoint_object,
    event_object,
    job_object,
)
from tokenloom.serve.store_route import IdempotencyKey, StoreRoute, Who

Limit = Annotated[int, Query(ge=1, le=1000)]


def fine_tuning_router(service: JobService, closed: str = "") -> APIRouter:
    """Jobs of the fine-tuning service.

    Args:
        closed: why no new job is taken; empty if they are.
    """
    router = APIRouter(
        prefix="/v1/fine_tuning", tags=["fine-tuning"], responses=ERROR_RESPONSES, route_class=StoreRoute
    )
    store = service.store

    @router.post("/jobs")
    def create_job(body: CreateJob, who: Who, idempotency_key: IdempotencyKey = None) -> Job:
        """Start a job. It is on disk when the answer comes; its files are checked after that."""
        if closed:
            raise RequestError(closed, code="training_off")
        return job_object(service.create_job(body, idempotency_key, who))

    @router.get("/jobs")
    def list_jobs(request: Request, who: Who, after: str | None = None, limit: Limit = 20) -> JobList:
        """Jobs, newest first. `metadata[key]=value` asks for a pair, `metadata=null` for jobs without any."""
        pairs, none = _metadata(request)
        found = store.jobs.list_jobs(after=after, limit=limit, metadata=pairs, no_metadata=none, who=who)
        return JobList(data=[job_object(record) for record in found.data], has_more=found.has_more)

    @router.get("/jobs/{job_id}")
    def get_job(job_id: str, who: Who) -> Job:
        """One job."""
        return job_object(store.jobs.get(job_id, who))

    def own(job_id: str, who: Who) -> str:
        """The id of a job that is there for whoever asks; whose it is never changes."""
        return store.jobs.get(job_id, who).id

    @router.post("/jobs/{job_id}/cancel")
    def cancel_job(job_id: str = Depends(own)) -> Job:
        """End a job that is not over; it leaves its checkpoints."""
        return job_object(service.cancel(job_id))

    @router.post("/jobs/{job_id}/pause")
    def pause_job(job_id: str = Depends(own)) -> Job:
        """Stop a queued or running job so that it can be resumed."""
        return job_object(service.pause(job_id))

    @router.post("/jobs/{job_id}/resume")
    def resume_job(job_id: str = Depends(own)) -> Job:
        """Put a paused job back into the queue; it goes on from its last checkpoint."""
        return job_object(service.resume(job_id))

    @router.get("/jobs/{job_id}/events")
    def list_events(job_id: str = Depends(own), after: str | None = None, limit: Limit = 20) -> EventList:
        """What happened in a job, newest first."""
        found = store.log.list_events(job_id, after=after, limit=limit)
        return EventList(data=[event_object(record) for record in found.data], has_more=found.has_more)

    @router.get("/jobs/{job_id}/checkpoints")
    def list_checkpoints(
        job_id: str = Depends(own), after: str | None = None, limit: Limit = 10
    ) -> CheckpointList:
        """Checkpoints of a job, newest first."""
        found = store.log.list_checkpoints(job_id, after=after, limit=limit)
        data = [checkpoint_object(record) for record in found.data]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return CheckpointList(data=data, first_id=first, last_id=last, has_more=found.has_more)

    return router


def _metadata(request: Request) -> tuple[dict[str, str], bool]:
    """The pairs that a listing asks for, and whether it asks for jobs without any."""
    pairs = {}
    for name, value in request.query_params.multi_items():
        key = re.fullmatch(r"metadata\[(.+)\]", name)
        if key:
            pairs[key[1]] = value
    return pairs, request.query_params.get("metadata") in ("null", "")
