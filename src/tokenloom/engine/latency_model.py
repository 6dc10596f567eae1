"""How many milliseconds an iteration will take, known before it runs."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import mul
from pathlib import Path
from statistics import median

import numpy as np

from tokenloom.engine.nnls import nnls
from tokenloom.errors import TokenloomError

ROW_KINKS = (2, 8, 48)
"""Rows at which the time of one more row may change.

The weights are read once per batch, so the first row is dear. On CPUs the step from one row to two is a
step from matrix-vector to matrix-matrix products; rows up to about 8 ride on the same read, and from about
48 the products are bound by arithmetic. The slope between two kinks may be smaller or larger than the one
before: on GPUs the later one is larger."""

HEAD_KINKS = (2, 8)
"""The same for rows of the output head, which is one large product of its own."""

BASIS = f"1;rows={ROW_KINKS};head={HEAD_KINKS}"
"""Goes into the key of a saved model: coefficients mean nothing under another basis."""

EWMA_WEIGHT = 0.15
WINDOW = 256
"""How many recent residuals the 95th percentile is taken from."""

Key = Mapping[str, str | int]
"""What a profile holds for: model hash, machine, dtype, threads, backend, device."""


class LatencyModelError(TokenloomError):
    """A latency model cannot be fitted to these samples."""


@dataclass(slots=True)
class Features:
    """What the time of one iteration depends on. Adding two gives those of both done in one iteration.

    Attributes:
        rows: all rows of the batch, N.
        context: sum of position + 1 over the rows: the keys that attention reads.
        head_rows: rows whose logits are computed.
        train_rows: those of `rows` that belong to a finetuning window.
        bwd_quanta, bwd_rows, bwd_context: backward pieces (one layer, window [b, e) of s rows): how many,
            sum of s, sum of s * e.
        loss_quanta, loss_rows: pieces of the head's gradient and their rows.
        optimizer: optimizer steps.
    """

    rows: int = 0
    context: int = 0
    head_rows: int = 0
    train_rows: int = 0
    bwd_quanta: int = 0
    bwd_rows: int = 0
    bwd_context: int = 0
    loss_quanta: int = 0
    loss_rows: int = 0
    optimizer: int = 0

    def __add__(self, other: Features) -> Features:
        return Features(
            self.rows + other.rows,
            self.context + other.context,
            self.head_rows + other.head_rows,
            self.train_rows + other.train_rows,
            self.bwd_quanta + other.bwd_quanta,
            self.bwd_rows + other.bwd_rows,
            self.bwd_context + other.bwd_context,
            self.loss_quanta + other.loss_quanta,
            self.loss_rows + other.loss_rows,
            self.optimizer + other.optimizer,
        )


def basis(f: Features) -> tuple[int, ...]:
    """The terms that the time is a sum of, each non-decreasing in every feature."""
    return (
        1 if f.rows else 0,
        *_ramps(f.rows, ROW_KINKS),
        f.context,
        1 if f.head_rows else 0,
        *_ramps(f.head_rows, HEAD_KINKS),
        1 if f.train_rows else 0,
        f.train_rows,
        f.bwd_quanta,
        f.bwd_rows,
        f.bwd_context,
        f.loss_quanta,
        f.loss_rows,
        f.optimizer,
    )


@lru_cache(maxsize=8192)
def _ramps(n: int, kinks: tuple[int, ...]) -> tuple[int, ...]:
    """How much of 0..n lies between each kink and the next; the last piece is open."""
    edges = (0, *kinks)
    ends = (*kinks, n)
    return tuple(max(0, min(n, end) - edge) for edge, end in zip(edges, ends, strict=True))


Kind = tuple[bool, bool]
"""What shares a margin: (backward work?, one row per request and no more?). Backward pieces and batches of
decodes repeat themselves closely; a prompt varies more, and should not make the others look uncertain."""

Bucket = tuple[bool, bool, int]


def bucket(f: Features) -> Bucket:
    """What shares a correction: (backward work?, finetuning rows?, rows up to the next power of two)."""
    backward = f.bwd_quanta > 0 or f.loss_quanta > 0 or f.optimizer > 0
    return backward, f.train_rows > 0, f.rows.bit_length()


def kind(f: Features) -> Kind:
    return f.bwd_quanta > 0 or f.loss_quanta > 0 or f.optimizer > 0, f.rows - f.train_rows <= f.head_rows


class LatencyModel:
    """t = beta · basis(features), beta >= 0; fitted offline (FlexLLM, arXiv 2402.18789), corrected online.

    Three figures of increasing caution: `predict` is the fit; a bucket's correction follows a machine that
    has become slower or faster since; `planned` adds the margin by which 95% of recent iterations of the kind
    stayed below what was planned for them.

    Args:
        beta: coefficients in ms, one for each term of `basis`.
        residuals: measured / predicted of the samples it was fitted to; the margin starts from them.
        key: what the profile holds for.
    """

    def __init__(self, beta: Sequence[float], residuals: Sequence[float], key: Key) -> None:
        self.beta = tuple(beta)
        self.key = dict(key)
        self.fit_residuals = tuple(residuals)[-WINDOW:]
        self._residuals: dict[Kind, deque[float]] = {}
        self._margins: dict[Kind, float] = {}
        self._corrections: dict[Bucket, float] = {}
        self._recent: dict[Bucket, deque[float]] = {}
        self._overall = 1.0  # the correction of buckets that have not been seen yet
        self._first_margin = _percentile_95(self.fit_residuals)

    @classmethod
    def fit(cls, samples: Sequence[tuple[Features, float]], key: Key | None = None) -> LatencyModel:
        """Fit to (features, measured ms) so that relative errors are small.

        A feature that is zero in all samples costs nothing in the fit: the profile must cover it.

        Raises:
            LatencyModelError: no samples, or one without rows or work, or with a time that is not positive.
        """
        if not samples:
            raise LatencyModelError("no samples to fit the latency model to")
        for features, measured_ms in samples:
            if not (math.isfinite(measured_ms) and measured_ms > 0.0 and any(basis(features))):
                raise LatencyModelError(f"cannot fit {measured_ms} ms for {features}")
        times = np.array([measured_ms for _, measured_ms in samples])
        terms = np.array([basis(features) for features, _ in samples], dtype=np.float64)
        # Dividing each row by its time turns squared errors into squared relative errors.
        beta = nnls(terms / times[:, None], np.ones(len(times)))
        predicted = terms @ beta
        residuals = times[predicted > 0.0] / predicted[predicted > 0.0]
        return cls(beta.tolist(), residuals.tolist(), key or {})

    def predict(self, features: Features) -> float:
        """Milliseconds by the profile alone. Never falls when a feature grows."""
        return sum(map(mul, self.beta, basis(features)))

    def corrected(self, features: Features) -> float:
        """Milliseconds as the machine runs now."""
        return self.predict(features) * self._corrections.get(bucket(features), self._overall)

    def planned(self, features: Features) -> float:
        """Milliseconds that 95% of such iterations stay below."""
        return self.corrected(features) * self.margin(features)

    def margin(self, features: Features) -> float:
        """How much more than foretold 95% of such iterations take at most; never below 1."""
        shared = kind(features)
        if shared not in self._residuals:
            return self._first_margin
        if shared not in self._margins:  # sorted when it is asked for: drafts never ask
            self._margins[shared] = _percentile_95(self._residuals[shared])
        return self._margins[shared]

    def observe(self, features: Features, measured_ms: float) -> None:
        """Learn from an iteration that ran.

        The bucket's correction is an exponentially weighted mean of measured / predicted. What enters is
        the median of the last three ratios, each clipped to [1/3, 3], so one stall changes nothing and a
        slower machine shows from its second iteration.
        """
        predicted = self.predict(features)
        if not (predicted > 0.0 and 0.0 < measured_ms < math.inf):
            return
        where = bucket(features)
        before = self._corrections.get(where, self._overall)
        recent = self._recent.setdefault(where, deque([before, before], maxlen=3))
        recent.append(min(max(measured_ms / predicted, 1 / 3), 3.0))
        ratio = median(recent)
        self._corrections[where] = before + EWMA_WEIGHT * (ratio - before)
        self._overall += EWMA_WEIGHT * (ratio - self._overall)
        shared = kind(features)
        if shared not in self._residuals:
            self._residuals[shared] = deque(self.fit_residuals, maxlen=WINDOW)
        self._residuals[shared].append(measured_ms / (predicted * before))
        self._margins.pop(shared, None)

    def save(self, path: Path) -> None:
        """Write the fit with its key; what was learned online is not kept. Readers see all of it or none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"key": full_key(self.key), "beta": self.beta, "residuals": self.fit_residuals}
        temporary = path.with_suffix(f".{os.getpid()}.part")
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path, key: Key) -> LatencyModel | None:
        """The saved model; None if there is none, its key differs, or the file is damaged."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["key"] != full_key(key):
                return None
            beta = [float(value) for value in content["beta"]]
            residuals = [float(value) for value in content["residuals"]]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        whole = len(beta) == len(basis(Features())) and all(0.0 <= value < math.inf for value in beta)
        if not (whole and all(0.0 < value < math.inf for value in residuals)):
            return None
        return cls(beta, residuals, key)


def _percentile_95(residuals: Sequence[float]) -> float:
    ordered = sorted(residuals)
    return max(1.0, ordered[math.ceil(0.95 * len(ordered)) - 1]) if ordered else 1.0


def full_key(key: Key) -> dict[str, str | int]:
    return {**key, "basis": BASIS}


def bisect_rows(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest n in 0..limit with fits(n), or 0 if there is none.

    `fits` should be true up to some n and false from there on. Where it is not (corrections differ between
    buckets), the answer is still an n that was seen to fit, or 0.
    """
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
