"""Prometheus metrics, named in vLLM's manner behind `tokenloom:`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from fastapi import APIRouter, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from tokenloom.engine.async_engine import AsyncEngine
from tokenloom.engine.latencies import BUCKETS_S, Latencies
from tokenloom.serve.errors import ERROR_RESPONSES


class Metrics:
    """One registry per application. The engine's own numbers are read when Prometheus asks."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine))
        ProcessCollector(registry=self.registry)  # memory, CPU time, open files; where the system tells
        self._http = Counter(
            "tokenloom:http_requests",
            "HTTP answers by method, route and status.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self._finished = Counter(
            "tokenloom:request_success",
            "Finished requests by reason.",
            ("model_name", "finished_reason"),
            registry=self.registry,
        )
        self._requests = Counter(
            "tokenloom:model_requests",
            "Requests by the model that they named: the base model or an adapter.",
            ("model_name",),
            registry=self.registry,
        )
        self._tpot = self._seconds("time_per_output_token", "Mean time per token after the first.")
        self._e2e = self._seconds("e2e_request_latency", "Arrival to last token.")
        self._queue = self._seconds("request_queue_time", "Arrival to first scheduling.")
        self._prefill = self._seconds("request_prefill_time", "First scheduling to first token.")
        self._decode = self._seconds("request_decode_time", "First token to last token.")

    def _seconds(self, name: str, text: str) -> Histogram:
        histogram = Histogram(
            f"tokenloom:{name}_seconds", text, ("model_name",), registry=self.registry, buckets=BUCKETS_S
        )
        return histogram.labels(self.engine.model_name)

    def count_answer(self, method: str, route: str, status: int) -> None:
        """Count one HTTP answer."""
        self._http.labels(method, route, str(status)).inc()

    def count_request(self, model: str) -> None:
        """Count one request for a model that is served."""
        self._requests.labels(model).inc()

    def scrape(self) -> bytes:
        """The exposition text; first takes in the requests that finished since the last scrape."""
        for timing in self.engine.stats().pop_finished():
            self._finished.labels(self.engine.model_name, timing.finish_reason).inc()
            for histogram, value in (
                (self._tpot, timing.tpot_s),
                (self._e2e, timing.e2e_s),
                (self._queue, timing.queued_s),
                (self._prefill, timing.prefill_s),
                (self._decode, timing.decode_s),
            ):
                if value is not None:
                    histogram.observe(value)
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        stats, model = self.engine.stats(), [self.engine.model_name]
        adapters = self.engine.engine.adapters.list()
        inference_blocks = stats.kv_blocks_used - stats.kv_blocks_training
        free_blocks = stats.kv_blocks_total - stats.kv_blocks_used - stats.kv_blocks_cached
        gauges: tuple[tuple[str, str, float], ...] = (
            ("num_requests_running", "Sequences that hold KV.", stats.running),
            ("num_requests_waiting", "Sequences in the queue.", stats.waiting),
            ("kv_cache_usage_perc", "Share of the KV pool in use, 0 to 1.", stats.kv_usage),
            ("kv_blocks_inference", "KV blocks that requests hold.", inference_blocks),
            ("kv_blocks_training", "KV blocks that training holds.", stats.kv_blocks_training),
            ("kv_blocks_cached", "KV blocks that the prefix cache alone keeps.", stats.kv_blocks_cached),
            ("kv_blocks_free", "KV blocks that hold nothing.", free_blocks),
            ("kv_blocks", "All KV blocks.", stats.kv_blocks_total),
            ("spec_decode_bytes", "Memory of what drafters keep.", stats.draft_bytes),
            ("kv_tier_bytes", "Bytes of KV blocks in the second tier.", stats.tier_bytes),
            ("num_adapters", "Adapters in memory.", len(adapters)),
            ("finetune_jobs_running", "Jobs that train now.", stats.training_jobs),
        )
        if stats.training_loss is not None:
            gauges = (*gauges, ("finetune_loss", "Loss of the last optimizer step.", stats.training_loss))
        counters = (
            ("prefix_cache_queries", "Prompt tokens looked up for reuse.", stats.prefix_queries_tokens),
            ("prefix_cache_hits", "Prompt tokens found there.", stats.prefix_hits_tokens),
            ("prefix_reads_saved", "Cached tokens read for another sequence.", stats.prefix_reads_saved),
            ("kv_tier_demotions", "KV blocks that went down to the second tier.", stats.tier_demotions),
            ("kv_tier_hits", "Tokens whose blocks came back from it.", stats.tier_hits_tokens),
            ("kv_tier_corrupt", "Blocks that were not as they had been written.", stats.tier_corrupt),
            ("engine_restarts", "Times that the engine's loop was started again.", stats.restarts),
            ("num_preemptions", "Sequences sent back to the queue.", stats.preemptions),
            ("prompt_tokens", "Prompt tokens of admitted requests.", stats.prompt_tokens),
            ("generation_tokens", "Tokens generated.", stats.generation_tokens),
            ("finetune_tokens", "Tokens trained on, in finished passes.", stats.training_tokens),
            ("finetune_rows", "Forward rows of training, restarts included.", stats.training_rows),
            ("finetune_steps", "Optimizer steps.", stats.training_steps),
            ("spec_decode_num_drafts", "Passes that verified guesses.", stats.drafts.passes),
            ("spec_decode_num_draft_tokens", "Tokens guessed.", stats.drafts.tokens),
            ("spec_decode_num_accepted_tokens", "Guessed tokens that became text.", stats.drafts.accepted),
            ("finetune_restarts", "Passes that gave way to requests.", stats.training_restarts),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(f"tokenloom:{name}", text, labels=["model_name"])
            gauge.add_metric(model, value)
            yield gauge
        for name, text, value in counters:
            counter = CounterMetricFamily(f"tokenloom:{name}", text, labels=["model_name"])
            counter.add_metric(model, value)
            yield counter
        places = CounterMetricFamily(
            "tokenloom:spec_decode_num_accepted_tokens_per_pos",
            "Guessed tokens that became text, by how far ahead they lay.",
            labels=["model_name", "position"],
        )
        for position, accepted in enumerate(stats.drafts.accepted_at):
            places.add_metric([*model, str(position)], accepted)
        yield places
        rows = SummaryMetricFamily("tokenloom:iteration_tokens", "Rows per iteration.", labels=["model_name"])
        rows.add_metric(model, count_value=stats.iterations, sum_value=stats.batch_tokens)
        yield rows
        kinds = CounterMetricFamily(
            "tokenloom:iteration_rows", "Rows of all iterations by kind.", labels=["model_name", "kind"]
        )
        for kind in ("prefill", "decode", "drafted", "training"):
            kinds.add_metric([*model, kind], getattr(stats.rows, kind))
        yield kinds
        yield _histogram("time_to_first_token", "Arrival to first token.", stats.ttft, model)
        yield _histogram("inter_token_latency", "From one event of a stream to the next.", stats.itl, model)
        info = GaugeMetricFamily(
            "tokenloom:adapter_info", "1 for each adapter in memory.", labels=["model_name", "version"]
        )
        for adapter in adapters:
            info.add_metric([adapter.name, str(adapter.version)], 1)
        yield info


def _histogram(name: str, text: str, latencies: Latencies, model: list[str]) -> HistogramMetricFamily:
    family = HistogramMetricFamily(f"tokenloom:{name}_seconds", text, labels=["model_name"])
    bounds = [*(str(float(bound)) for bound in BUCKETS_S), "+Inf"]
    cumulative = [float(count) for count in accumulate(latencies.counts)]
    family.add_metric(model, list(zip(bounds, cumulative, strict=True)), latencies.total_s)
    return family


def metrics_router(metrics: Metrics) -> APIRouter:
    """GET /metrics."""
    router = APIRouter(tags=["metrics"], responses=ERROR_RESPONSES)

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def scrape() -> Response:
        """Everything, in Prometheus's text format."""
        return Response(metrics.scrape(), media_type=CONTENT_TYPE_LATEST)

    return router
