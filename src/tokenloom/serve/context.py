"""Around everything else: a request id, the request counter, the record that logs and traces are made of, and
the last word when something breaks."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenloom.logs import bound, fields
from tokenloom.serve.errors import as_api_error
from tokenloom.serve.request_record import RequestRecord, enter, leave
from tokenloom.serve.security import UNCOUNTED_PATHS
from tokenloom.serve.tracing import Tracing

logger = logging.getLogger("tokenloom.serve")

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestContext:
    """Gives each request its id (the client's own `x-request-id` if it is sane) and sends it back.

    Args:
        count: called with (method, route, status) once an answer has begun; `route` is the route's template.
        done: called with each request's record when it is over.
        tracing: where spans begin and end; None without traces.
    """

    def __init__(
        self,
        app: ASGIApp,
        count: Callable[[str, str, int], None],
        done: Callable[[RequestRecord], None],
        tracing: Tracing | None = None,
    ) -> None:
        self.app = app
        self.count = count
        self.done = done
        self.tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        sent = headers.get("x-request-id", "")
        request_id = sent if _SANE_ID.fullmatch(sent) else f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id
        record = RequestRecord(request_id, _method(scope))
        shown = {"request_id": request_id}
        if self.tracing is not None and scope["path"] not in UNCOUNTED_PATHS:
            shown["trace_id"] = self.tracing.begin(record, headers)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
                message = {**message, "headers": headers}
                self.count(record.method, _route(scope), record.status)
            await send(message)

        entered, line = enter(record), bound.set(shown)
        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:  # ours to explain: nothing of it may reach the client
            logger.exception("the request failed", extra=fields(key=record.key))
            if record.status:
                raise
            await as_api_error(error, request_id).response()(scope, receive, send_with_id)
        finally:
            record.route, record.ended_s = _route(scope), time.monotonic()
            self.done(record)
            if self.tracing is not None and record.span is not None:
                self.tracing.end(record)
            bound.reset(line)
            leave(entered)


# Clients must not be able to add label values: no other methods, and the template, not the path asked for.
def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in _METHODS else "other"


def _route(scope: Scope) -> str:
    return getattr(scope.get("route"), "path", "unmatched")
