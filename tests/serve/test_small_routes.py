"""Models, embeddings, tokens, health, metrics, the OpenAPI document."""

import base64
import struct
import threading
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fake_engine import timing
from running import assert_error, wait_for
from tokenloom.version import __version__


def test_models_are_listed_and_found(shared):
    listed = shared.http.get("/v1/models").json()
    assert listed["object"] == "list"
    [card] = listed["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("fake", "model", 512)
    assert shared.http.get("/v1/models/fake").json() == card
    assert_error(shared.http.get("/v1/models/other/name"), 404, "model", "model_not_found")


@pytest.mark.parametrize(
    ("given", "lengths"), [("ab", [2]), (["a", "ab"], [1, 2]), ([5, 6, 7], [3]), ([[5], [6]], [1, 1])]
)
def test_embeddings_of_every_form_of_input(shared, given, lengths):
    body = shared.http.post("/v1/embeddings", json={"model": "fake", "input": given}).json()
    assert [item["embedding"] for item in body["data"]] == [[float(n), 0.5, -1.25] for n in lengths]
    assert [item["index"] for item in body["data"]] == list(range(len(lengths)))
    assert body["usage"] == {"prompt_tokens": sum(lengths), "total_tokens": sum(lengths)}


def test_base64_embeddings_are_little_endian_floats(shared):
    fields = {"model": "fake", "input": "ab", "encoding_format": "base64"}
    body = shared.http.post("/v1/embeddings", json=fields).json()
    assert struct.unpack("<3f", base64.b64decode(body["data"][0]["embedding"])) == (2.0, 0.5, -1.25)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"dimensions": 2}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"input": 5}, "input"),
        ({"input": [1] * 600}, "input"),
    ],
)
def test_bad_embedding_requests_are_named(shared, fields, param):
    response = shared.http.post("/v1/embeddings", json={"model": "fake", "input": "a", **fields})
    assert assert_error(response, 400, param).startswith(param)


def test_a_client_that_gives_up_aborts_its_embeddings(serve):
    import httpx

    server = serve(step_s=5)
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/v1/embeddings", json={"model": "fake", "input": ["a", "b"]}, timeout=0.1)
    wait_for(lambda: len(server.engine.aborted) == 2)


def test_tokens_of_a_text_and_back(shared):
    body = shared.http.post("/tokenize", json={"prompt": "the <|im_end|>é"}).json()
    assert body["count"] == len(body["tokens"]) and body["max_model_len"] == 512
    back = shared.http.post("/detokenize", json={"tokens": body["tokens"]}).json()
    assert back == {"prompt": "the <|im_end|>é"}


def test_tokens_of_a_conversation_are_those_of_chat(shared):
    messages = [{"role": "user", "content": "hi"}]
    tokens = shared.http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    body = {"model": "fake", "messages": messages, "max_tokens": 1}
    shared.http.post("/v1/chat/completions", json=body)
    assert shared.engine.calls[-1].prompt == tokens


