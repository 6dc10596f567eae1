"""Samples on their way forward through the layers and back, cut wherever the scheduler says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from tokenloom.batch import BatchBuilder, Keep, SegmentKind
from tokenloom.cache.block_table import BlockTable
from tokenloom.engine.engine import Engine
from tokenloom.engine.latency_model import Features
from tokenloom.finetune.backward import Kept, LayerBackward, Window
from tokenloom.finetune.data import Sample
from tokenloom.finetune.objective import LossSums, Objective
from tokenloom.finetune.retained import Retain, Retained, blocks_needed
from tokenloom.kernels import KVSpan
from tokenloom.models.adapters.adapter import Adapter

KeepFor = Callable[[int, int], Keep | None]
"""(begin, end) -> dropout of those rows of the pass."""


LOSS_ROWS, MOST_LOSS_ROWS = 64, 256
"""Logits of so many rows exist at a time, or of a quarter of a long pass, whose activations take more memory
than they do: the head is read once for all of them."""


class Pass(Protocol):
    """One way of some samples through the model: forward rows in the engine's batches, then pieces."""

    num_rows: int

    def forward_left(self) -> int:
        """Rows whose forward pass is still to come."""

    def context(self, rows: int) -> int:
        """Tokens that the next `rows` rows read in all, each its own included."""

    def add_rows(self, builder: BatchBuilder, rows: int) -> None:
        """Add the next rows to a batch; `forward_done` follows once it has run."""

    def forward_done(self, rows: int) -> None: ...

    def piece_rows(self) -> int:
        """Rows of the largest piece that can be run now, once the forward is done."""

    def piece_features(self, rows: int) -> Features: ...

    def run_piece(self, rows: int) -> None:
        """Run the next piece, at most `rows` rows of it."""

    @property
    def done(self) -> bool: ...

    def sums(self) -> dict[str, float]:
        """Of the whole pass, by name: `loss` (weighted), `weight`, predictions that are right (`correct`) and
        all of them (`n`), and others that an evaluation adds up."""

    def release(self) -> None:
        """Give every block back."""


class Phase(Enum):
    FORWARD = "forward"
    LOSS = "loss"
    BACKWARD = "backward"
    DONE = "done"


@dataclass(slots=True)
class _Segment:
    """One sample of the pass: its rows are `start .. start + len(tokens)`."""

    start: int
    tokens: list[int]
    table: BlockTable


