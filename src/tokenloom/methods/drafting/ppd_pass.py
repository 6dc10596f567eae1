"""Texts on their way through the model, and PPD's prompt tokens behind some of their cuts, in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenloom.batch import BatchBuilder, SegmentKind
from tokenloom.cache.block_table import BlockTable
from tokenloom.engine.draft import GUESSES
from tokenloom.engine.engine import Engine
from tokenloom.engine.latency_model import Features
from tokenloom.kernels import KVSpan
from tokenloom.methods.drafting.ppd_student import Prefix, Student, cached, distances

MOST_ROWS = 64
"""Of prompt tokens whose logits and activations exist at a time."""


@dataclass(slots=True)
class _Text:
    """One text of the pass: its rows are `start .. start + len(tokens)`; `cuts` wait for their prompt tokens.

    ahead: `[len(tokens) + 1]`, the text with the token that follows the rows.
    """

    start: int
    tokens: list[int]
    ahead: Tensor
    cuts: list[int]
    num_cuts: int
    table: BlockTable
    prefix: Prefix | None = None


class PromptPass:
    """Implements `finetune.training_pass.Pass`: one pass over some texts, in the engine's own batches; then
    rows of prompt tokens with gradients, a few cuts a piece.

    The loss of a cut is the mean over prompt tokens i of decay^(i - 1) * KL(teacher || student), the teacher
    being the model at the token that prompt token i stands in for (PPD, arXiv 2405.18628, section 3).

    Args:
        student: computes the prompt tokens' rows.
        vectors: `[S, d]`.
        texts: tokens of each, and where it is cut (see `cuts_of`).
        decay: weight of a prompt token's loss against that of the one before it.
        grads: like `vectors`, gradients of the texts' mean losses times `scale` are added; None: the loss
            alone is wanted.

    Raises:
        OutOfBlocks: the pool has too few blocks for the texts; nothing is held then.
    """

    def __init__(
        self,
        engine: Engine,
        student: Student,
        vectors: Tensor,
        texts: Sequence[tuple[Sequence[int], Sequence[int]]],
        decay: float,
        *,
        grads: Tensor | None,
        scale: float,
    ) -> None:
        self.engine, self.student, self.vectors = engine, student, vectors
        self.grads, self.scale, size = grads, scale, len(vectors)
        self.texts: list[_Text] = []
        self.num_rows = 0
        for tokens, cuts in texts:
            length = max(cuts) + size  # what comes later nobody reads
            ahead = torch.tensor(tokens[: length + 1], device=engine.device)
            row = _Text(
                self.num_rows, list(tokens[:length]), ahead, list(cuts), len(cuts), BlockTable(engine.pool)
            )
            self.texts.append(row)
            self.num_rows += length
        try:  # at the pool's far end: see `TrainingPass`
            last = engine.pool.num_blocks - self._num_blocks() - 1
            for text in self.texts:
                text.table.grow(len(text.tokens), after=last)
                last = text.table.blocks[-1]
        except BaseException:
            self.release()
            raise
        self.hidden = torch.empty(
            self.num_rows, engine.config.hidden_size, dtype=engine.dtype, device=engine.device
        )
        self.weights = decay ** torch.arange(size, dtype=student.wide, device=engine.device)
        self.position = 0
        self.loss = torch.zeros((), dtype=torch.float64, device=engine.device)
        self.right = torch.zeros(size, GUESSES, dtype=torch.int64, device=engine.device)
        """How often the guess of rank r by prompt token i was right."""

    def _num_blocks(self) -> int:
        size = self.engine.pool.block_size
        return sum(-(-len(text.tokens) // size) for text in self.texts)

    # -- forward ----------------------------------------------------------------------------------------

    def forward_left(self) -> int:
        return self.num_rows - self.position

    def context(self, rows: int) -> int:
        return sum(
            (b * (b + 1) - a * (a + 1)) // 2
            for text, first, last in self._within(self.position, self.position + rows)
            for a, b in ((first - text.start, last - text.start),)
        )

    def add_rows(self, builder: BatchBuilder, rows: int) -> None:
        begin, start = self.position, builder.num_rows
        for text, first, last in self._within(begin, begin + rows):
            builder.add(
                SegmentKind.TRAIN,
                text.tokens[first - text.start : last - text.start],
                text.table.blocks,
                kv_start=first - text.start,
                block_size=self.engine.pool.block_size,
                contiguous=text.table.contiguous,
                logits="none",
            )
        builder.taps.append(_LastLayer(self, slice(start, builder.num_rows), begin))

    def forward_done(self, rows: int) -> None:
        self.position += rows

    def _within(self, begin: int, end: int) -> list[tuple[_Text, int, int]]:
        """The texts that rows `begin .. end` touch, each with its part of them."""
        parts = ((t, max(begin, t.start), min(end, t.start + len(t.tokens))) for t in self.texts)
        return [part for part in parts if part[1] < part[2]]

    # -- pieces -----------------------------------------------------------------------------------------

    def piece_rows(self) -> int:
        return min(MOST_ROWS, len(self.vectors) * len(self._text().cuts))

    def piece_features(self, rows: int) -> Features:
        """Forward and backward of a few rows through every layer, and their logits."""
        text, layers = self._text(), self.engine.config.num_layers
        rows = len(self.vectors) * self._cuts(rows)
        context = rows * len(text.tokens)
        return Features(
            rows=rows,
            train_rows=rows,
            context=context,
            bwd_quanta=layers,
            bwd_rows=layers * rows,
            bwd_context=layers * context,
            loss_quanta=1,
            loss_rows=rows,
        )

    def run_piece(self, rows: int) -> None:
        text, count = self._text(), self._cuts(rows)
        if text.prefix is None:
            text.prefix = self._prefix(text)
        cuts, text.cuts = text.cuts[:count], text.cuts[count:]
        vectors = self.vectors.detach().clone().requires_grad_(self.grads is not None)
        losses, said = distances(self.engine, self.student, vectors, cuts, text.prefix)
        losses = (losses * self.weights).mean(1)
        if self.grads is not None:
            (losses.sum() * (self.scale / text.num_cuts)).backward()
            assert vectors.grad is not None
            self.grads += vectors.grad
        self.loss += losses.detach().sum()
        offsets = torch.arange(len(self.vectors), device=self.vectors.device)
        ahead = text.ahead[torch.tensor(cuts, device=offsets.device)[:, None] + 1 + offsets]
        guesses = said.detach().topk(GUESSES).indices
        self.right += (guesses == ahead[..., None]).sum(0)
        if not text.cuts:
            text.prefix = None

    def _cuts(self, rows: int) -> int:
        return max(1, min(rows // len(self.vectors), len(self._text().cuts)))

    def _text(self) -> _Text:
        return next(text for text in self.texts if text.cuts)

    @torch.inference_mode()
    def _hidden(self, text: _Text) -> Tensor:
        decoder = self.engine.decoder
        rows = self.hidden[text.start : text.start + len(text.tokens)]
        return decoder.kernels.rms_norm(rows, decoder.norm, decoder.config.rms_norm_eps)

    def _prefix(self, text: _Text) -> Prefix:
        length = len(text.tokens)
        span = KVSpan(0, length, length, text.table.blocks, text.table.contiguous)
        return Prefix(self._hidden(text), *cached(self.engine, span, self.student.dtype))

    @property
    def done(self) -> bool:
        return self.position == self.num_rows and not any(text.cuts for text in self.texts)

    def sums(self) -> dict[str, float]:
        cuts = sum(text.num_cuts for text in self.texts)
        counts = self.right.tolist()
        sums = {
            "loss": float(self.loss),
            "weight": cuts,
            "correct": sum(row[0] for row in counts),
            "n": cuts * len(counts),
        }
        return sums | {f"right.{i}.{r}": n for i, row in enumerate(counts) for r, n in enumerate(row)}

    def release(self) -> None:
        for text in self.texts:
            text.table.clear()


class _LastLayer:
    """Takes what the last layer puts out for a window's rows to their place in the pass."""

    sites = frozenset({"input"})

    def __init__(self, owner: PromptPass, rows: slice, begin: int) -> None:
        self.owner, self.rows, self.begin = owner, rows, begin

    def save(self, layer: int, site: str, value: Tensor) -> None:
        if layer == self.owner.engine.config.num_layers:
            self.owner.hidden[self.begin : self.begin + len(value)] = value

    def units(self) -> dict[str, Tensor]:
        return {}


def cuts_of(weights: Sequence[float], prompts: int) -> list[int]:
    """Where a text may be cut: the token there, and those that prompt tokens guess, have a weight."""
    return [
        cut
        for cut in range(1, len(weights) - prompts)
        if all(weight > 0 for weight in weights[cut : cut + prompts + 1])
    ]
