"""Token Recycling's table, and where tables are kept."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np

from tokenloom.engine.draft import DraftPlace

logger = logging.getLogger("tokenloom.drafting")

MOST_TABLES = 32
"""Of one engine; the one that was asked for longest ago goes first."""
SAVE_EVERY_S = 30.0
SAVE_AFTER = 64
"""Rows that must be new before a table is written again."""


class Adjacency:
    """The k tokens that were most likely to follow each token when it was last computed, int32 `[V, k]`.

    path: where it is kept; None: nowhere. What lies there is read first, if it fits.
    """

    def __init__(self, vocab_size: int, k: int, path: Path | None = None) -> None:
        self.path = path
        self._new_rows = 0
        self._saved_s = -SAVE_EVERY_S
        stored = _read(path, vocab_size, k) if path is not None else None
        # Ids plus one, so that an empty table is zeros: its memory is taken as rows are written.
        self.cells = np.zeros((vocab_size, k), np.int32) if stored is None else stored

    def successors(self, token: int) -> list[int]:
        """Its k successors, the likeliest first; all -1 where none are known."""
        found: list[int] = (self.cells[token] - 1).tolist()
        return found

    def update(self, tokens: list[int], top: np.ndarray) -> None:
        """Replace whole rows, top `[n, k]`; of a token that is there twice the last one stays."""
        self.cells[tokens] = top + 1
        self._new_rows += len(tokens)

    @property
    def num_bytes(self) -> int:
        return self.cells.nbytes

    def save(self) -> None:
        """Write the table, in a thread, if enough is new and the last time was long enough ago."""
        now = time.monotonic()
        if self.path is None or self._new_rows < SAVE_AFTER or now - self._saved_s < SAVE_EVERY_S:
            return
        self._new_rows, self._saved_s = 0, now
        # Not a daemon: a process that ends right after a request still writes what it learned.
        threading.Thread(target=_write, args=(self.path, self.cells.copy())).start()


class Store:
    """The tables of one engine."""

    def __init__(self) -> None:
        self._tables: OrderedDict[tuple[object, ...], Adjacency] = OrderedDict()

    def table(self, place: DraftPlace, k: int, scope: str) -> Adjacency:
        """The table of an adapter, or of all of them, and of the tenant; at first as it was left on disk."""
        adapter, salt = place.scope
        key = (k, None if scope == "engine" else adapter, salt)
        if key not in self._tables:
            path = None
            if place.home is not None and salt is None:  # what a tenant said stays in memory
                name = hashlib.sha256(repr((place.model, place.vocab_size, *key)).encode()).hexdigest()[:16]
                path = place.home / "drafting" / f"{name}.npy"
            self._tables[key] = Adjacency(place.vocab_size, k, path)
        self._tables.move_to_end(key)
        while len(self._tables) > MOST_TABLES:
            self._tables.popitem(last=False)
        return self._tables[key]

    @property
    def num_bytes(self) -> int:
        return sum(table.num_bytes for table in list(self._tables.values()))


def _read(path: Path, vocab_size: int, k: int) -> np.ndarray | None:
    try:
        cells = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    fits = cells.shape == (vocab_size, k) and cells.dtype == np.int32
    return cells if fits and cells.min() >= 0 and cells.max() <= vocab_size else None


def _write(path: Path, cells: np.ndarray) -> None:
    aside = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            np.save(file, cells)
        os.replace(aside, path)
    except OSError as error:
        logger.warning("what token_recycling learned could not be stored (%s)", error)
