"""Traces: spans of requests and of jobs' runs, in OpenTelemetry's own exporter for tests."""

import ast
import gzip
import itertools
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest

pytest.importorskip("opentelemetry.sdk.trace", reason="the otel extra is not installed")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import tokenloom
from fake_engine import FakeEngine
from finetune_fakes import DATA, FakeRunner, trainable, wait_until
from running import Running, settings, wait_for
from tokenloom.config import ConfigError, TracingSettings
from tokenloom.finetune.job_request import parse_job
from tokenloom.finetune.service import JobService
from tokenloom.finetune.store import Store
from tokenloom.serve.otel import OtelTracing
from tokenloom.serve.request_record import RequestRecord
from tokenloom.serve.tracing import open_tracing

SECRET = "qwxyzsecret"
CHAT = {"model": "fake", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 3, "seed": 5}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


STEP_S = 0.01


class Traced:
    """A server over a fake engine, and the spans that it has ended."""

    def __init__(self):
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracing = OtelTracing(provider)
        self.server = Running(FakeEngine(settings(), step_s=STEP_S), tracing=self.tracing)

    def trace(self, count):
        """The spans by name, once there are as many."""
        wait_for(lambda: len(self.exporter.get_finished_spans()) >= count)
        return {span.name: span for span in self.exporter.get_finished_spans()}


@pytest.fixture(scope="module")
def one_server():
    server = Traced()
    yield server
    server.server.stop()


@pytest.fixture
def traced(one_server):
    """That server, which has told nothing yet."""
    yield one_server
    engine = one_server.server.engine
    wait_for(lambda: engine.running == 0)
    engine.fail_at, engine.step_s = None, STEP_S
    one_server.exporter.clear()


def test_a_request_is_a_tree_of_its_phases(traced):
    server = traced
    server.server.http.post("/v1/chat/completions", json=CHAT)
    spans = server.trace(5)
    parent = {name: span.parent.span_id if span.parent else None for name, span in spans.items()}
    ids = {name: span.context.span_id for name, span in spans.items()}
    root, call = "POST /v1/chat/completions", "chat fake"
    assert parent == {
        root: None,
        call: ids[root],
        "queue": ids[call],
        "prefill": ids[call],
        "decode": ids[call],
    }


def test_phases_follow_one_another_within_the_request(traced):
    server = traced
    server.server.http.post("/v1/chat/completions", json=CHAT)
    spans = server.trace(5)
    root = spans["POST /v1/chat/completions"]
    starts = [span.start_time for span in (root, spans["queue"], spans["prefill"], spans["decode"])]
    edges = [*starts, spans["decode"].end_time, root.end_time]
    assert all(later >= earlier for earlier, later in itertools.pairwise(edges))
    assert root.end_time - root.start_time >= 30_000_000
    assert spans["queue"].end_time == spans["prefill"].start_time


def test_attributes_follow_the_conventions_for_generative_ai(traced):
    server = traced
    usage = server.server.http.post("/v1/chat/completions", json=CHAT).json()["usage"]
    spans = server.trace(5)
    call = dict(spans["chat fake"].attributes)
    assert call["gen_ai.response.time_to_first_chunk"] >= 0.01
    assert (
        call.items()
        >= {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "tokenloom",
            "gen_ai.request.model": "fake",
            "gen_ai.request.max_tokens": 3,
            "gen_ai.request.seed": 5,
            "gen_ai.usage.input_tokens": usage["prompt_tokens"],
            "gen_ai.usage.output_tokens": 3,
            "gen_ai.usage.cache_read.input_tokens": 3,
            "gen_ai.response.finish_reasons": ("length",),
        }.items()
    )
    assert spans["decode"].attributes["gen_ai.usage.output_tokens"] == 3
    root = spans["POST /v1/chat/completions"]
    assert root.attributes["http.route"] == "/v1/chat/completions"
    assert root.attributes["http.response.status_code"] == 200


def test_a_trace_begun_elsewhere_goes_on_here(traced):
    server = traced
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    server.server.http.get("/v1/models", headers=headers)
    span = server.trace(1)["GET /v1/models"]
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)


@pytest.mark.parametrize("header", ["", "00-zz-zz-01", f"00-{'0' * 32}-{PARENT}-01", "x" * 5000])
def test_a_bad_traceparent_is_passed_over(traced, header):
    server = traced
    assert server.server.http.get("/v1/models", headers={"traceparent": header}).status_code == 200
    assert server.trace(1)["GET /v1/models"].parent is None


def test_a_trace_that_is_not_sampled_leaves_no_spans(traced):
    server = traced
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    server.server.http.post("/v1/chat/completions", json=CHAT, headers=headers)
    server.server.http.get("/v1/models")
    assert list(server.trace(1)) == ["GET /v1/models"]


def test_no_span_holds_text(traced):
    server = traced
    server.server.http.post("/v1/chat/completions", json=CHAT)
    server.trace(5)
    told = "".join(span.to_json() for span in server.exporter.get_finished_spans())
    assert SECRET not in told and "fgh" not in told  # what seed 5 answers


def test_failures_are_errors_of_both_spans(traced):
    server = traced
    server.server.engine.fail_at = 1
    assert server.server.http.post("/v1/chat/completions", json=CHAT).status_code == 500
    spans = server.trace(5)
    for name in ("POST /v1/chat/completions", "chat fake"):
        assert spans[name].status.status_code.name == "ERROR"
        assert spans[name].attributes["error.type"] == "generation_failed"


