"""The server's own routes without what stands before them: how a batch asks for its lines.

A line is checked, answered and refused exactly as the same request over HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import httpx
from fastapi import APIRouter, FastAPI

from tokenloom.serve.batches.records import Endpoint
from tokenloom.serve.context import RequestContext
from tokenloom.serve.errors import install_error_handlers


@dataclass(frozen=True)
class Reply:
    """An answer of a route."""

    status: int
    request_id: str
    body: Any


class InnerApp:
    """Routers that answer in this process."""

    def __init__(self, routers: Iterable[APIRouter]) -> None:
        app = FastAPI(openapi_url=None, redirect_slashes=False)
        install_error_handlers(app)
        for router in routers:
            app.include_router(router)
        # Lines are no HTTP requests: they are neither counted nor logged as such.
        app.add_middleware(RequestContext, count=lambda method, route, status: None, done=lambda record: None)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://batch", timeout=None)

    async def ask(self, endpoint: Endpoint, body: dict[str, Any]) -> Reply:
        """The answer to one request. Cancelling this aborts the request."""
        response = await self._client.post(endpoint, json=body)
        return Reply(response.status_code, response.headers["x-request-id"], response.json())