@pytest.mark.parametrize("text", ["", "x" * 100_000])
def test_tokens_of_nothing_and_of_much(shared, text):
    assert shared.http.post("/tokenize", json={"prompt": text}).json()["count"] == len(text)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {"tokens": [99999]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_bad_token_requests_are_named(shared, path, body, param):
    assert param in assert_error(shared.http.post(path, json=body), 400, param)


def test_health_follows_the_loop_and_ready_the_readiness(serve):
    server = serve()
    assert server.http.get("/health").json() == {"status": "ok"}
    assert server.http.get("/ready").json() == {"status": "ready"}
    server.engine.draining = True
    assert server.http.get("/health").status_code == 200
    response = server.http.get("/ready")
    assert_error(response, 503, None, "not_ready")
    assert int(response.headers["retry-after"]) > 0
    server.engine.alive = False
    assert_error(server.http.get("/health"), 503, None, "engine_stopped")


def test_the_version(shared):
    assert shared.http.get("/version").json() == {"version": __version__}


def samples(server):
    text = server.http.get("/metrics").text
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_follow_the_engine(serve):
    server = serve()
    counters = server.engine.counters
    counters.running, counters.waiting, counters.preemptions = 4, 2, 1
    counters.prefix_queries_tokens, counters.prefix_hits_tokens = 100, 64
    counters.prompt_tokens, counters.generation_tokens = 120, 30
    counters.tier_bytes, counters.tier_demotions, counters.tier_hits_tokens = 4096, 7, 48
    model = ("model_name", "fake")
    scraped = samples(server)
    for name, value in {
        "num_requests_running": 4,
        "num_requests_waiting": 2,
        "kv_cache_usage_perc": 0.25,
        "prefix_cache_queries_total": 100,
        "prefix_cache_hits_total": 64,
        "num_preemptions_total": 1,
        "kv_tier_bytes": 4096,
        "kv_tier_demotions_total": 7,
        "kv_tier_hits_total": 48,
        "prompt_tokens_total": 120,
        "generation_tokens_total": 30,
        "iteration_tokens_count": 5,
        "iteration_tokens_sum": 50,
    }.items():
        assert scraped[f"tokenloom:{name}", model] == value


def test_finished_requests_feed_the_histograms_once(serve):
    server = serve()
    server.engine.counters.finished.extend([timing(), timing()])
    for _ in range(2):
        server.engine.counters.ttft.add(0.2, 0.0)
        server.engine.counters.itl.add(0.06, 0.0)
    model = ("model_name", "fake")
    for _ in range(2):
        scraped = samples(server)
        assert scraped["tokenloom:request_success_total", ("finished_reason", "stop"), model] == 2
        for name, total in {
            "time_to_first_token": 0.4,
            "inter_token_latency": 0.12,
            "time_per_output_token": 0.1,
            "e2e_request_latency": 2.0,
            "request_queue_time": 0.02,
            "request_prefill_time": 0.38,
            "request_decode_time": 1.6,
        }.items():
            assert scraped[f"tokenloom:{name}_seconds_count", model] == 2
            assert scraped[f"tokenloom:{name}_seconds_sum", model] == pytest.approx(total)


def test_answers_are_counted_by_route_never_by_path_or_invented_method(serve):
    server = serve()
    server.http.get("/v1/models/a")
    server.http.get("/v1/models/b")
    server.http.get("/nowhere/1")
    server.http.request("INVENTED", "/v1/models")
    labels = {
        tuple(value for _, value in labels): count
        for (name, *labels), count in samples(server).items()
        if name == "tokenloom:http_requests_total"
    }
    assert labels["GET", "/v1/models/{model_id:path}", "404"] == 2
    assert labels["GET", "unmatched", "404"] == 1
    assert all(method in ("GET", "POST", "other") for method, _, _ in labels)


def test_several_applications_keep_their_metrics_apart(serve):
    first, second = serve(), serve()
    first.engine.counters.running = 7
    running = ("tokenloom:num_requests_running", ("model_name", "fake"))
    assert (samples(first)[running], samples(second)[running]) == (7, 0)


def test_the_openapi_document_promises_400_and_openais_error_shape(shared):
    document = shared.http.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert "422" not in operation["responses"]
            schema = operation["responses"]["400"]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/ErrorResponse"}
            if path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
                assert set(operation["responses"]["200"]["content"]) == {
                    "application/json",
                    "text/event-stream",
                }
    error = document["components"]["schemas"]["ErrorDetail"]
    assert set(error["required"]) == {"message", "type", "param", "code"}


def test_the_openapi_document_says_what_each_answer_is(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path))
    document = serve(jobs=True, coserve__mode="off").http.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            content = operation["responses"]["200"]["content"]
            schemas = [media.get("schema") for kind, media in content.items() if kind == "application/json"]
            assert content and {} not in schemas, f"{method} {path}"


def test_the_openapi_document_bounds_objects_and_their_keys(shared):
    chat = shared.http.get("/openapi.json").json()["components"]["schemas"]["ChatRequest"]["properties"]
    [metadata, _] = chat["metadata"]["anyOf"]
    [bias, _] = chat["logit_bias"]["anyOf"]
    assert metadata["maxProperties"] == 16
    assert (bias["maxProperties"], list(bias["patternProperties"])) == (1024, ["^[0-9]{1,9}$"])


def test_every_reference_in_the_openapi_document_resolves(shared):
    document = shared.http.get("/openapi.json").json()

    def references(node):
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            node = list(node.values())
        if isinstance(node, list):
            for item in node:
                yield from references(item)

    found = set(references(document))
    assert found
    assert found <= {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "fake", "prompt": [' + b"1," * 900_000 + b"1]}",
        b'{"model": "fake", "prompt": "' + b"the sea " * 200_000 + b'"}',
        b'{"model": "fake", "prompt": ["' + b"a" * 4000 + b'"' + (b',"' + b"a" * 4000 + b'"') * 255 + b"]}",
    ],
    ids=["tokens", "text", "texts"],
)
def test_a_large_body_does_not_hold_up_the_others(shared, body):
    took: list[float] = []

    def send() -> None:
        begun = time.monotonic()
        headers = {"content-type": "application/json"}
        shared.http.post("/v1/completions", content=body, headers=headers)
        took.append(time.monotonic() - begun)

    sender = threading.Thread(target=send)
    sender.start()
    longest = 0.0
    while sender.is_alive():
        begun = time.monotonic()
        assert shared.http.get("/health").status_code == 200
        longest = max(longest, time.monotonic() - begun)
    assert longest < max(0.3, took[0] / 2)
