"""FASA: a few frequency chunks of RoPE say which tokens a head would read."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenloom.cache.cached_tokens import CachedTokens
from tokenloom.cache.policy import KVPolicy, SequenceShape
from tokenloom.errors import RequestError
from tokenloom.methods.calibration import load
from tokenloom.methods.kv.budget import at_least, check_budget, one_of, tokens_of
from tokenloom.methods.kv.fasa_calibration import CHUNKINGS, chunk_dims
from tokenloom.methods.kv.parts import Selector
from tokenloom.methods.kv.selection import DecodeSelection
from tokenloom.methods.registry import method


@method(
    "fasa",
    hook="kv",
    title="FASA: Frequency-aware Sparse Attention",
    arxiv="2602.03152",
    claim="a quarter of its key dimensions tell each head which tokens are worth reading; drops nothing",
)
@dataclass(frozen=True)
class Fasa(Selector):
    """Token importance prediction over a head's dominant chunks, then attention on the best tokens alone
    (Section 4). `tokenloom calibrate fasa` says once per model which chunks those are.

    Attributes:
        budget: tokens that a head reads, or the part of what is cached (the paper's ratio).
        n_tip: chunks that predict; 0: an eighth of the head's dimensions, so a quarter of its numbers (the
            paper's 16 of 64 chunks).
        chunking: pair: dimensions that RoPE turns together; adjacent: as the released code has it.
        skip_layers: the first layers, which read everything.
        n_sink: of the budget, so many are the first tokens; the paper's is 0.
        n_local: and so many the last, the row's own included; the paper's is 0, here at least 1.
        group: q: each head has its own chunks and tokens (the paper's); kv: the heads of a group share them,
            by their summed agreement and their summed query.
        mode: c: the compute tier. m: the memory tier, whose bytes are counted (see `Tiers`).
        calib_k: agreement is taken from this many top tokens; 0: from the size nearest to the budget.
    """

    budget: int | float = 256
    n_tip: int = 0
    chunking: str = "pair"
    skip_layers: int = 1
    n_sink: int = 4
    n_local: int = 32
    group: str = "q"
    mode: str = "c"
    calib_k: int = 0

    def __post_init__(self) -> None:
        check_budget(self.budget)
        at_least(0, n_tip=self.n_tip, skip_layers=self.skip_layers, n_sink=self.n_sink, calib_k=self.calib_k)
        at_least(0, n_local=self.n_local)
        one_of(CHUNKINGS, chunking=self.chunking)
        one_of(("q", "kv"), group=self.group)
        one_of(("c", "m"), mode=self.mode)
        if self.budget > 1 and self.n_sink + max(1, self.n_local) >= self.budget:
            raise ValueError("n_sink and n_local leave nothing of the budget to choose")

    def policy(self, shape: SequenceShape) -> KVPolicy:
        return FasaPolicy(self, shape, dominant_chunks(self, shape))


def dominant_chunks(knobs: Fasa, shape: SequenceShape) -> Tensor:
    """The chunks of highest agreement, `[L, heads, n_tip]`, ascending; heads: Hq, or Hk where they share.

    Raises:
        RequestError: (param "kv") the model has not been calibrated, or n_tip is more than it has.
    """
    n_tip = knobs.n_tip or max(1, shape.head_dim // 8)
    if n_tip > shape.head_dim // 2:
        raise RequestError(f"kv: fasa: n_tip is {n_tip}; heads have {shape.head_dim // 2} chunks", param="kv")
    measured = load("fasa", shape)
    sizes = measured["sizes"].tolist()
    wanted = knobs.calib_k or tokens_of(knobs.budget, shape.prompt_tokens)
    nearest = min(range(len(sizes)), key=lambda i: abs(math.log(sizes[i] / wanted)))
    agreement = measured[knobs.chunking][nearest].float().transpose(1, 2)  # [L, Hq, D / 2]
    if knobs.group == "kv":
        agreement = agreement.unflatten(1, (shape.num_kv_heads, -1)).sum(2)
    return agreement.topk(n_tip).indices.sort().values


@dataclass
class Tiers:
    """What FASA-M would hold and move, in bytes of keys and values as the pool stores them.

    A machine without an accelerator has one memory: nothing is moved, and the answers are those of mode c.

    Attributes:
        fast_bytes: dominant key columns, and the rows fetched last, of all layers that choose.
        slow_bytes: everything else of those layers.
        fetched_bytes: moved from slow to fast so far: rows that the last step of their layer had not fetched.
        reused_bytes: and those that it had.
    """

    fast_bytes: int = 0
    slow_bytes: int = 0
    fetched_bytes: int = 0
    reused_bytes: int = 0


class FasaPolicy(DecodeSelection):
    """Holds a copy of the dominant key columns of each layer, `[Hk, tokens, columns]`, in token order.

    Where heads of a group have chunks of their own, a copy has all columns that any of them needs, and a
    head's query is zero in the others: keys are not copied, nor read, once for each head.
    """

    def __init__(self, knobs: Fasa, shape: SequenceShape, chunks: Tensor) -> None:
        super().__init__(shape)
        self.knobs = knobs
        self.local = max(1, knobs.n_local)
        self.columns, self.weights = _columns(chunks, shape, knobs.chunking)
        self.copies: dict[int, Tensor] = {}
        self.copied: dict[int, int] = {}
        self.dropped = 0
        self.tip_bytes = 0
        """Read of the copies so far, to choose."""
        self.tiers = Tiers() if knobs.mode == "m" else None
        self.fetched: dict[int, Tensor] = {}

    def attend(self, layer: int, q: Tensor, cached: CachedTokens) -> Tensor | None:
        budget, length = tokens_of(self.knobs.budget, cached.length), cached.length
        if layer < self.knobs.skip_layers or length <= budget:
            return None
        index = self.select(layer, q, cached, budget)
        if self.tiers is not None:
            self._move(self.tiers, layer, index, cached)
        return cached.attend(layer, q, index)

    def select(self, layer: int, q: Tensor, cached: CachedTokens, budget: int) -> Tensor:
        """The tokens that each head reads, ascending `[heads, budget]`: q `[1, Hq, D]`."""
        sinks, end = self.knobs.n_sink, cached.length - self.local
        sinks = min(sinks, max(0, budget - self.local))
        keys = self.dominant_keys(layer, cached)[:, sinks:end]
        columns = self.columns[layer].to(q.device)
        query = q[0].view(self.shape.num_kv_heads, -1, self.shape.head_dim)
        if self.knobs.group == "kv":
            query = query.sum(1, keepdim=True)
        weights = self.weights[layer].to(q.device, q.dtype)
        query = query.gather(2, columns[:, None].expand(-1, query.shape[1], -1)) * weights
        scores = torch.matmul(query, keys.transpose(1, 2)).flatten(0, 1)  # [heads, tokens]
        self.tip_bytes += keys.numel() * keys.element_size()
        count = max(0, budget - sinks - self.local)
        chosen = cached.kernels.largest(scores, count).add_(sinks)
        heads = len(chosen)
        first = torch.arange(sinks, device=q.device).expand(heads, -1)
        last = torch.arange(end, cached.length, device=q.device).expand(heads, -1)
        return torch.cat((first, chosen, last[:, -budget:]), 1)

    def dominant_keys(self, layer: int, cached: CachedTokens) -> Tensor:
        """The dominant columns of all cached keys, the newest included, `[Hk, length, columns]`."""
        if cached.dropped != self.dropped:  # other tokens lie at the same indices now
            self.copied.clear()
            self.fetched.clear()
            self.dropped = cached.dropped
        length = cached.length
        known = min(self.copied.get(layer, 0), length - 1)  # the newest token is always another
        if known < length:
            columns = self.columns[layer].to(cached.slots().device)
            new = cached.keys(layer, known).transpose(0, 1)  # [Hk, new, D]
            new = new.gather(2, columns[:, None].expand(-1, new.shape[1], -1))
            copy = self.copies.get(layer)
            if copy is None or copy.shape[1] < length:
                grown = new.new_empty(len(new), length + length // 4 + 64, new.shape[2])
                if copy is not None:
                    grown[:, :known] = copy[:, :known]
                copy = self.copies[layer] = grown
            copy[:, known:length] = new
            self.copied[layer] = length
        return self.copies[layer][:, :length]

    def _move(self, tiers: Tiers, layer: int, index: Tensor, cached: CachedTokens) -> None:
        """Count what one step of one layer holds and moves. A row moves once for all heads of a group: its
        value, and the columns of its key that are not in the copy."""
        kv_heads, columns, length = self.shape.num_kv_heads, int(self.columns.shape[2]), cached.length
        size = cached.kv.keys[layer].element_size()
        row_bytes = (2 * self.shape.head_dim - columns) * size
        wanted = torch.zeros(kv_heads, length, dtype=torch.bool, device=index.device)
        wanted.scatter_(1, index.view(kv_heads, -1), True)
        before, rows = self.fetched.get(layer), int(wanted.sum())
        reused = 0 if before is None else int((wanted[:, : before.shape[1]] & before).sum())
        self.fetched[layer] = wanted
        tiers.fetched_bytes += (rows - reused) * row_bytes
        tiers.reused_bytes += reused * row_bytes
        tokens = len(self.copied) * kv_heads * length
        fetched = sum(int(rows.sum()) for rows in self.fetched.values())
        tiers.fast_bytes = tokens * columns * size + fetched * row_bytes
        tiers.slow_bytes = tokens * row_bytes


def _columns(chunks: Tensor, shape: SequenceShape, chunking: str) -> tuple[Tensor, Tensor]:
    """Columns that the copy of a layer holds for each kv head, `[L, Hk, C]`, and which of them each of its
    heads uses, `[L, Hk, heads, C]`, 0 or 1. Heads that need fewer than C have some column again, unused."""
    dims = chunk_dims(shape.head_dim, chunking)[chunks].flatten(2)  # [L, heads, 2 * n_tip]
    used = torch.zeros(*dims.shape[:2], shape.head_dim).scatter_(2, dims, 1)
    used = used.unflatten(1, (shape.num_kv_heads, -1))  # [L, Hk, heads, D]
    union = used.amax(2)
    most = int(union.sum(-1).max())
    # The used columns in ascending order, then others.
    columns = union.sort(dim=-1, descending=True, stable=True).indices[..., :most]
    columns = torch.where(union.gather(2, columns) > 0, columns, columns[..., :1])
    first = torch.ones_like(columns, dtype=used.dtype)
    first[..., 1:] = (columns[..., 1:] != columns[..., :1]).to(used.dtype)
    weights = used.gather(3, columns[:, :, None].expand(-1, -1, used.shape[2], -1)) * first[:, :, None]
    return columns, weights
