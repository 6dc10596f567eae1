"""/v1/files: upload, list, get, content, delete."""

from __future__ import annotations

import asyncio
import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse

from tokenloom.errors import TokenloomError
from tokenloom.finetune.blobs import Blob
from tokenloom.finetune.errors import NotFoundError
from tokenloom.finetune.file_store import UPLOAD_PURPOSES
from tokenloom.finetune.principal import Principal
from tokenloom.finetune.records import FileRecord
from tokenloom.finetune.service import JobService
from tokenloom.serve.errors import ERROR_RESPONSES, ApiError
from tokenloom.serve.jobs_protocol import FileDeleted, FileList, FileObject, file_object
from tokenloom.serve.multipart import Form, discard, read_form
from tokenloom.serve.store_route import IdempotencyKey, StoreRoute, Who

# FastAPI would collect the form before the route runs, so its shape is declared by hand.
_FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": list(UPLOAD_PURPOSES)},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
    },
}
_BYTES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
}
_UPLOAD = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}


def files_router(service: JobService) -> APIRouter:
    """Files of the fine-tuning service."""
    router = APIRouter(prefix="/v1", tags=["files"], responses=ERROR_RESPONSES, route_class=StoreRoute)
    files = service.files

    @router.post("/files", openapi_extra=_UPLOAD)
    async def create_file(request: Request, who: Who, idempotency_key: IdempotencyKey = None) -> FileObject:
        """Upload a file; it is on disk, whole, when the answer comes."""
        body = request.stream()
        blob = await asyncio.to_thread(files.begin)
        try:
            form = await read_form(request.headers.get("content-type", ""), body, "file", blob.write)
            record = await asyncio.to_thread(_add, blob, form, idempotency_key, who)
        except (ApiError, TokenloomError):
            await discard(body, files.max_file_bytes)
            raise
        finally:
            await asyncio.to_thread(blob.discard)
        return file_object(record)

    def _add(blob: Blob, form: Form, key: str | None, who: Principal) -> FileRecord:
        if form.filename is None:
            raise ApiError(400, "file: is required", param="file")
        if "purpose" not in form.fields:
            raise ApiError(400, "purpose: is required", param="purpose")
        return files.add(blob, form.filename, form.fields["purpose"], _expiry(form.fields), key, who)

    @router.get("/files")
    def list_files(
        who: Who,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> FileList:
        """Files by time of creation."""
        newest_first = order == "desc"
        found = files.list_files(
            after=after, limit=limit, newest_first=newest_first, purpose=purpose, who=who
        )
        data = [file_object(record) for record in found.data]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return FileList(data=data, first_id=first, last_id=last, has_more=found.has_more)

    @router.get("/files/{file_id}")
    def get_file(file_id: str, who: Who) -> FileObject:
        """One file's description."""
        return file_object(files.get(file_id, who=who))

    @router.get("/files/{file_id}/content", response_class=FileResponse, responses=_BYTES)
    def get_content(file_id: str, who: Who) -> FileResponse:
        """The bytes of a file, as they were uploaded."""
        record = files.get(file_id, who=who)
        if not record.path.is_file():
            raise NotFoundError("file", file_id)
        return FileResponse(
            record.path,
            filename=record.filename,
            media_type="application/octet-stream",
            headers={"X-Content-Type-Options": "nosniff"},
        )

    @router.delete("/files/{file_id}")
    def delete_file(file_id: str, who: Who) -> FileDeleted:
        """Delete a file, unless a job that is not over needs it."""
        files.delete(file_id, who)
        return FileDeleted(id=file_id)

    return router


def _expiry(fields: dict[str, str]) -> int | None:
    """Seconds of `expires_after`, whose two keys come as fields of their own."""
    anchor, seconds = (fields.get(f"expires_after[{key}]") for key in ("anchor", "seconds"))
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise ApiError(400, "expires_after.anchor: must be created_at", param="expires_after.anchor")
    if seconds is None or not re.fullmatch(r"[0-9]{1,9}", seconds):
        raise ApiError(400, "expires_after.seconds: must be an integer", param="expires_after.seconds")
    return int(seconds)
