"""Limits of a key: what is counted, what is refused and for how long, and that others are left alone."""

import json
import threading

import pytest

from fake_engine import FakeEngine
from running import Running, assert_error, events, settings, wait_for
from tokenloom.engine.async_engine import AsyncEngine
from tokenloom.engine.engine import Engine
from tokenloom.serve.errors import ApiError
from tokenloom.serve.key_limits import Bucket, Meter
from tokenloom.serve.key_ring import Account, KeyRing
from tokenloom.serve.key_store import KeyStore

URL = "/v1/chat/completions"
BODY = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 10}


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def meter(**limits):
    clock = Clock()
    account = Account("key-1", False, **{"rpm": 0, "tpm": 0, "max_concurrent": 0, "cache_salt": ""} | limits)
    return Meter(account, clock), clock


def refused(act, *arguments):
    with pytest.raises(ApiError) as error:
        act(*arguments)
    assert (error.value.status_code, error.value.code) == (429, "rate_limit_exceeded")
    return error.value


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def chat(server, key, **fields):
    return server.http.post(URL, json={**BODY, **fields}, headers=bearer(key))


def test_a_bucket_refills_evenly_and_never_beyond_its_size():
    clock = Clock()
    bucket = Bucket(60, clock)
    bucket.take(90)
    assert bucket.level() == -30
    assert bucket.seconds_until(1) == 31
    clock.now = 31
    assert bucket.level() == 1
    clock.now = 1000
    assert bucket.level() == 60


def test_requests_of_a_minute_and_then_one_each_time_one_is_refilled():
    limited, clock = meter(rpm=2)
    limited.admit()
    limited.admit()
    error = refused(limited.admit)
    assert "2 requests per minute; try again in 30s" in error.detail
    assert error.headers == {"Retry-After": "30"}
    clock.now = 30
    limited.admit()
    refused(limited.admit)


def test_what_was_taken_beyond_the_tokens_is_waited_for():
    limited, clock = meter(tpm=60)
    limited.admit_prompts(10)
    limited.spend(110)
    assert refused(limited.admit_prompts, 1).headers == {"Retry-After": "60"}
    clock.now = 60.5
    refused(limited.admit_prompts, 1)
    clock.now = 61
    limited.admit_prompts(1)


def test_long_waits_are_told_but_not_asked_of_clients():
    limited, _ = meter(tpm=60)
    limited.admit_prompts(600)
    error = refused(limited.admit_prompts, 1)
    assert "9m1s" in error.detail
    assert error.headers == {"Retry-After": "60"}


def test_a_refused_request_takes_nothing():
    limited, _ = meter(rpm=1, tpm=1)
    limited.admit()
    limited.admit_prompts(1)
    before = dict(limited.taken)
    refused(limited.admit)
    refused(limited.admit_prompts, 5)
    assert limited.taken == before


def test_headers_tell_limit_rest_and_reset():
    limited, _ = meter(rpm=60, tpm=600)
    limited.admit()
    limited.admit_prompts(5)
    assert dict(limited.headers()) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "595",
        "x-ratelimit-reset-tokens": "500ms",
    }


def test_a_key_over_its_requests_gets_429_and_another_does_not(serve):
    server = serve(server__api_keys=["one", "two"], limits__key_rpm=2)
    assert [chat(server, "one").status_code for _ in range(2)] == [200, 200]
    response = chat(server, "one")
    assert_error(response, 429, None, "rate_limit_exceeded")
    assert 0 < int(response.headers["retry-after"]) <= 30
    assert response.headers["x-ratelimit-remaining-requests"] == "0"
    assert chat(server, "two").headers["x-ratelimit-remaining-requests"] == "1"
    assert server.http.get("/health").status_code == 200


def counted(server, key, kind):
    text = server.http.get("/metrics", headers=bearer(key)).text
    [line] = [line for line in text.splitlines() if f'key_tokens_total{{key="api-1",kind="{kind}"}}' in line]
    return float(line.rpartition(" ")[2])


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_of_prompts_and_answers_are_counted(serve, stream):
    server = serve(server__api_keys=["one"], limits__key_tpm=10_000)
    options = {"stream_options": {"include_usage": True}} if stream else {}
    response = chat(server, "one", n=2, stream=stream, **options)
    usage = json.loads(events(response)[-2])["usage"] if stream else response.json()["usage"]
    assert counted(server, "one", "prompt") == usage["prompt_tokens"] > 0
    assert counted(server, "one", "completion") == usage["completion_tokens"] == 20


def test_a_key_without_tokens_cannot_generate_but_still_ask(serve):
    server = serve(server__api_keys=["one"], limits__key_tpm=20)
    assert chat(server, "one", max_tokens=50).status_code == 200
    assert_error(chat(server, "one"), 429, None, "rate_limit_exceeded")
    embed = server.http.post("/v1/embeddings", json={"model": "fake", "input": "a"}, headers=bearer("one"))
    assert_error(embed, 429, None, "rate_limit_exceeded")
    assert server.http.get("/v1/models", headers=bearer("one")).status_code == 200
    assert len(server.engine.calls) == 1


