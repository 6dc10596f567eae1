"""What each key may take and has taken: requests and tokens per minute, requests at work at the same time.

Both rates are buckets that refill evenly. A request is let in while there is something in them; how many
tokens it takes is known only afterwards, so the bucket of tokens may be overdrawn, and the key waits until it
is refilled. An answer that has begun is never cut. A server process counts for itself.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenloom.serve.errors import ApiError
from tokenloom.serve.key_ring import Account
from tokenloom.serve.security import refuse

_KINDS = ("requests", "tokens")
RATE_HEADERS = tuple(
    f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in _KINDS
)
MAX_RETRY_AFTER_S = 60
"""Clients give up on longer ones at once; the message tells the whole time."""


class Bucket:
    """Holds at most `per_minute` and refills that much in a minute; `clock` gives seconds."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._at = clock()

    def level(self) -> float:
        """What is in it now; below zero if it is overdrawn."""
        now = self._clock()
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / 60)
        self._at = now
        return self._level

    def take(self, amount: int) -> None:
        """Take, whether or not it is there."""
        self._level = self.level() - amount

    def seconds_until(self, level: float) -> float:
        return max(0.0, (level - self.level()) * 60 / self.per_minute)


class Meter:
    """Counts what one account takes, and says when that is too much."""

    def __init__(self, account: Account, clock: Callable[[], float] = time.monotonic) -> None:
        self.account = account
        self.requests = Bucket(account.rpm, clock) if account.rpm else None
        self.tokens = Bucket(account.tpm, clock) if account.tpm else None
        self.at_work = 0
        self.taken = {"requests": 0, "prompt": 0, "completion": 0}
        self.refused = {"requests": 0, "tokens": 0, "concurrent": 0}

    def admit(self) -> None:
        """Count a request that comes in. Raises ApiError (429) instead if it is one too many."""
        most = self.account.max_concurrent
        if most and self.at_work >= most:
            self._refuse("concurrent", f"{most} requests of this key are at work, which is its limit", 1)
        self.admit_line()

    def admit_line(self) -> None:
        """The same for a line of a batch. It is not one of the requests that are at work at the same time:
        lines stand behind all requests, and would keep the key's own out for as long as a batch takes."""
        if self.requests is not None:
            if self.requests.level() < 1:
                wait = self.requests.seconds_until(1)
                self._refuse("requests", f"this key may make {self.account.rpm} requests per minute", wait)
            self.requests.take(1)
        self.taken["requests"] += 1

    def admit_prompts(self, tokens: int) -> None:
        """Count the prompts of a request. Raises ApiError (429) instead if the key has no tokens left."""
        if self.tokens is not None and self.tokens.level() < 1:
            wait = self.tokens.seconds_until(1)
            self._refuse("tokens", f"this key may take {self.account.tpm} tokens per minute", wait)
        self._spend("prompt", tokens)

    def spend(self, tokens: int) -> None:
        """Count generated tokens."""
        self._spend("completion", tokens)

    def wait_s(self) -> float:
        """Seconds until the rates allow one more request; 0 if they do now."""
        return max(bucket.seconds_until(1) if bucket else 0.0 for bucket in (self.requests, self.tokens))

    def headers(self) -> Iterator[tuple[str, str]]:
        """RATE_HEADERS: what a minute allows, what is left of it, and when all of it will be there again."""
        for kind, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                yield f"x-ratelimit-limit-{kind}", str(bucket.per_minute)
                yield f"x-ratelimit-remaining-{kind}", str(max(0, int(bucket.level())))
                yield f"x-ratelimit-reset-{kind}", _duration(bucket.seconds_until(bucket.per_minute))

    def _spend(self, kind: str, tokens: int) -> None:
        self.taken[kind] += tokens
        if self.tokens is not None:
            self.tokens.take(tokens)

    def _refuse(self, what: str, limit: str, wait_s: float) -> None:
        self.refused[what] += 1
        raise ApiError(
            429,
            f"{limit}; try again in {_duration(max(wait_s, 0.001))}",
            code="rate_limit_exceeded",
            headers={"Retry-After": str(min(MAX_RETRY_AFTER_S, max(1, math.ceil(wait_s))))},
        )


_current: ContextVar[Meter | None] = ContextVar("tokenloom_meter", default=None)


def current_meter() -> Meter | None:
    """The meter of the request at hand; None where no key came with it."""
    return _current.get()


@contextlib.contextmanager
def metered(meter: Meter) -> Iterator[None]:
    """Make it the meter of the request at hand."""
    token = _current.set(meter)
    try:
        yield
    finally:
        _current.reset(token)


def own_salt(cache_salt: str | None) -> str | None:
    """A request's `cache_salt` within its account, so that two accounts never have the same."""
    meter = _current.get()
    if meter is None or not meter.account.cache_salt:
        return cache_salt
    return f"{meter.account.cache_salt}:{cache_salt or ''}"


class Meters(Collector):
    """One meter for each account that has come by, and what they counted, for Prometheus."""

    def __init__(self) -> None:
        self._meters: dict[str, Meter] = {}

    def of(self, account: Account) -> Meter:
        meter = self._meters.get(account.id)
        if meter is None:
            meter = self._meters[account.id] = Meter(account)
        return meter

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("tokenloom:key_requests", "Requests by key.", labels=["key"])
        tokens = CounterMetricFamily("tokenloom:key_tokens", "Tokens by key.", labels=["key", "kind"])
        refused = CounterMetricFamily(
            "tokenloom:key_refused", "Requests refused by a key's limit.", labels=["key", "limit"]
        )
        for key, meter in list(self._meters.items()):
            requests.add_metric([key], meter.taken["requests"])
            for kind in ("prompt", "completion"):
                tokens.add_metric([key, kind], meter.taken[kind])
            for limit, count in meter.refused.items():
                refused.add_metric([key, limit], count)
        return iter((requests, tokens, refused))


class KeyLimits:
    """Holds accounts to their limits; stands behind `KeyCheck`."""

    def __init__(self, app: ASGIApp, meters: Meters) -> None:
        self.app = app
        self.meters = meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        account = scope.get("state", {}).get("account")
        if account is None:
            return await self.app(scope, receive, send)
        meter = self.meters.of(account)

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": list(message.get("headers", ()))}
                headers = MutableHeaders(scope=message)
                for name, value in meter.headers():
                    headers[name] = value
            await send(message)

        try:
            meter.admit()
        except ApiError as error:
            return await refuse(error, scope, receive, send_with_limits)
        meter.at_work += 1
        try:
            with metered(meter):
                await self.app(scope, receive, send_with_limits)
        finally:
            meter.at_work -= 1


def _duration(seconds: float) -> str:
    """As OpenAI writes it: `6m0s`, `1.5s`, `20ms`."""
    if 0 < seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(seconds, 60)
    text = f"{round(rest, 3):g}s"
    return f"{int(minutes)}m{text}" if minutes else text
