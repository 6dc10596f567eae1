"""Keys, hosts, origins, concurrency and request ids."""

import http.client
import re
import threading

import pytest
from fastapi import APIRouter

from fake_engine import FakeEngine
from running import Running, assert_error, settings, wait_for
from tokenloom.config import ConfigError

BODY = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
OPEN = {"/health", "/ready"}


@pytest.fixture(scope="module")
def locked():
    """A server that asks for one of two keys."""
    running = Running(FakeEngine(settings(server__api_keys=["one", "two"])))
    yield running
    running.stop()


def all_routes(app):
    paths = app.openapi()["paths"]
    return [(method.upper(), path) for path, methods in paths.items() for method in methods]


def test_every_route_but_health_and_ready_needs_a_key(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path))
    later = APIRouter()

    @later.get("/v1/later")
    async def route() -> dict[str, bool]:
        return {"ok": True}

    server = serve(server__api_keys=["one", "two"], routers=[later], jobs=True, coserve__mode="off")
    routes = [
        *all_routes(server.app),
        ("GET", "/openapi.json"),
        ("GET", "/nowhere"),
        ("OPTIONS", "/v1/models"),
    ]
    assert {("GET", "/v1/later"), ("POST", "/v1/files"), ("POST", "/v1/load_lora_adapter")} <= set(routes)
    assert len(routes) > 25
    for method, path in routes:
        path = re.sub(r"\{\w+\}", "fake", path)
        response = server.http.request(method, path, json={} if method == "POST" else None)
        if path in OPEN:
            assert response.status_code == 200
        else:
            assert_error(response, 401, None, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", ["one", "two"])
def test_each_key_opens(locked, key):
    headers = {"authorization": f"Bearer {key}"}
    assert locked.http.post("/v1/chat/completions", json=BODY, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "value",
    ["Bearer", "Bearer on", "Bearer onee", "Basic one", "one", "Bearer ONE", b"Bearer \xff"],
)
def test_other_keys_do_not(locked, value):
    assert_error(locked.http.get("/v1/models", headers={"authorization": value}), 401, None)


@pytest.mark.parametrize("path", ["/health/", "/ready/x", "//health", "/health/../v1/models", "/HEALTH"])
def test_only_the_exact_open_paths_are_open(locked, path):
    connection = http.client.HTTPConnection("127.0.0.1", locked.port)
    connection.request("GET", path)
    assert connection.getresponse().status == 401
    connection.close()


def test_an_empty_key_is_no_setting():
    for kind in ("api_keys", "admin_keys"):
        with pytest.raises(ConfigError, match=kind):
            settings(**{f"server__{kind}": ["good", ""]})


def bearer(key):
    return {"authorization": f"Bearer {key}"} if key else {}


def unload(server, key):
    body = {"lora_name": "nobody"}
    return server.http.post("/v1/unload_lora_adapter", json=body, headers=bearer(key))


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
def test_adapters_are_for_holders_of_an_admin_key(serve, path):
    server = serve(server__api_keys=["user"], server__admin_keys=["admin"])
    body = {"lora_name": "a", "lora_path": "a"}
    refused = server.http.post(path, json=body, headers=bearer("user"))
    assert_error(refused, 403, None, "admin_key_required")
    for key in (None, "adm", "admin2"):
        assert_error(server.http.post(path, json=body, headers=bearer(key)), 401, None, "invalid_api_key")
    assert server.http.post(path, json=body, headers=bearer("admin")).status_code not in (401, 403)


def test_an_admin_key_opens_everything_else_too(serve):
    server = serve(server__api_keys=["user"], server__admin_keys=["admin"])
    assert server.http.get("/v1/models", headers=bearer("admin")).status_code == 200


def test_with_admin_keys_alone_only_the_admin_routes_ask_for_one(serve):
    server = serve(server__admin_keys=["admin"])
    assert server.http.get("/v1/models").status_code == 200
    response = unload(server, None)
    assert_error(response, 401, None, "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"
    assert unload(server, "admin").status_code == 404


def test_without_admin_keys_the_api_keys_are_enough(serve):
    assert unload(serve(server__api_keys=["user"]), "user").status_code == 404
    assert unload(serve(), None).status_code == 404


def test_without_keys_none_is_asked_for(shared):
    assert shared.http.get("/v1/models").status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "[::2]:80"])
def test_on_loopback_foreign_hosts_are_refused(shared, host):
    assert_error(shared.http.get("/v1/models", headers={"host": host}), 403, None, "host_not_allowed")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "[::1]"])
def test_on_loopback_its_own_names_are_taken(shared, host):
    assert shared.http.get("/v1/models", headers={"host": host}).status_code == 200


def test_a_configured_host_name_is_taken(serve):
    server = serve(server__allowed_hosts=["llm.example"])
    assert server.http.get("/v1/models", headers={"host": "llm.example"}).status_code == 200


def test_no_cross_origin_access_unless_configured(shared, serve):
    origin = {"origin": "https://app.example"}
    assert "access-control-allow-origin" not in shared.http.get("/v1/models", headers=origin).headers
    server = serve(server__cors_origins=["https://app.example"], server__api_keys=["one"])
    preflight = server.http.options(
        "/v1/chat/completions", headers={**origin, "access-control-request-method": "POST"}
    )
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    wanted = {"access-control-request-method": "POST", "access-control-request-headers": "idempotency-key"}
    assert server.http.options("/v1/files", headers={**origin, **wanted}).status_code == 200
    other = server.http.get("/v1/models", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


def test_one_request_too_many_is_told_to_come_back(serve):
    server = serve(step_s=0.5, limits__max_concurrent=1)
    first = threading.Thread(target=lambda: server.http.post("/v1/chat/completions", json=BODY))
    first.start()
    wait_for(lambda: server.engine.running == 1)
    response = server.http.get("/v1/models")
    assert_error(response, 429, None, "too_many_requests")
    assert response.headers["retry-after"] == "1"
    assert server.http.get("/health").status_code == server.http.get("/metrics").status_code == 200
    first.join()
    assert server.http.get("/v1/models").status_code == 200


@pytest.mark.parametrize("sent", ["abc-1.2_Z", "x" * 128])
def test_a_sane_request_id_comes_back(shared, sent):
    assert shared.http.get("/health", headers={"x-request-id": sent}).headers["x-request-id"] == sent


@pytest.mark.parametrize("sent", ["", "a b", "x" * 129, "a;b", "ä".encode()])
def test_another_is_replaced(shared, sent):
    received = shared.http.get("/health", headers={"x-request-id": sent}).headers["x-request-id"]
    assert received.startswith("req_")


def test_two_requests_may_share_an_id(serve):
    server = serve()
    for _ in range(2):
        response = server.http.post("/v1/chat/completions", json=BODY, headers={"x-request-id": "same"})
        assert response.status_code == 200
    assert len({call.request_id for call in server.engine.calls}) == 2