def test_embeddings_are_counted(serve):
    server = serve(server__api_keys=["one"], limits__key_tpm=30)
    body = {"model": "fake", "input": "a" * 40}
    assert server.http.post("/v1/embeddings", json=body, headers=bearer("one")).status_code == 200
    assert chat(server, "one").status_code == 429


def test_a_key_at_work_as_often_as_it_may_waits(serve):
    server = serve(server__api_keys=["one", "two"], limits__key_max_concurrent=1, step_s=0.05)
    first = threading.Thread(target=lambda: chat(server, "one"))
    first.start()
    wait_for(lambda: server.engine.running == 1)
    response = chat(server, "one")
    assert "1 requests of this key" in assert_error(response, 429, None, "rate_limit_exceeded")
    assert chat(server, "two", max_tokens=1).status_code == 200
    first.join()
    assert chat(server, "one", max_tokens=1).status_code == 200


def test_a_keys_own_limits_go_before_the_servers(tmp_path):
    store = KeyStore(tmp_path / "jobs.sqlite")
    keys = [store.create(**limits)[1] for limits in ({}, {"rpm": 7}, {"rpm": 0}, {"admin": True})]
    ring = KeyRing(settings(limits__key_rpm=5, server__admin_keys=["boss"]), store)
    found = [ring.find(f"Bearer {key}") for key in (*keys, "boss")]
    assert [account.rpm for account in found] == [5, 7, 0, 0, 0]


def test_without_keys_nothing_is_counted_or_limited(serve):
    server = serve(limits__key_rpm=1)
    for _ in range(3):
        assert "x-ratelimit-limit-requests" not in server.http.get("/v1/models").headers
    assert "key_requests_total{" not in server.http.get("/metrics").text


def test_metrics_name_ids_and_no_keys(tmp_path):
    store = KeyStore(tmp_path / "jobs.sqlite")
    record, key = store.create(rpm=1)
    engine = FakeEngine(settings(server__admin_keys=["boss"]))
    server = Running(engine, keys=KeyRing(engine.settings, store))
    try:
        chat(server, key)
        chat(server, key)
        text = server.http.get("/metrics", headers=bearer("boss")).text
    finally:
        server.stop()
    assert f'tokenloom:key_requests_total{{key="{record.id}"}} 1.0' in text
    assert f'tokenloom:key_tokens_total{{key="{record.id}",kind="completion"}} 10.0' in text
    assert f'tokenloom:key_refused_total{{key="{record.id}",limit="requests"}} 1.0' in text
    assert 'key="admin-1"' in text
    assert key.rpartition("-")[2] not in text
    assert "boss" not in text


def salts(server):
    return [call.cache_salt for call in server.engine.calls]


def test_keys_share_no_cached_prefixes(serve):
    server = serve(server__api_keys=["one", "two"])
    for key, salt in (("one", None), ("two", None), ("one", None), ("one", "x"), ("two", "x")):
        chat(server, key, cache_salt=salt)
    one, two, again, one_x, two_x = salts(server)
    assert one == again
    assert len({one, two, one_x, two_x}) == 4


def test_a_client_cannot_name_the_salt_of_another_key(serve):
    server = serve(server__admin_keys=["boss"])
    chat(server, "boss")
    server.http.post(URL, json={**BODY, "cache_salt": salts(server)[0]}, headers=bearer("boss"))
    theirs, forged = salts(server)
    assert theirs != forged
    assert theirs not in ("admin-1:", "admin-1")


def test_prefixes_are_shared_where_the_operator_says_so(serve):
    server = serve(server__api_keys=["one", "two"], server__cache_per_key=False)
    for key, salt in (("one", None), ("two", "x")):
        chat(server, key, cache_salt=salt)
    assert salts(server) == [None, "x"]


def test_the_log_names_the_id_of_a_key_and_not_the_key(serve, caplog):
    server = serve(server__api_keys=["sesame"])
    server.engine.refuse = ZeroDivisionError("broken")
    assert chat(server, "sesame").status_code == 500
    [record] = [r for r in caplog.records if "failed" in r.getMessage()]
    assert record.fields == {"key": "api-1"}
    assert "sesame" not in caplog.text


def test_only_the_same_key_finds_its_cached_prefix(serve, tiny_folder):
    """On the real engine: whether somebody else has sent a prompt cannot be told from the answer."""
    engine = AsyncEngine(
        Engine(settings(model__name=str(tiny_folder), server__api_keys=["one", "two"], cache__kv_bytes=2**22))
    )
    server = serve(engine=engine)
    body = {"model": engine.model_name, "prompt": "the sea is wide and deep " * 8, "max_tokens": 1}

    def cached(key):
        answer = server.http.post("/v1/completions", json=body, headers=bearer(key)).json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("one") == 0
    assert cached("two") == 0
    assert cached("one") > 0
