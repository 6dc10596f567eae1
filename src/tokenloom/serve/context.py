"""Around everything else: a request id, the request counter, and the last word when something breaks."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenloom.serve.errors import as_api_error

logger = logging.getLogger("tokenloom.serve")

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestContext:
    """Gives each request its id (the client's own `x-request-id` if it is sane) and sends it back.

    `count(method, route, status)` is called once an answer has begun; `route` is the route's template.
    """

    def __init__(self, app: ASGIApp, count: Callable[[str, str, int], None]) -> None:
        self.app = app
        self.count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        sent = Headers(scope=scope).get("x-request-id", "")
        request_id = sent if _SANE_ID.fullmatch(sent) else f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
                message = {**message, "headers": headers}
                self.count(_method(scope), _route(scope), status)
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:  # ours to explain: nothing of it may reach the client
            account = scope["state"].get("account")
            logger.exception("request %s of %s failed", request_id, account.id if account else "nobody known")
            if status:
                raise
            await as_api_error(error, request_id).response()(scope, receive, send_with_id)


# Clients must not be able to add label values: no other methods, and the template, not the path asked for.
def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in _METHODS else "other"


def _route(scope: Scope) -> str:
    return getattr(scope.get("route"), "path", "unmatched")
