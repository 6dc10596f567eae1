"""What stands before the routes: Host check, API keys (and `key_limits`), concurrency, body size."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenloom.config import Settings
from tokenloom.serve.errors import ApiError
from tokenloom.serve.key_ring import Account, KeyRing
from tokenloom.serve.request_record import note_error, note_key
from tokenloom.serve.static import PAGE_PATHS

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OPEN_PATHS = ("/health", "/ready", *PAGE_PATHS)
UNCOUNTED_PATHS = (*OPEN_PATHS, "/metrics", "/live")  # the last has a limit of its own
UPLOADS = ("POST", "/v1/files")
"""Has a limit of its own, `jobs.max_file_bytes`, while it reads."""


class HostCheck:
    """On loopback, refuses foreign Host names: a web page must not reach us by rebinding its DNS name."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        server = settings.server
        self.hosts = {name.lower() for name in (*LOOPBACK, server.host, *server.allowed_hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            name = _host_name(Headers(scope=scope).get("host", ""))
            if name not in self.hosts:
                error = ApiError(403, f"host: {name!r} is not a name of this server", code="host_not_allowed")
                return await refuse(error, scope, receive, send)
        await self.app(scope, receive, send)


class KeyCheck:
    """Every route but `OPEN_PATHS` needs a key where there are keys, whether or not the route exists.

    Whose key it is stands in `request.state.account`; None on a server that asks for none.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_open = scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in OPEN_PATHS)
        if not is_open:
            await self.keys.refresh()
            authorization = Headers(scope=scope).get("authorization", "")
            account = self.keys.find(authorization)
            if account is None and self.keys.asks:
                return await refuse(_unauthorized(authorization, "API"), scope, receive, send)
            scope.setdefault("state", {})["account"] = account
            if account is not None:
                note_key(account.id)
        await self.app(scope, receive, send)


class AdminCheck:
    """A dependency of routes for operators: it lets admin keys in, and everybody where no key is asked for
    and the settings have no admin key."""

    def __init__(self, settings: Settings) -> None:
        self.asks = bool(settings.server.admin_keys)

    def __call__(self, request: Request) -> None:
        account: Account | None = request.state.account
        if account is None and self.asks:
            raise _unauthorized(request.headers.get("authorization", ""), "admin")
        if account is not None and not account.admin:
            raise ApiError(403, "this route needs an admin key", code="admin_key_required")


def _unauthorized(authorization: str, kind: str) -> ApiError:
    token = authorization.partition(" ")[2]
    problem = "is not valid" if token else "is missing; send Authorization: Bearer KEY"
    return ApiError(
        401, f"the {kind} key {problem}", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
    )


class ConcurrencyLimit:
    """At most `limits.max_concurrent` requests at work; one more gets 429."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.limit = settings.limits.max_concurrent
        self.at_work = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in UNCOUNTED_PATHS:
            return await self.app(scope, receive, send)
        if self.at_work >= self.limit:
            error = ApiError(
                429,
                f"{self.limit} requests are at work, which is the most this server takes",
                code="too_many_requests",
                headers={"Retry-After": "1"},
            )
            return await refuse(error, scope, receive, send)
        self.at_work += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.at_work -= 1


class BodyLimit:
    """Refuses bodies over `limits.max_body_bytes`: by Content-Length, or else while they come in."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.limit = settings.limits.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["method"], scope["path"]) == UPLOADS:
            return await self.app(scope, receive, send)
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length) > self.limit:
            return await refuse(self._too_large(), scope, receive, send)
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:
                raise self._too_large()
            return message

        await self.app(scope, counted, send)

    def _too_large(self) -> ApiError:
        # The rest of the body is not read, so the connection cannot serve another request.
        return ApiError(
            413,
            f"the request body is over {self.limit} bytes",
            code="request_too_large",
            headers={"Connection": "close"},
        )


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer without asking the application."""
    if scope["type"] == "websocket":
        return await send({"type": "websocket.close", "code": 1008})
    note_error(error.code)
    await error.response()(scope, receive, send)


def _host_name(header: str) -> str:
    """The name in a Host header, without port and IPv6 brackets."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()
