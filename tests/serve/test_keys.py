"""Keys of the database: kept as hashes, known to a running server, users' apart from operators'."""

import asyncio
import gc
import sqlite3
from types import FunctionType, ModuleType

import pytest

from running import assert_error, settings
from tokenloom.config import ConfigError
from tokenloom.errors import RequestError
from tokenloom.finetune.errors import NotFoundError
from tokenloom.serve import key_ring
from tokenloom.serve.key_ring import KeyRing
from tokenloom.serve.key_store import KeyStore

BODY = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An empty store, which servers look into at every request."""
    monkeypatch.setattr(key_ring, "REFRESH_S", 0.0)
    return KeyStore(tmp_path / "jobs.sqlite")


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def status(server, key, path="/v1/models"):
    return server.http.get(path, headers=bearer(key)).status_code


def unload(server, key):
    return server.http.post("/v1/unload_lora_adapter", json={"lora_name": "nobody"}, headers=bearer(key))


def test_a_key_opens_and_another_secret_does_not(serve, store):
    _, key = store.create()
    _, other = store.create()
    server = serve(store=store)
    assert status(server, key) == 200
    forged = key[:-48] + other[-48:]
    for wrong in (forged, key[:-1], key + "0", key.upper(), "tl-", "tl-" + "0" * 24 + "-" + "0" * 48):
        assert_error(server.http.get("/v1/models", headers=bearer(wrong)), 401, None, "invalid_api_key")


def test_nothing_of_a_secret_is_on_disk(store, tmp_path):
    _, key = store.create(name="laptop")
    store.close()
    secret = key.rpartition("-")[2]
    on_disk = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"laptop" in on_disk
    for found in (key, secret, secret[:16]):
        assert found.encode() not in on_disk
    assert bytes.fromhex(secret) not in on_disk


def test_equal_secrets_have_different_hashes(store, monkeypatch):
    monkeypatch.setattr("secrets.token_hex", lambda n: "ab" * n)
    monkeypatch.setattr("tokenloom.serve.key_store.new_id", lambda prefix: f"{prefix}{next(ids):024x}")
    ids = iter(range(2))
    (first, _), (second, _) = store.create(), store.create()
    assert first.digest != second.digest


def test_a_revoked_key_is_refused_by_a_running_server(serve, store):
    record, key = store.create()
    store.create()
    server = serve(store=store)
    assert status(server, key) == 200
    store.revoke(record.id)
    assert status(server, key) == 401


def test_the_database_is_not_asked_at_every_request(serve, store, monkeypatch):
    monkeypatch.setattr(key_ring, "REFRESH_S", 60)
    record, key = store.create()
    server = serve(store=store)
    assert status(server, key) == 200
    store.revoke(record.id)
    assert status(server, key) == 200


def test_the_first_key_closes_a_server_that_was_open(serve, store):
    server = serve(store=store)
    assert server.http.get("/v1/models").status_code == 200
    _, key = store.create()
    assert server.http.get("/v1/models").status_code == 401
    assert status(server, key) == 200


def test_revoking_the_last_key_opens_nothing(serve, store):
    record, _ = store.create()
    store.revoke(record.id)
    assert serve(store=store).http.get("/v1/models").status_code == 401


def test_revoking_names_keys_that_are_not_there(store):
    store.create()
    for name in ("key-" + "0" * 24, "key", "../x"):
        with pytest.raises(NotFoundError, match="no key has the id"):
            store.revoke(name)


def test_users_keys_do_not_open_the_operators_routes(serve, store):
    _, user = store.create()
    _, admin = store.create(admin=True)
    server = serve(store=store)
    assert_error(unload(server, user), 403, None, "admin_key_required")
    assert unload(server, admin).status_code == 404


def test_keys_of_the_settings_and_of_the_database_open_the_same_server(serve, store):
    _, user = store.create()
    server = serve(store=store, server__api_keys=["set"], server__admin_keys=["boss"])
    assert [status(server, key) for key in (user, "set", "boss", "none")] == [200, 200, 200, 401]
    assert unload(server, user).status_code == unload(server, "set").status_code == 403


def test_keys_of_any_characters_can_be_set(serve):
    server = serve(server__api_keys=["schlüssel"])
    assert status(server, "x") == 401
    authorization = "Bearer schlüssel".encode()
    assert server.http.get("/v1/models", headers={"authorization": authorization}).status_code == 200


def reachable(thing):
    """Whatever a thing refers to, by whichever way, but for code."""
    seen, todo = {}, [thing]
    while todo:
        thing = todo.pop()
        if id(thing) not in seen and not isinstance(thing, type | ModuleType | FunctionType):
            seen[id(thing)] = thing
            todo += gc.get_referents(thing)
    return seen.values()


def test_the_ring_holds_no_key_as_text():
    ring = KeyRing(settings(server__api_keys=["sesame-open"], server__admin_keys=["boss-key"]))
    held = [thing for thing in reachable(vars(ring)) if isinstance(thing, str | bytes)]
    assert "api-1" in held
    assert not [text for text in held if text in ("sesame-open", "boss-key", b"sesame-open", b"boss-key")]


def test_a_database_that_cannot_be_read_keeps_the_server_from_starting(tmp_path):
    (tmp_path / "jobs.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(ConfigError, match="API keys cannot be read"):
        KeyRing(settings(), KeyStore(tmp_path / "jobs.sqlite"))


def test_a_database_that_fails_later_leaves_the_known_keys(serve, store, monkeypatch):
    _, key = store.create()
    server = serve(store=store)

    def fail():
        raise OSError("gone")

    monkeypatch.setattr(store, "state", fail)
    assert status(server, key) == 200
    assert server.http.get("/v1/models").status_code == 401


def test_a_store_without_a_file_makes_none_by_looking(tmp_path):
    store = KeyStore(tmp_path / "jobs.sqlite")
    ring = KeyRing(settings(), store)
    asyncio.run(ring.refresh())
    assert (ring.asks, store.list(), list(tmp_path.iterdir())) == (False, [], [])


@pytest.mark.parametrize("limit", ["rpm", "tpm", "max_concurrent"])
def test_limits_below_zero_are_refused_by_name(store, limit):
    with pytest.raises(RequestError, match=f"^{limit}: must be 0"):
        store.create(**{limit: -1})


@pytest.mark.parametrize("name", ["x" * 129, "a\nb", "\x1b[2J"])
def test_names_are_short_and_printable(store, name):
    with pytest.raises(RequestError, match="name: must be"):
        store.create(name)


def test_keys_live_in_a_database_from_before_there_were_any(tmp_path):
    path = tmp_path / "jobs.sqlite"
    KeyStore(path).create()
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE api_keys")
    assert KeyStore(path).create()[0].id.startswith("key-")
