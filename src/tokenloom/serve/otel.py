"""Spans of requests and of runs of jobs, after OpenTelemetry's conventions for HTTP and for generative AI.

A request is a SERVER span; below it each prompt is an INTERNAL span named `chat MODEL` (`text_completion`,
`embeddings`), and below that lie `queue`, `prefill` and `decode`. No span holds text of prompts or answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tokenloom.engine.request import Request
from tokenloom.finetune.records import JobRecord
from tokenloom.finetune.reporter import JobReporter
from tokenloom.finetune.store import Store
from tokenloom.serve.request_record import CLIENT_GONE, Phases, RequestRecord, finish_reasons
from tokenloom.version import __version__

PROVIDER = "tokenloom"
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}


def otlp() -> OtelTracing:
    """Spans to an OTLP collector, as the OTEL_* variables say (http://localhost:4318 without them)."""
    chosen = OTELResourceDetector().detect().attributes
    own = {"service.name": "tokenloom", "service.version": __version__}
    provider = TracerProvider(resource=Resource.create({**own, **chosen}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return OtelTracing(provider)


@dataclass(frozen=True)
class _Open:
    """A span that is open, and how far the wall clock was ahead of the monotonic one when it began: moments
    of one request keep their distances whatever the wall clock does meanwhile."""

    span: Span
    ahead_ns: int

    def ns(self, monotonic_s: float) -> int:
        """A moment of the monotonic clock in Unix nanoseconds."""
        return self.ahead_ns + int(monotonic_s * 1e9)


class OtelTracing:
    """Implements `tracing.Tracing` on a provider of the SDK, whose sampler decides what is recorded."""

    def __init__(self, provider: TracerProvider) -> None:
        self.provider = provider
        self.tracer = provider.get_tracer("tokenloom", __version__)

    def begin(self, record: RequestRecord, headers: Mapping[str, str]) -> str:
        ahead_ns = time.time_ns() - int(time.monotonic() * 1e9)
        span = self.tracer.start_span(
            record.method,
            TraceContextTextMapPropagator().extract(headers),
            kind=SpanKind.SERVER,
            start_time=ahead_ns + int(record.started_s * 1e9),
            attributes={"http.request.method": record.method, "tokenloom.request_id": record.request_id},
        )
        record.span = _Open(span, ahead_ns)
        return trace.format_trace_id(span.get_span_context().trace_id)

    def end(self, record: RequestRecord) -> None:
        opened: _Open = record.span
        span = opened.span
        assert record.ended_s is not None
        if span.is_recording():
            status = record.status or CLIENT_GONE
            span.update_name(f"{record.method} {record.route}")
            span.set_attributes({"http.route": record.route, "http.response.status_code": status})
            if record.error is not None:
                span.set_attribute("error.type", record.error)
            if status >= 500:
                span.set_status(StatusCode.ERROR)
            for run in record.runs:
                self._run(record, run, opened)
        span.end(opened.ns(record.ended_s))

    def _run(self, record: RequestRecord, run: Request, opened: _Open) -> None:
        assert record.ended_s is not None
        end = record.ended_s
        operation = _OPERATIONS.get(record.route, "chat" if run.kind == "generate" else "embeddings")
        context = trace.set_span_in_context(opened.span)
        span = self.tracer.start_span(
            f"{operation} {record.model}",
            context,
            start_time=opened.ns(run.arrival_s),
            attributes={"gen_ai.operation.name": operation, **dict(_asked(record, run))},
        )
        inner = trace.set_span_in_context(span)
        for name, start, until, attributes in _phases(run, end):
            phase = self.tracer.start_span(name, inner, start_time=opened.ns(start), attributes=attributes)
            phase.end(opened.ns(until))
        span.set_attributes(dict(_answered(record, run)))
        if record.error is not None:
            span.set_attribute("error.type", record.error)
            span.set_status(StatusCode.ERROR)
        span.end(opened.ns(end))

    def reporter(self, store: Store, job: JobRecord, ended: Callable[[], None]) -> JobReporter:
        span = self.tracer.start_span(
            f"fine_tune {job.model}",
            Context(),  # a job outlives the request that created it
            attributes={
                "gen_ai.operation.name": "fine_tune",
                "gen_ai.provider.name": PROVIDER,
                "gen_ai.request.model": job.model,
                "tokenloom.job.id": job.id,
                "tokenloom.job.name": job.name,
            },
        )
        return _TracedReporter(store, job, ended, span)

    def close(self) -> None:
        self.provider.shutdown()


def _phases(run: Request, end: float) -> Iterator[tuple[str, float, float, dict[str, Any]]]:
    """Each phase that the request came to: its name, begin and end on the monotonic clock, token counts."""
    phases = Phases.of(run)
    yield "queue", phases.arrival_s, phases.scheduled_s or end, {}
    if phases.scheduled_s is not None:
        tokens = {
            "gen_ai.usage.input_tokens": len(run.prompt),
            "gen_ai.usage.cache_read.input_tokens": run.cached_tokens,
        }
        yield "prefill", phases.scheduled_s, phases.first_token_s or end, tokens
    if phases.first_token_s is not None:
        written = sum(sequence.num_output for sequence in run.sequences)
        last = phases.last_token_s or end
        yield "decode", phases.first_token_s, last, {"gen_ai.usage.output_tokens": written}


def _asked(record: RequestRecord, run: Request) -> Iterator[tuple[str, Any]]:
    params = run.params
    yield "gen_ai.provider.name", PROVIDER
    yield "gen_ai.request.model", record.model or "unknown"
    if run.adapter is not None:
        yield "tokenloom.adapter.version", run.adapter.version
    if run.kind == "embed":
        return
    if params.max_tokens is not None:
        yield "gen_ai.request.max_tokens", params.max_tokens
    if params.n > 1:
        yield "gen_ai.request.choice.count", params.n
    if params.seed is not None:
        yield "gen_ai.request.seed", params.seed
    yield "gen_ai.request.temperature", params.temperature
    yield "gen_ai.request.top_p", params.top_p


def _answered(record: RequestRecord, run: Request) -> Iterator[tuple[str, Any]]:
    yield "gen_ai.response.id", run.request_id
    yield "gen_ai.response.model", record.model or "unknown"
    yield "gen_ai.usage.input_tokens", len(run.prompt)
    yield "gen_ai.usage.cache_read.input_tokens", run.cached_tokens
    if run.kind == "generate":
        yield "gen_ai.usage.output_tokens", sum(sequence.num_output for sequence in run.sequences)
        yield "gen_ai.response.finish_reasons", finish_reasons(run)
        if run.first_token_s is not None:
            yield "gen_ai.response.time_to_first_chunk", run.first_token_s - run.arrival_s


class _TracedReporter(JobReporter):
    """Ends the span of a run when the run ends; checkpoints are its events."""

    def __init__(self, store: Store, job: JobRecord, ended: Callable[[], None], span: Span) -> None:
        super().__init__(store, job, ended)
        self._span = span

    def step(
        self, step: int, metrics: dict[str, float], trained_tokens: int, estimated_finish_s: float | None
    ) -> None:
        super().step(step, metrics, trained_tokens, estimated_finish_s)
        self._span.set_attribute("tokenloom.job.step", step)
        self._span.set_attribute("tokenloom.job.trained_tokens", trained_tokens)
        if metrics.get("train_loss") is not None:
            self._span.set_attribute("tokenloom.job.train_loss", metrics["train_loss"])

    def checkpoint(self, step: int, path: Path | str, metrics: dict[str, float]) -> str:
        name = super().checkpoint(step, path, metrics)
        self._span.add_event("checkpoint", {"tokenloom.job.step": step, "tokenloom.job.checkpoint": name})
        return name

    def paused(self) -> None:
        super().paused()
        self._end("paused")

    def cancelled(self) -> None:
        super().cancelled()
        self._end("cancelled")

    def failed(self, code: str, message: str, param: str | None = None) -> None:
        super().failed(code, message, param)
        self._span.set_attribute("error.type", code)
        self._span.set_status(StatusCode.ERROR, message)
        self._end("failed")

    def succeeded(self, adapter_path: Path | str | None, trained_tokens: int) -> None:
        super().succeeded(adapter_path, trained_tokens)
        self._end("succeeded")

    def _end(self, how: str) -> None:
        self._span.set_attribute("tokenloom.job.ended", how)
        self._span.end()