def test_a_client_that_goes_away_ends_its_spans(traced):
    server = traced
    server.server.engine.step_s = 5
    with pytest.raises(httpx.ReadTimeout):
        server.server.http.post("/v1/chat/completions", json=CHAT, timeout=0.1)
    spans = server.trace(4)
    assert "decode" not in spans
    assert spans["POST /v1/chat/completions"].attributes["http.response.status_code"] == 499


def test_embeddings_are_traced_without_a_decode(traced):
    server = traced
    server.server.http.post("/v1/embeddings", json={"model": "fake", "input": "ab"})
    spans = server.trace(3)
    assert set(spans) == {"POST /v1/embeddings", "embeddings fake", "queue"}
    assert spans["embeddings fake"].attributes["gen_ai.usage.input_tokens"] == 2


def test_probes_are_not_traced(traced):
    server = traced
    for path in ("/health", "/ready", "/metrics", "/v1/models"):
        server.server.http.get(path)
    assert list(server.trace(1)) == ["GET /v1/models"]


def test_log_lines_name_the_trace(traced, logged):
    server, log = traced, logged()
    server.server.http.get("/v1/models", headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    assert log.request()["trace_id"] == TRACE
    server.trace(1)


def run_job(folder, runner, stop=None):
    """A job on a pretended runner with traces; the job, and the spans of its runs."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    store = Store(folder)
    service = JobService(store, runner, trainable(), report=OtelTracing(provider).reporter)
    service.start()
    file = service.create_file([DATA], "train.jsonl")
    job = service.create_job(parse_job({"model": "tiny", "training_file": file.id}))
    if stop is not None:
        wait_until(lambda: store.jobs.get(job.id).status == "running")
        getattr(service, stop)(job.id)
    wait_until(exporter.get_finished_spans)
    service.stop()
    store.close()
    return job, exporter.get_finished_spans()


def test_a_run_of_a_job_is_a_span_with_its_steps_and_checkpoints(tmp_path):
    job, [span] = run_job(tmp_path, FakeRunner())
    assert span.name == "fine_tune tiny" and span.parent is None
    told = dict(span.attributes)
    assert (
        told.items()
        >= {
            "gen_ai.operation.name": "fine_tune",
            "tokenloom.job.id": job.id,
            "tokenloom.job.step": 3,
            "tokenloom.job.trained_tokens": 30,
            "tokenloom.job.ended": "succeeded",
        }.items()
    )
    assert told["tokenloom.job.train_loss"] == pytest.approx(1 / 3)
    assert [event.attributes["tokenloom.job.step"] for event in span.events] == [1, 2, 3]


@pytest.mark.parametrize(("stop", "ended"), [("pause", "paused"), ("cancel", "cancelled")])
def test_the_span_says_how_the_run_ended(tmp_path, stop, ended):
    runner = FakeRunner()
    runner.go.clear()
    _, [span] = run_job(tmp_path, runner, stop)
    assert span.attributes["tokenloom.job.ended"] == ended


def test_a_job_that_fails_is_an_error(tmp_path):
    class Failing(FakeRunner):
        def start(self, job, reporter):
            reporter.failed("training_diverged", "the loss is NaN")

    _, [span] = run_job(tmp_path, Failing())
    assert span.status.status_code.name == "ERROR"
    assert span.attributes["error.type"] == "training_diverged"


def test_spans_reach_a_collector_that_the_otel_variables_name(monkeypatch):
    got = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            got.append((self.path, gzip.decompress(body) if self.headers["content-encoding"] else body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            return

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "loom-of-mine")
        tracing = open_tracing(TracingSettings(exporter="otlp"))
        record = RequestRecord("r", "GET", route="/v1/models", status=200)
        tracing.begin(record, {})
        record.ended_s = record.started_s + 0.5
        tracing.end(record)
        tracing.close()  # sends what has not been sent
        collector.shutdown()
    [(path, body)] = got
    assert path == "/v1/traces"
    [spans] = ExportTraceServiceRequest.FromString(body).resource_spans
    names = {pair.key: pair.value.string_value for pair in spans.resource.attributes}
    assert names["service.name"] == "loom-of-mine" and names["service.version"]
    [span] = spans.scope_spans[0].spans
    assert span.name == "GET /v1/models"
    assert abs(span.end_time_unix_nano - span.start_time_unix_nano - 5e8) < 1e3


def test_without_the_extra_the_setting_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenloom.serve.otel", None)
    with pytest.raises(ConfigError, match=r"tracing.exporter.*tokenloom\[otel\]"):
        open_tracing(TracingSettings(exporter="otlp"))


def test_off_is_no_tracing_at_all():
    assert open_tracing(TracingSettings()) is None


def test_only_one_module_imports_opentelemetry_and_nobody_imports_it_at_once():
    """Off means not imported: `serve/otel.py` alone does, and it is imported within a function alone."""
    for path in Path(tokenloom.__file__).parent.rglob("*.py"):
        text = path.read_text()
        if "otel" in text or "opentelemetry" in text:
            tree = ast.parse(text)
            for node in ast.walk(tree):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                if any(name.startswith("opentelemetry") for name in names):
                    assert path.name == "otel.py"
                if "tokenloom.serve.otel" in names:
                    assert node not in tree.body, path