class TrainingPass:
    """Rows of all its samples, one after another; T in all.

    A sample's last token has no successor, and what comes after its last token with a weight changes
    nothing: neither is computed. The phases are forward (windows of rows, in the engine's own batches), loss
    (windows of the rows that have a label; the logits of a whole sequence never exist) and backward (layer by
    layer from the top, each in windows from the right). Every window's size is free.

    Args:
        engine: its weights compute the pass, its pool holds it.
        retain: which activations are kept (see `finetune.retained`).
        grads: a tensor like `adapter.flat` to which gradients are added; None: the loss alone is wanted.
        scale: 1 over the sum of all weights that one optimizer step sees.

    Raises:
        OutOfBlocks: the pool has too few blocks for the pass; nothing is held then.
    """

    def __init__(
        self,
        engine: Engine,
        adapter: Adapter,
        samples: Sequence[Sample],
        objective: Objective,
        *,
        retain: Retain = "lean",
        grads: Tensor | None = None,
        scale: float = 1.0,
        keep_for: KeepFor = lambda begin, end: None,
    ) -> None:
        model, kv, pool = engine.decoder, engine.kv, engine.pool
        self.model, self.kv, self.pool = model, kv, pool
        self.adapter, self.objective = adapter, objective
        self.scale, self.keep_for = scale, keep_for
        self.grads = None if grads is None else adapter.views(grads)
        self.segments: list[_Segment] = []
        labels: list[int] = []
        weights: list[float] = []
        for sample in samples:
            end = max(i for i, weight in enumerate(sample.weights) if weight > 0)
            self.segments.append(_Segment(len(labels), sample.tokens[:end], BlockTable(pool)))
            labels += sample.tokens[1 : end + 1]
            weights += sample.weights[1 : end + 1]
        self.num_rows = len(labels)
        self.weight = sum(weights)
        self.retained: Retained | None = None
        try:
            blocks = [-(-len(segment.tokens) // pool.block_size) for segment in self.segments]
            kept = 0 if grads is None else blocks_needed(model.config, self.num_rows, retain, pool.block_size)
            # At the pool's far end, pass after pass in the same memory: fresh pages would cost more than
            # what is written to them, and requests keep the near end for themselves.
            last = pool.num_blocks - sum(blocks) - kept - 1
            for segment in self.segments:
                segment.table.grow(len(segment.tokens), after=last)
                last = segment.table.blocks[-1]
            if grads is not None:
                self.retained = Retained(model.config, kv, pool, self.num_rows, retain, after=last)
        except BaseException:
            self.release()
            raise
        device, config = model.device, model.config
        self.labels = torch.tensor(labels, device=device)
        self.weights = torch.tensor(weights, device=device, dtype=torch.float32)
        self.labelled = [row for row, weight in enumerate(weights) if weight > 0]
        self.labelled_here = torch.tensor(self.labelled, device=device)
        with torch.inference_mode():
            # First the last layer's output, then, window by window, the gradient of the loss by it.
            self.hidden = torch.empty(self.num_rows, config.hidden_size, dtype=model.dtype, device=device)
            positions = [i for segment in self.segments for i in range(len(segment.tokens))]
            cos, sin = model.rope.cos_sin(torch.tensor(positions, device=device))
            self.rotation = model.kernels.rotation(cos, sin, model.dtype)
            self.inverse_rotation = model.kernels.rotation(cos, -sin, model.dtype)
            shape = (config.num_kv_heads, self.num_rows if grads is not None else 0, config.head_dim)
            self.dk = torch.zeros(shape, dtype=model.dtype, device=device)
            self.dv = torch.zeros(shape, dtype=model.dtype, device=device)
            self.loss = torch.zeros((), dtype=torch.float64, device=device)
            self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.backward = LayerBackward(model, kv)
        self.position = 0
        self.layer = config.num_layers - 1
        self.end = self.num_rows
        self.num_losses = 0
        self.phase = Phase.FORWARD

    # -- forward ----------------------------------------------------------------------------------------

    def forward_left(self) -> int:
        """Rows whose forward pass is still to come."""
        return self.num_rows - self.position

    def context(self, rows: int) -> int:
        """Tokens that the next `rows` rows read in all, each its own included."""
        total, begin, end = 0, self.position, self.position + rows
        for segment, first, last in self._within(begin, end):
            a, b = first - segment.start, last - segment.start
            total += (b * (b + 1) - a * (a + 1)) // 2
        return total

    def add_rows(self, builder: BatchBuilder, rows: int) -> None:
        """Add the next rows to a batch; `forward_done` follows once it has run."""
        begin, end = self.position, self.position + rows
        start = builder.num_rows
        for segment, first, last in self._within(begin, end):
            builder.add(
                SegmentKind.TRAIN,
                segment.tokens[first - segment.start : last - segment.start],
                segment.table.blocks,
                kv_start=first - segment.start,
                block_size=self.pool.block_size,
                contiguous=segment.table.contiguous,
                logits="none",
            )
        builder.through(self.adapter.layers, start, self.keep_for(begin, end))
        builder.taps.append(_Capture(self, slice(start, builder.num_rows), begin))

    def forward_done(self, rows: int) -> None:
        self.position += rows
        if self.position == self.num_rows:
            self.phase = Phase.LOSS

    def _within(self, begin: int, end: int) -> list[tuple[_Segment, int, int]]:
        """The samples that rows `begin .. end` touch, each with its part of them."""
        parts = []
        for segment in self.segments:
            first, last = max(begin, segment.start), min(end, segment.start + len(segment.tokens))
            if first < last:
                parts.append((segment, first, last))
        return parts

    # -- pieces -----------------------------------------------------------------------------------------

    def piece_rows(self) -> int:
        if self.phase is Phase.LOSS:
            at_once = min(MOST_LOSS_ROWS, max(LOSS_ROWS, self.num_rows // 4))
            return min(at_once, self.losses_left())
        return self.backward_left()

    def piece_features(self, rows: int) -> Features:
        if self.phase is Phase.LOSS:
            return Features(loss_quanta=1, loss_rows=rows)
        return Features(bwd_quanta=1, bwd_rows=rows, bwd_context=self.backward_context(rows))

    def run_piece(self, rows: int) -> None:
        if self.phase is Phase.LOSS:
            self.run_loss(rows)
        else:
            self.run_backward(rows)

    @property
    def done(self) -> bool:
        return self.phase is Phase.DONE

    def sums(self) -> dict[str, float]:
        return {
            "loss": float(self.loss),
            "weight": self.weight,
            "correct": int(self.correct),
            "n": len(self.labelled),
        }

    # -- loss -------------------------------------------------------------------------------------------

    def losses_left(self) -> int:
        """Rows whose loss is still to be computed."""
        return len(self.labelled) - self.num_losses

    @torch.inference_mode()
    def run_loss(self, rows: int) -> None:
        """Loss of the next `rows` labelled rows, and its gradient in place of their hidden states."""
        model, eps = self.model, self.model.config.rms_norm_eps
        first, last = self.num_losses, self.num_losses + rows
        at = self.labelled_here[first:last]
        x = self.hidden[at]
        logits = model.logits(model.kernels.rms_norm(x, model.norm, eps))
        labels, weights = self.labels[at], self.weights[at].to(logits.dtype)
        if self.grads is None:
            self._add_loss(self.objective.evaluate(logits, labels, weights))
        else:
            sums, d_logits = self.objective.backward(logits, labels, weights)
            self._add_loss(sums)
            d_normed = model.kernels.linear_backward(d_logits, model.head).mul_(
                (weights * self.scale)[:, None]
            )
            # Rows before and between the labelled ones have no loss of their own.
            begin = self.labelled[first - 1] + 1 if first else 0
            self.hidden[begin : self.labelled[last - 1] + 1] = 0
            d_hidden = torch.zeros_like(x)
            model.kernels.rms_norm_backward(d_hidden, d_normed, x, model.norm, eps)
            self.hidden[at] = d_hidden
        self.num_losses = last
        if last == len(self.labelled):
            self.phase = Phase.DONE if self.grads is None else Phase.BACKWARD

    def _add_loss(self, sums: LossSums) -> None:
        self.loss += sums.loss
        self.correct += sums.correct

    # -- backward ---------------------------------------------------------------------------------------

    def backward_left(self) -> int:
        """Rows left in the layer at hand; layers below it come after them."""
        return self.end

    def backward_context(self, rows: int) -> int:
        """Pairs of (row, key) of the next window, masked ones included."""
        begin = self.end - rows
        return sum(
            (last - first) * (last - segment.start) for segment, first, last in self._within(begin, self.end)
        )

    @torch.inference_mode()
    def run_backward(self, rows: int) -> None:
        """Backward of the last `rows` rows that are left in the layer at hand."""
        assert self.grads is not None and self.retained is not None
        n, begin, end = self.layer, self.end - rows, self.end
        parts = self._within(begin, end)
        window = Window(
            index=n,
            layer=self.model.layers[n],
            begin=begin,
            end=end,
            spans=[self._span(segment, first - begin, first, last) for segment, first, last in parts],
            firsts=[segment.start for segment, _, _ in parts],
            rotation=self._rows(self.rotation, begin, end),
            inverse_rotation=self._rows(self.inverse_rotation, begin, end),
            bypasses=self.adapter.layers[n],
            grads=self.grads[n],
            keep=self.keep_for(begin, end),
        )
        read, sites = self.retained.read, self.retained.sites
        kept = Kept(
            x=read(n, "input", begin, end),
            residual=read(n, "residual", begin, end) if "residual" in sites else None,
            query=read(n, "query", begin, end) if "query" in sites else None,
            attended=read(n, "attended", begin, end) if "attended" in sites else None,
            # 16 bits are too few for an exponent: attention is computed again.
            log_sums=read(n, "log_sums", begin, end).contiguous()
            if "log_sums" in sites and self.model.dtype.itemsize >= 4
            else None,
            gate_up=read(n, "gate_up", begin, end) if "gate_up" in sites else None,
        )
        self.backward.run(window, kept, self.hidden[begin:end], self.dk, self.dv, need_dx=n > 0)
        self.end = begin
        if begin == 0:
            self.layer, self.end = n - 1, self.num_rows
            self.dk.zero_()
            self.dv.zero_()
            if n == 0:
                self.phase = Phase.DONE

    def _span(self, segment: _Segment, start: int, first: int, last: int) -> KVSpan:
        """What rows `first .. last` of a sample read, at row `start` of a window."""
        kv_len = last - segment.start
        blocks = segment.table.blocks[: -(-kv_len // self.pool.block_size)]
        return KVSpan(start, last - first, kv_len, blocks, segment.table.contiguous)

    @staticmethod
    def _rows(rotation: tuple[Tensor, Tensor], begin: int, end: int) -> tuple[Tensor, Tensor]:
        return rotation[0][begin:end], rotation[1][begin:end]

    def release(self) -> None:
        """Give every block back."""
        for segment in self.segments:
            segment.table.clear()
        if self.retained is not None:
            self.retained.release()


class _Capture:
    """Keeps the activations of a window's rows, at the rows' own place in the pass."""

    def __init__(self, owner: TrainingPass, rows: slice, begin: int) -> None:
        self.owner = owner
        self.rows = rows
        self.begin = begin
        retained = owner.retained
        self.sites = frozenset({"input"}) if retained is None else retained.sites

    def save(self, layer: int, site: str, value: Tensor) -> None:
        owner = self.owner
        if layer == len(owner.model.layers):
            owner.hidden[self.begin : self.begin + len(value)] = value
        elif owner.retained is not None:
            owner.retained.write(layer, site, self.begin, value)

    def units(self) -> dict[str, Tensor]:
        retained, end = self.owner.retained, self.begin + self.rows.stop - self.rows.start
        return (
            {} if retained is None else {site: retained.units(site, self.begin, end) for site in self.sites}
        )
