"""Every route of the application is closed unless it is meant to be open, those of later days included."""

import re

import pytest
from fastapi import APIRouter
from starlette.routing import Mount, Route

from running import settings
from tokenloom.serve.key_store import KeyStore
from tokenloom.serve.security import OPEN_PATHS

OPERATORS = re.compile(r"/debug(/.*)?|/v1/(un)?load_lora_adapter")
"""Routes that only an admin key opens. Whatever else lies below /debug belongs to them."""
DATA = re.compile(r"/(v1|metrics|live|debug|tokenize|detokenize|openapi)\b.*")
"""What an open path may never be."""


@pytest.fixture
def server(serve, tmp_path, monkeypatch):
    """One with all routes, a user's key and an admin's, which `server.keys` are."""
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path))
    store = KeyStore(tmp_path / "jobs.sqlite")
    keys = store.create()[1], store.create(admin=True)[1]
    later = APIRouter()
    later.add_api_route("/v1/later", lambda: {"ok": True})
    running = serve(store=store, jobs=True, coserve__mode="off", routers=[later])
    running.keys = keys
    return running


def routes(app, prefix=""):
    """Method and path of each route; of a mount, a path in it."""
    for route in app.routes:
        if hasattr(route, "original_router"):  # FastAPI's own, for an included router
            yield from routes(route.original_router, prefix + route.include_context.prefix)
        elif isinstance(route, Route):
            yield from ((method, prefix + route.path) for method in sorted(route.methods or {"GET"}))
        else:
            assert isinstance(route, Mount), f"what is {route!r}, and who may use it?"
            yield "GET", f"{prefix}{route.path}/x"


def ask(server, method, path, key=None):
    headers = {"authorization": f"Bearer {key}"} if key else {}
    path = re.sub(r"\{[^}]+\}", "x", path)
    body = {"lora_name": "x", "lora_path": "x"} if method == "POST" else None
    return server.http.request(method, path, json=body, headers=headers)


def test_without_a_key_every_route_but_the_open_ones_is_a_401(server):
    found = {*routes(server.app), ("GET", "/nowhere"), ("OPTIONS", "/v1/models"), ("POST", "/")}
    assert {("GET", "/v1/later"), ("POST", "/v1/files"), ("GET", "/openapi.json")} <= found
    assert len(found) > 30
    for method, path in sorted(found):
        if path not in OPEN_PATHS:
            assert ask(server, method, path).status_code == 401, (method, path)


def test_a_users_key_does_not_open_the_operators_routes(server):
    user, admin = server.keys
    found = [route for route in routes(server.app) if OPERATORS.fullmatch(route[1])]
    assert ("POST", "/v1/load_lora_adapter") in found
    for method, path in found:
        assert ask(server, method, path, user).status_code == 403, (method, path)
        assert ask(server, method, path, admin).status_code not in (401, 403), (method, path)


def test_only_health_and_files_of_the_page_are_open(server):
    assert {"/health", "/ready"} <= set(OPEN_PATHS)
    for path in OPEN_PATHS:
        assert not DATA.fullmatch(path), f"{path} is open, and tells something"


def test_the_document_of_the_api_needs_a_key_too(server):
    assert ask(server, "GET", "/openapi.json").status_code == 401
    assert ask(server, "GET", "/openapi.json", server.keys[0]).status_code == 200


def test_by_default_a_server_listens_on_loopback_and_asks_for_no_key():
    server = settings().server
    assert (server.host, server.api_keys, server.cors_origins, server.cache_per_key) == (
        "127.0.0.1",
        [],
        [],
        True,
    )
