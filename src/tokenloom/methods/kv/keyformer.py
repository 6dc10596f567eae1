"""Keyformer and H2O: of what is older than the recent window, the tokens stay that got the most attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenloom.cache.cached_tokens import CachedTokens
from tokenloom.cache.policy import KVPolicy, SequenceShape
from tokenloom.methods.kv.budget import at_least, check_budget, one_of, part, tokens_of
from tokenloom.methods.kv.causal_logits import causal_logits
from tokenloom.methods.kv.noise import mixed, noise, streams
from tokenloom.methods.kv.parts import Evictor
from tokenloom.methods.registry import method


@method(
    "h2o",
    hook="kv",
    title="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    arxiv="2306.14048",
    claim="memory that does not grow: the newest tokens and those that got the most attention so far",
)
@dataclass(frozen=True)
class H2O(Evictor):
    """Keeps `budget` tokens in each kv head, the last ones and the best by the sum of attention paid to them.

    Attention of a prompt's rows is summed over; a group's query heads count together. Every row after that
    adds its own and drops the worst.

    Attributes:
        budget: tokens kept, or the part of the prompt.
        recent: the part of them that are the last tokens.
        sinks: of which so many are the first, whatever attention they get; the papers' is 0.
        row_norm: divide a token's sum by how many rows could see it, which favours early ones no more.
        forget: what a sum is multiplied by with each row; 1: nothing is forgotten. (A2SF, arXiv 2407.20485)
        score_rows: so many last rows of the prompt count; 0: all. Those must be computed even where the
            prefix cache has their keys, and cost a second attention.
        min_prompt: after a prompt shorter than this, everything is kept.
    """

    budget: int | float = 0.6
    recent: float = 0.5
    sinks: int = 0
    row_norm: bool = False
    forget: float = 1.0
    score_rows: int = 0
    min_prompt: int = 256

    def __post_init__(self) -> None:
        check_budget(self.budget)
        part(recent=self.recent, forget=self.forget)
        at_least(0, sinks=self.sinks, score_rows=self.score_rows, min_prompt=self.min_prompt)

    def policy(self, shape: SequenceShape) -> KVPolicy:
        return HeavyHitters(self, shape)

    def attention(
        self, logits: Tensor, layer: int, rows: Tensor, keys: Tensor, written: int, most: int
    ) -> Tensor:
        """What a row pays each token, `[Hk, G, n, m]` as the logits, which may be written over.

        Args:
            rows, keys: positions `[n]` and `[Hk, m]`.
            written: tokens of the answer whose rows have been computed, these included, of at most `most`.
        """
        return torch.softmax(logits, -1)

    def may_return(self, positions: Tensor, window: int, prompt_tokens: int) -> Tensor | None:
        """Which tokens compete for what is not the window's; None: all."""
        return None


@method(
    "keyformer",
    hook="kv",
    title="Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient Generative Inference",
    arxiv="2403.09054",
    claim="H2O with noise on the logits and a temperature, against sums that favour what was kept before",
)
@dataclass(frozen=True)
class Keyformer(H2O):
    """Keeps `budget` tokens in each kv head, the last ones and the best by a score (Algorithm 1).

    The score sums softmax((logit + noise) / tau) over rows and over a group's query heads (groups are not in
    the paper); attention itself stays as it is. With noise=none and tau_end=1 this is H2O.

    Attributes:
        budget: tokens kept, or the part of the prompt.
        recent: the part of them that are the last tokens; the paper recommends 0.2 to 0.3.
        sinks, row_norm, forget, score_rows, min_prompt: as H2O's.
        noise: gumbel (the paper's); for comparison gaussian, constant (which changes nothing) or none.
        frozen: a token has one noise for all rows (as the paper writes it), not one for each (as its code).
        tau_init, tau_end: the temperature in the prompt, and at the end of the answer.
        tau_horizon: after how many tokens it gets there; 0: max_tokens.
        compete: tokens that leave the window compete with older ones (as the paper says); else the prompt's
            key tokens stay, and all others are dropped then (as its code does).
        seed: of the noise.
    """

    recent: float = 0.3
    noise: str = "gumbel"
    frozen: bool = False
    tau_init: float = 1.0
    tau_end: float = 2.0
    tau_horizon: int = 0
    compete: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(("gumbel", "gaussian", "constant", "none"), noise=self.noise)
        at_least(1e-6, tau_init=self.tau_init, tau_end=self.tau_end)
        at_least(0, tau_horizon=self.tau_horizon)

    def attention(
        self, logits: Tensor, layer: int, rows: Tensor, keys: Tensor, written: int, most: int
    ) -> Tensor:
        if self.noise != "none":
            groups, size = logits.shape[:2]
            row = streams(self.seed, layer, groups * size, logits.device).view(groups, size, 1, 1)
            if not self.frozen:
                row = mixed(row ^ rows[:, None])
            logits += noise(self.noise, row, mixed(keys[:, None, None]), logits.dtype)
        progress = min(1.0, written / max(1, self.tau_horizon or most))
        tau = self.tau_init + progress * (self.tau_end - self.tau_init)
        return torch.softmax(logits if tau == 1 else logits.div_(tau), -1)

    def may_return(self, positions: Tensor, window: int, prompt_tokens: int) -> Tensor | None:
        return None if self.compete else positions < prompt_tokens - window


