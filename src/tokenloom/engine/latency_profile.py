"""What is measured to fit a latency model, and where the fit is kept."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tokenloom.engine.latency_model import Features, Key, full_key

if TYPE_CHECKING:
    from tokenloom.engine.engine import Engine

DECODE_ROWS = (1, 2, 4, 8, 16)
CONTEXTS = (64, 512, 2048)
TRAIN_ROWS = (1, 4, 16, 64, 256)
PREFILL_ROWS = (16, 64, 256)
BACKWARD_ROWS = (4, 16, 64, 256)
BACKWARD_ENDS = (256, 1024)


@dataclass(frozen=True, slots=True)
class Cell:
    """One iteration to time.

    Attributes:
        decode_rows: sequences in decode, each reading `context` keys.
        prefill_rows: rows of one prompt, starting at its first token; its last row gets logits.
        train_rows: rows of a finetuning window, starting at its sequence's first token; no logits.
        bwd_rows, bwd_end: one backward piece, window [bwd_end - bwd_rows, bwd_end) of one layer.
        loss_rows: rows of one piece of the head's gradient.
        optimizer: optimizer steps, 0 or 1.
    """

    decode_rows: int = 0
    context: int = 0
    prefill_rows: int = 0
    train_rows: int = 0
    bwd_rows: int = 0
    bwd_end: int = 0
    loss_rows: int = 0
    optimizer: int = 0

    def features(self) -> Features:
        prefill, train = self.prefill_rows, self.train_rows
        return Features(
            rows=self.decode_rows + prefill + train,
            context=self.decode_rows * self.context + _triangle(prefill) + _triangle(train),
            head_rows=self.decode_rows + min(prefill, 1),
            train_rows=train,
            bwd_quanta=min(self.bwd_rows, 1),
            bwd_rows=self.bwd_rows,
            bwd_context=self.bwd_rows * self.bwd_end,
            loss_quanta=min(self.loss_rows, 1),
            loss_rows=self.loss_rows,
            optimizer=self.optimizer,
        )


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


def profile_grid() -> list[Cell]:
    """The cells to time, cheap ones first within each kind.

    Decodes alone and beside a finetuning window; a prompt alone and a window alone, which tell the cost of
    a row from that of a finetuning row; then each kind of backward work by itself.
    """
    cells = [
        Cell(decode_rows=rows, context=context, train_rows=train)
        for rows, context, train in product(DECODE_ROWS, CONTEXTS, (0, *TRAIN_ROWS))
    ]
    cells += [Cell(prefill_rows=rows) for rows in PREFILL_ROWS]
    cells += [Cell(train_rows=rows) for rows in TRAIN_ROWS]
    cells += [Cell(bwd_rows=rows, bwd_end=end) for rows, end in product(BACKWARD_ROWS, BACKWARD_ENDS)]
    cells += [Cell(loss_rows=rows) for rows in BACKWARD_ROWS]
    return [*cells, Cell(optimizer=1)]


def machine_key() -> str:
    """The processor's name and its number of cores, e.g. `AMD EPYC 7763 x 16`."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:  # not Linux
        name = name or platform.system()
    return f"{name} x {os.cpu_count()}"


def profile_key(engine: Engine) -> Key:
    """What a profile holds for: the model's shape, the machine, the arithmetic and its threads."""
    shape = hashlib.sha256(repr((engine.config, engine.decoder.num_bytes)).encode()).hexdigest()[:16]
    return {
        "model": f"{engine.name} {shape}",
        "machine": machine_key(),
        "dtype": str(engine.dtype),
        "threads": torch.get_num_threads(),
        "backend": engine.decoder.kernels.name,
        "device": str(engine.device),
    }


def cache_path(home: Path, key: Key) -> Path:
    """Where the fit for this key is kept, under `home`/latency."""
    digest = hashlib.sha256(json.dumps(full_key(key), sort_keys=True).encode()).hexdigest()
    return home / "latency" / f"{digest[:16]}.json"
