"""GET / and its files: the dashboard, from memory.

The files are known when the module is imported, and a request names one of them or nothing: no path from
outside is ever joined to a folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response

_FOLDER = Path(__file__).parent / "dashboard"
_PREFIX = "/dashboard"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}

# Nothing but the server's own files runs or loads; no inline script or style, no frame around the page.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Kept, and asked after: a newer server's page must not run an older one's code.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> _File:
        content = path.read_bytes()
        return cls(content, _TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def _read_all() -> dict[str, _File]:
    found = {
        f"{_PREFIX}/{path.relative_to(_FOLDER).as_posix()}": _File.read(path)
        for path in sorted(_FOLDER.rglob("*"))
        if path.suffix in _TYPES
    }
    found["/"] = found.pop(f"{_PREFIX}/index.html")
    return found


_FILES = _read_all()
PAGE_PATHS = tuple(_FILES)
"""Where the page and its files are. They tell nothing of this server, so that no key is needed for them."""


def static_router() -> APIRouter:
    """GET and HEAD of the page and its files."""
    router = APIRouter(include_in_schema=False)

    for path, file in _FILES.items():
        router.add_api_route(path, _sender(file), methods=["GET", "HEAD"], name="dashboard")
    return router


def _sender(file: _File) -> Callable[[Request], Awaitable[Response]]:
    async def send(request: Request) -> Response:
        headers = {**_HEADERS, "ETag": file.etag}
        if _matches(request.headers.get("if-none-match", ""), file.etag):
            return Response(status_code=304, headers=headers)
        return Response(file.content, media_type=file.media_type, headers=headers)

    return send


def _matches(condition: str, etag: str) -> bool:
    """Whether an If-None-Match header names the tag; weak comparison, as RFC 9110 wants it."""
    return any(tag.strip().removeprefix("W/") in (etag, "*") for tag in condition.split(","))