class HeavyHitters(KVPolicy):
    """Sums and positions of all cached tokens, `[L, Hk, length]`, in the cache's order."""

    def __init__(self, knobs: H2O, shape: SequenceShape) -> None:
        self.knobs, self.shape = knobs, shape
        prompt = shape.prompt_tokens
        self.budget = tokens_of(knobs.budget, prompt)
        self.sinks = min(knobs.sinks, self.budget - 1)
        self.window = min(int(self.budget * knobs.recent + 1e-9), self.budget - self.sinks)
        self.dense = prompt < knobs.min_prompt or self.budget >= prompt + shape.max_tokens
        self.first_row = max(0, prompt - knobs.score_rows) if knobs.score_rows else 0
        self.last_rows = 1 if self.dense else prompt - self.first_row
        self.sums: Tensor = torch.empty(shape.num_layers, shape.num_kv_heads, 0)
        self.positions: Tensor = torch.empty(shape.num_layers, shape.num_kv_heads, 0, dtype=torch.int64)

    def rows(self, start: int, wanted: int, most: int) -> int:
        # After a preemption, rows that were decoded one by one are computed one by one again.
        end = self.shape.prompt_tokens
        if self.dense:
            return min(wanted, most)
        return min(wanted, most, end - start if start < end else 1)

    def attends(self, start: int, stop: int) -> bool:
        return not self.dense and stop > self.first_row

    def attend(self, layer: int, q: Tensor, cached: CachedTokens) -> None:
        if layer == 0:
            self._make_room(q, cached)
        q = q[max(0, self.first_row - cached.start) :]
        start = cached.computed - len(q)
        written = max(0, cached.computed - self.shape.prompt_tokens)
        sums, positions = self.sums[layer], self.positions[layer]
        for first, logits in causal_logits(q, cached.keys(layer)):
            count, seen = logits.shape[2:]
            rows = torch.arange(start + first, start + first + count, device=q.device)
            keys = positions[:, :seen]
            paid = self.knobs.attention(logits, layer, rows, keys, written, self.shape.max_tokens)
            if self.knobs.forget == 1:
                sums[:, :seen] += paid.sum((1, 2))
            else:
                age = torch.arange(count - 1, -1, -1, device=q.device, dtype=paid.dtype)
                sums *= self.knobs.forget**count
                sums[:, :seen] += torch.tensordot(paid.sum(1), self.knobs.forget**age, ([1], [0]))

    def _make_room(self, q: Tensor, cached: CachedTokens) -> None:
        """For tokens that have come since."""
        new = cached.length - self.sums.shape[-1]
        positions = torch.arange(cached.computed - new, cached.computed, device=q.device)
        positions = positions.expand(*self.sums.shape[:2], new)
        self.positions = torch.cat((self.positions.to(q.device), positions), -1)
        wide = torch.promote_types(q.dtype, torch.float32)
        self.sums = F.pad(self.sums.to(q.device, wide), (0, new))

    def drop(self, cached: CachedTokens) -> None:
        surplus = cached.length - self.budget
        if self.dense or cached.computed < self.shape.prompt_tokens or surplus <= 0:
            return
        worth = self._worth(cached.computed)
        if surplus == 1:
            victims = worth.argmin(-1, keepdim=True)
            cached.overwrite(victims[..., 0])
            # The last token lies there now. (Not in place: these were made in inference mode.)
            self.sums, self.positions = (
                state.scatter(-1, victims, state[..., -1:])[..., :-1] for state in (self.sums, self.positions)
            )
        else:  # the end of the prompt; or blocks were short since
            kept = worth.topk(self.budget, sorted=False).indices.sort().values
            cached.keep(list(kept))
            self.sums, self.positions = self.sums.gather(-1, kept), self.positions.gather(-1, kept)

    def _worth(self, computed: int) -> Tensor:
        """What the worst is dropped by, `[L, Hk, length]`."""
        worth, positions, forget = self.sums, self.positions, self.knobs.forget
        if self.knobs.row_norm:
            seen = computed - positions.clamp_min(self.first_row)
            worth = worth / (seen if forget == 1 else (1 - forget**seen) / (1 - forget))
        competes = self.knobs.may_return(positions, self.window, self.shape.prompt_tokens)
        if competes is not None:
            worth = worth.masked_fill(~competes, -math.inf)
        safe = (positions >= computed - self.window) | (positions < self.sinks)
        return worth.masked_fill(safe, math.inf)
