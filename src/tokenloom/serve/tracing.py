"""Traces, if the settings ask for them: OpenTelemetry is imported then, and only then."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from tokenloom.config import ConfigError, TracingSettings
from tokenloom.finetune.records import JobRecord
from tokenloom.finetune.reporter import JobReporter
from tokenloom.finetune.store import Store
from tokenloom.serve.request_record import RequestRecord


class Tracing(Protocol):
    """What a server tells of its requests and jobs; `tokenloom.serve.otel` listens."""

    def begin(self, record: RequestRecord, headers: Mapping[str, str]) -> str:
        """A request has come, perhaps as part of a trace that its headers name; the trace's id."""

    def end(self, record: RequestRecord) -> None:
        """It is over."""

    def reporter(self, store: Store, job: JobRecord, ended: Callable[[], None]) -> JobReporter:
        """The reporter of a run of a job, which is a span."""

    def close(self) -> None:
        """Send what has not been sent yet."""


def open_tracing(settings: TracingSettings) -> Tracing | None:
    """The traces that the settings ask for; None for none.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """
    if settings.exporter == "none":
        return None
    try:
        from tokenloom.serve.otel import otlp
    except ImportError as error:
        raise ConfigError(
            f"tracing.exporter: otlp needs OpenTelemetry ({error.name} is missing): "
            "pip install 'tokenloom[otel]'"
        ) from error
    return otlp()
