"""The line that each HTTP request leaves in the log when it is over."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from tokenloom.config import LoggingSettings
from tokenloom.engine.request import Request
from tokenloom.logs import fields
from tokenloom.serve.request_record import CLIENT_GONE, Phases, RequestRecord, finish_reasons
from tokenloom.serve.security import UNCOUNTED_PATHS
from tokenloom.text.tokenizer import Tokenizer

logger = logging.getLogger("tokenloom.serve")


class RequestLog:
    """Writes one line for each request: what was asked, how it ended, its durations and tokens.

    Probes (`/health`, `/ready`, `/metrics`) that succeed are debug lines. With `logging.content` one more
    line for each prompt has its text and the answers'.
    """

    def __init__(self, settings: LoggingSettings, tokenizer: Tokenizer) -> None:
        self.content = settings.content
        self.tokenizer = tokenizer

    def __call__(self, record: RequestRecord) -> None:
        status = record.status or CLIENT_GONE
        level = logging.INFO
        if status >= 500:
            level = logging.ERROR
        elif record.route in UNCOUNTED_PATHS and status == 200:
            level = logging.DEBUG
        if not logger.isEnabledFor(level):
            return
        took = (record.ended_s or record.started_s) - record.started_s
        logger.log(
            level,
            "request",
            extra=fields(
                method=record.method,
                route=record.route,
                status=status,
                error=record.error,
                key=record.key,
                model=record.model,
                total_ms=_ms(took),
                **(dict(_of_runs(record)) if record.runs else {}),
            ),
        )
        if self.content:
            for run in record.runs:
                logger.log(level, "content", extra=fields(**self._content(run)))

    def _content(self, run: Request) -> dict[str, Any]:
        decode = self.tokenizer.decode
        return {
            "prompt": decode(run.prompt, skip_special_tokens=False),
            "answers": [decode(s.output, skip_special_tokens=False) for s in run.sequences],
        }


def _of_runs(record: RequestRecord) -> Iterator[tuple[str, Any]]:
    """What the engine knows: the longest wait, the first token of all, tokens together."""
    first, phases = record.runs[0], [Phases.of(run) for run in record.runs]
    if first.adapter is not None:
        yield "adapter", f"{first.adapter.name}@{first.adapter.version}"
    waits = [p.scheduled_s - p.arrival_s for p in phases if p.scheduled_s is not None]
    if waits:
        yield "queue_ms", _ms(max(waits))
    firsts = [p.first_token_s - p.arrival_s for p in phases if p.first_token_s is not None]
    if firsts:
        yield "ttft_ms", _ms(min(firsts))
    yield "prompt_tokens", record.prompt_tokens
    yield "cached_tokens", record.cached_tokens
    yield "completion_tokens", record.completion_tokens
    if first.kind == "generate":
        yield "finish_reasons", [reason for run in record.runs for reason in finish_reasons(run)]


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 1)
