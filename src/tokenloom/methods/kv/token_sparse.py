"""Token Sparse Attention: layers of a prompt that leave out the tokens which nobody would read anyway."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenloom.cache.cached_tokens import CachedTokens
from tokenloom.cache.policy import KVPolicy, SequenceShape
from tokenloom.errors import RequestError
from tokenloom.methods.calibration import load
from tokenloom.methods.kv.budget import at_least, one_of, part
from tokenloom.methods.kv.parts import Prefill
from tokenloom.methods.kv.snapkv import window_attention
from tokenloom.methods.registry import method


@method(
    "token_sparse",
    hook="kv",
    title="Token Sparse Attention: Efficient Long-Context Inference with Interleaved Token Selection",
    arxiv="2602.03216",
    claim="long prompts: in half of the layers, attention among the tokens that matter alone",
)
@dataclass(frozen=True)
class TokenSparse(Prefill):
    """Dynamic token coverage (Section 3): in the layers that change their tokens least, each head computes
    attention for a part of the rows over a part of the keys; the rest of the rows get zeros, and the residual
    carries them on. Keys and values of all tokens are cached.

    Attributes:
        tau: attention mass that may be dropped in a layer; larger is sparser, 0 is dense.
        window: the last rows, which say what matters, and are always kept. The paper's is 128, of prompts far
            longer than `rows`; here it would cost half of dense attention's products to choose.
        pool: width of the average over neighbours, odd; 1: none.
        observers: last: the window says what matters (the paper's). random: as many rows by lot, to compare.
        keep: the part of the tokens before the window that every sparse layer keeps, to compare with a part
            that tau finds (the paper's); 0: by tau.
        min_tokens: kept besides the window at least; shorter prompts are dense.
        delta: the part of the layers, those of least drift (`tokenloom calibrate token_sparse`), that leave
            tokens out.
        layers: these layers instead.
        group: q: each head has its own tokens (the paper's); kv: the heads of a group share them.
        chunk: final: prompts of at most `rows` tokens are computed at once (the paper's), longer ones
            densely. local: a prompt is cut every `rows` tokens; each part has a window of its own and leaves
            out rows of its own, and keys of what comes before it.
        rows: of a prompt that choose together; with `local`, more is nearer to the paper.
    """

    tau: float = 0.005
    window: int = 32
    pool: int = 7
    observers: str = "last"
    keep: float = 0.0
    min_tokens: int = 1024
    delta: float = 0.5
    layers: tuple[int, ...] = ()
    group: str = "q"
    chunk: str = "local"
    rows: int = 256

    def __post_init__(self) -> None:
        part(tau=self.tau, delta=self.delta, keep=self.keep)
        one_of(("last", "random"), observers=self.observers)
        at_least(1, window=self.window, pool=self.pool, min_tokens=self.min_tokens, rows=self.rows)
        if self.pool % 2 == 0:
            raise ValueError(f"pool must be odd, not {self.pool}")
        if any(type(layer) is not int or layer < 0 for layer in self.layers):
            raise ValueError("layers must be a list of layers' numbers, from 0")
        one_of(("q", "kv"), group=self.group)
        one_of(("final", "local"), chunk=self.chunk)

    def check(self, max_batch_tokens: int, max_running: int, quantized: bool) -> None:
        if self.rows + max_running > max_batch_tokens:
            raise ValueError(
                f"rows={self.rows} and {max_running} decodes (scheduler.max_running) do not fit "
                f"scheduler.max_batch_tokens={max_batch_tokens}"
            )
        if self.chunk == "final" and self.rows <= self.min_tokens + self.window:
            raise ValueError(
                f"chunk=final leaves nothing out of prompts of at most rows={self.rows} tokens, since "
                f"min_tokens and window are kept; let rows be larger (and scheduler.max_batch_tokens), or "
                f"chunk=local"
            )

    @property
    def changes_prompt(self) -> bool:
        return (self.tau > 0 or self.keep > 0) and (self.delta > 0 or bool(self.layers))

    def policy(self, shape: SequenceShape) -> KVPolicy:
        return TokenSparsePolicy(self, shape, sparse_layers(self, shape) if self.changes_prompt else ())


def sparse_layers(knobs: TokenSparse, shape: SequenceShape) -> tuple[int, ...]:
    """Which layers leave tokens out.

    Raises:
        RequestError: (param "kv") the model's drift has not been measured, or it has fewer layers.
    """
    if knobs.layers:
        if max(knobs.layers) >= shape.num_layers:
            raise RequestError(
                f"kv: token_sparse: there is no layer {max(knobs.layers)}; the model has {shape.num_layers}",
                param="kv",
            )
        return knobs.layers
    drift = load("token_sparse", shape)["drift"]
    return tuple(drift.argsort(stable=True)[: int(knobs.delta * shape.num_layers)].tolist())


class TokenSparsePolicy(KVPolicy):
    """Parts of the prompt begin at multiples of `rows`, whatever else is in the batch; those that end within
    `min_tokens + window` are plain rows to the engine."""

    def __init__(self, knobs: TokenSparse, shape: SequenceShape, layers: tuple[int, ...]) -> None:
        self.knobs, self.shape, self.layers = knobs, shape, frozenset(layers)
        prompt, dense = shape.prompt_tokens, knobs.min_tokens + knobs.window
        fires = bool(layers) and prompt > dense and (knobs.chunk == "local" or prompt <= knobs.rows)
        # The first token of the first part that ends behind `dense`; the prompt's end where there is none.
        self.first = dense // knobs.rows * knobs.rows if fires else prompt
        self.kept: dict[int, list[tuple[int, int]]] = {}
        """By layer: of how many tokens so many were kept, for each part."""

    def rows(self, start: int, wanted: int, most: int) -> int:
        prompt, n = self.shape.prompt_tokens, min(wanted, most)
        if start >= prompt:
            return n
        if start < self.first:
            return min(n, self.first - start)
        n = min(n, prompt - start)
        # Whole parts, so that the choice does not depend on what else is in the batch.
        return n if start + n == prompt else n // self.knobs.rows * self.knobs.rows

    def attends(self, start: int, stop: int) -> bool:
        return self.first <= start < self.shape.prompt_tokens

    def shared_tokens(self, prompt_tokens: int) -> int:
        # Each token's keys depend on the rows that looked back at it, so on what comes after it.
        return prompt_tokens if self.first == self.shape.prompt_tokens else 0

    def attend(self, layer: int, q: Tensor, cached: CachedTokens) -> Tensor | None:
        if layer not in self.layers:
            return None
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        before, keys = cached.length - len(q), cached.keys(layer)
        for begin in range(0, len(q), self.knobs.rows):
            rows = slice(begin, begin + self.knobs.rows)
            part = q[rows]
            kept = self.choose(part, keys[: before + begin + len(part)])
            self.kept.setdefault(layer, []).append((kept.shape[1], before + begin + len(part)))
            out[rows] = attend_kept(layer, part, kept, before + begin, cached)
        return out

    def choose(self, q: Tensor, keys: Tensor) -> Tensor:
        """The tokens that each head keeps, ascending `[heads, kept]`: q `[n, Hq, D]` of the last n of `keys`
        `[L, Hk, D]`. All heads keep as many."""
        length, window = len(keys), min(self.knobs.window, len(q))
        before = length - window
        if self.knobs.observers == "last":
            seen = window_attention(keys.to(q.dtype), q[-window:].contiguous())
        else:
            lot = torch.Generator().manual_seed(length)
            rows = torch.randperm(len(q), generator=lot)[:window].to(q.device)
            seen = attention_of(keys.to(q.dtype), q[rows], rows + length - len(q))
        seen = seen[..., :before].mean(2)
        if self.knobs.pool > 1:
            seen = F.avg_pool1d(seen, self.knobs.pool, stride=1, padding=self.knobs.pool // 2)
        scores = seen.mean(1) if self.knobs.group == "kv" else seen.flatten(0, 1)
        if self.knobs.keep:
            keep = min(before, max(self.knobs.min_tokens, round(self.knobs.keep * before)))
        else:
            keep = kept_tokens(seen.flatten(0, 1).mean(0), self.knobs.tau, self.knobs.min_tokens)
        chosen = scores.topk(keep, sorted=False).indices.sort().values
        last = torch.arange(before, length, device=q.device).expand(len(chosen), -1)
        return torch.cat((chosen, last), 1)


def attention_of(keys: Tensor, queries: Tensor, positions: Tensor) -> Tensor:
    """Causal attention of some rows: keys `[n, Hk, D]`, queries `[W, Hq, D]` at indices `[W]` of them ->
    `[Hk, G, W, n]`."""
    q = queries.unflatten(1, (keys.shape[1], -1)).permute(1, 2, 0, 3)  # [Hk, G, W, D]
    scores = q @ keys.permute(1, 2, 0)[:, None] / math.sqrt(keys.shape[2])
    ahead = torch.arange(len(keys), device=keys.device) > positions[:, None]
    return torch.softmax(scores.masked_fill(ahead, -math.inf), -1)


def kept_tokens(scores: Tensor, tau: float, min_tokens: int) -> int:
    """How many of the tokens before the window a layer keeps, by their scores `[n]`: the smallest go, until
    they hold `tau` of the sum."""
    ascending = (scores / scores.sum()).sort().values
    below = int((ascending.cumsum(0) < tau).sum())
    return len(scores) if below == 0 else min(len(scores), max(min_tokens, len(scores) - below - 1))


def attend_kept(layer: int, q: Tensor, kept: Tensor, start: int, cached: CachedTokens) -> Tensor:
    """Attention of the rows that are kept over the tokens that are, and zeros in the other rows.

    Args:
        q: `[n, Hq, D]`, tokens `start ..` of `cached`.
        kept: `[Hk, m]` or `[Hq, m]`, ascending.
    """
    n, num_heads, head_dim = q.shape
    own = (kept >= start).sum(1)
    most = int(own.max())
    # Rows are as many in every head: one with fewer computes the rows of earlier tokens too, for nothing.
    row = (
        (kept[:, -most:] - start).repeat_interleave(num_heads // len(kept), 0).t().contiguous()
    )  # [most, Hq]
    head = torch.arange(num_heads, device=q.device)
    cells = cached.cells(layer, kept)
    cached.tokens_read += cells.numel()
    attended = cached.kernels.attention_at(q[row.clamp_min(0), head], cached.kv, cells)
    out = q.new_zeros(n + 1, num_heads, head_dim)
    out[torch.where(row < 0, n, row), head] = attended  # row n takes what nobody asked for
    return out[:n]
