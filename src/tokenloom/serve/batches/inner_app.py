"""The server's own routes without what stands before them: how a batch asks for its lines.

A line is checked, answered and refused exactly as the same request over HTTP, and counted as one of the key
that made its batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from fastapi import APIRouter, FastAPI

from tokenloom.serve.batches.records import Endpoint
from tokenloom.serve.context import RequestContext
from tokenloom.serve.errors import ApiError, install_error_handlers
from tokenloom.serve.key_limits import Meter, metered


@dataclass(frozen=True)
class Reply:
    """An answer of a route. With 429 and 503 it may say when to come again."""

    status: int
    request_id: str
    body: Any
    retry_after_s: float = 0.0


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

    async def ask(self, endpoint: Endpoint, body: dict[str, Any], meter: Meter | None) -> Reply:
        """The answer to one request of a key, or of nobody's. Cancelling this aborts the request."""
        if meter is None:
            return await self._post(endpoint, body)
        try:
            meter.admit_line()
        except ApiError as error:
            return Reply(error.status_code, "", error.body(), _retry_after_s(error.headers))
        with metered(meter):
            return await self._post(endpoint, body)

    async def _post(self, endpoint: Endpoint, body: dict[str, Any]) -> Reply:
        response = await self._client.post(endpoint, json=body)
        headers = response.headers
        return Reply(response.status_code, headers["x-request-id"], response.json(), _retry_after_s(headers))


def _retry_after_s(headers: Mapping[str, str] | None) -> float:
    return float((headers or {}).get("Retry-After", 0))
