"""TokenSelect: heads vote for the tokens that all of them read, in prefill and while decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenloom.cache.cached_tokens import CachedTokens
from tokenloom.cache.policy import KVPolicy, SequenceShape
from tokenloom.errors import RequestError
from tokenloom.methods.kv.budget import at_least, check_budget, one_of, tokens_of
from tokenloom.methods.kv.causal_logits import causal_logits
from tokenloom.methods.kv.parts import Selector
from tokenloom.methods.kv.rotation import turned
from tokenloom.methods.registry import method

LEAST = 8
"""Fewer tokens are no budget."""


@method(
    "tokenselect",
    hook="kv",
    title="TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic "
    "Token-Level KV Cache Selection",
    arxiv="2411.02886",
    claim="long prompts and long contexts at the price of `budget` tokens; drops nothing",
)
@dataclass(frozen=True)
class TokenSelect(Selector):
    """One set of tokens for a layer's heads: the first, the last, and those with the most votes (Section 4).

    Attributes:
        budget: tokens that a row reads in each layer, all together, or the part of the prompt.
        n_init: of which so many are the first; -1: a sixteenth, at most 128 (the paper's).
        n_local: and so many the last; -1: a quarter, at most 512 (the paper's).
        chunk: rows of a prompt that choose together, by their mean query; the paper's is 512.
        theta: decoding, the last choice is used again while the query's cosine to the one that made it is at
            least this; 1: never.
        vote: soft: the sum of heads' softmaxes (the paper's). head: of heads' top tokens. topk: of raw
            scores. random: by lot, for comparison.
        prefill: whether prompts choose, or decoding alone.
        positions: original: tokens stay where they stand in the text. compact: what a row reads stands side
            by side (the paper's code), so that prompts may be longer than the model's context; keys are then
            stored without RoPE, and prompts must choose.
    """

    budget: int | float = 2688
    n_init: int = -1
    n_local: int = -1
    chunk: int = 256
    theta: float = 0.9
    vote: str = "soft"
    prefill: bool = True
    positions: str = "original"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if self.budget >= 1:
            at_least(LEAST, budget=tokens_of(self.budget, LEAST))
        at_least(1, chunk=self.chunk)
        at_least(-1, n_init=self.n_init, n_local=self.n_local)
        one_of(("soft", "head", "topk", "random"), vote=self.vote)
        one_of(("original", "compact"), positions=self.positions)
        if self.positions == "compact" and not self.prefill:
            raise ValueError("positions=compact needs prefill=True: all of a prompt would be read otherwise")
        if self.budget > 1 and self.n_init + max(1, self.n_local) >= self.budget:
            raise ValueError("n_init and n_local leave nothing of the budget to choose")

    def check(self, max_batch_tokens: int, max_running: int, quantized: bool) -> None:
        if self.prefill and self.chunk + max_running > max_batch_tokens:
            raise ValueError(
                f"chunk={self.chunk} rows and {max_running} decodes (scheduler.max_running) do not fit "
                f"scheduler.max_batch_tokens={max_batch_tokens}"
            )

    @property
    def changes_prompt(self) -> bool:
        return self.prefill

    def excludes(self) -> Mapping[str, str]:
        if self.positions == "original":
            return {}
        return {"scorer": "positions=compact stores keys without RoPE, and scores need it"}

    def policy(self, shape: SequenceShape) -> KVPolicy:
        if self.positions == "compact":
            return CompactPolicy(self, shape)
        return TokenSelectPolicy(self, shape)


class TokenSelectPolicy(KVPolicy):
    """By layer, the last choice while decoding and the query that made it: the paper's Selection Cache."""

    def __init__(self, knobs: TokenSelect, shape: SequenceShape) -> None:
        self.knobs, self.shape = knobs, shape
        self.budget = max(LEAST, tokens_of(knobs.budget, shape.prompt_tokens))
        self.n_init = min(128, self.budget // 16) if knobs.n_init < 0 else knobs.n_init
        self.n_local = min(512, self.budget // 4) if knobs.n_local < 0 else max(1, knobs.n_local)
        # Of a short prompt's part the first and last may leave nothing: then these make the budget.
        self.count = max(1, self.budget - self.n_init - self.n_local)
        self.budget = self.n_init + self.n_local + self.count
        self.made: dict[int, tuple[Tensor, Tensor]] = {}
        self.dropped = 0
        self.selections = self.reuses = 0

    def rows(self, start: int, wanted: int, most: int) -> int:
        prompt, chunk = self.shape.prompt_tokens, self.knobs.chunk
        if start >= prompt:
            return min(1, most)
        n = min(wanted, most, prompt - start)
        # Whole chunks, so that the choice does not depend on what else is in the batch.
        return n if start + n == prompt or not self.knobs.prefill else n // chunk * chunk

    def attends(self, start: int, stop: int) -> bool:
        return start >= self.shape.prompt_tokens or (self.knobs.prefill and stop > self.budget)

    def shared_tokens(self, prompt_tokens: int) -> int:
        if not self.knobs.prefill:
            return prompt_tokens
        if isinstance(self.knobs.budget, float):
            return 0  # prompts of other lengths have other budgets
        return prompt_tokens // self.knobs.chunk * self.knobs.chunk

    def attend(self, layer: int, q: Tensor, cached: CachedTokens) -> Tensor | None:
        if cached.length <= self.budget:
            return None
        if cached.start >= self.shape.prompt_tokens:
            local = cached.length - self.n_local
            chosen = self._reused(layer, q, cached)
            if chosen is None:
                chosen = self._choose(layer, q, cached, local)
                self.made[layer] = (q.flatten(), chosen)
                self.selections += 1
            return self._read(layer, q, self._index(chosen, local, cached.length), cached)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        before = cached.length - len(q)
        for first in range(0, len(q), self.knobs.chunk):
            rows = q[first : first + self.knobs.chunk]
            end = before + first + len(rows)
            local = end - max(self.n_local, len(rows))
            if end <= self.budget or local - self.n_init <= self.count:
                index = torch.arange(end, device=q.device)
            else:
                index = self._index(self._choose(layer, rows, cached, local), local, end)
            out[first : first + len(rows)] = self._read(layer, rows, index, cached)
        return out

    def _read(self, layer: int, q: Tensor, index: Tensor, cached: CachedTokens) -> Tensor:
        return cached.attend(layer, q, index)

    def _index(self, chosen: Tensor, local: int, end: int) -> Tensor:
        device = chosen.device
        return torch.cat(
            (torch.arange(self.n_init, device=device), chosen, torch.arange(local, end, device=device))
        )

    def _reused(self, layer: int, q: Tensor, cached: CachedTokens) -> Tensor | None:
        if cached.dropped != self.dropped:  # other tokens lie at the same indices now
            self.made.clear()
            self.dropped = cached.dropped
        made = self.made.get(layer)
        if made is None or self.knobs.theta >= 1:
            return None
        if F.cosine_similarity(q.flatten(), made[0], dim=0) < self.knobs.theta:
            return None
        self.reuses += 1
        return made[1]

    def _choose(self, layer: int, q: Tensor, cached: CachedTokens, local: int) -> Tensor:
        """Of tokens `n_init .. local` those with most votes, ascending `[count]`: q `[n, Hq, D]`."""
        mean = q[0] if len(q) == 1 else q.mean(0)
        scores = cached.scores(layer, mean, self.n_init, local)  # Eq. 7 has no 1 / sqrt(D)
        if self.knobs.vote == "soft":
            votes = _votes(scores)
        elif self.knobs.vote == "head":
            top = scores.topk(min(self.count, scores.shape[1])).indices
            votes = torch.zeros_like(scores).scatter_(1, top, 1).sum(0)
        elif self.knobs.vote == "topk":
            votes = scores.sum(0)
        else:
            votes = torch.rand(scores.shape[1], generator=torch.Generator().manual_seed(scores.shape[1]))
        return cached.kernels.largest(votes[None], min(self.count, len(votes)))[0] + self.n_init


class CompactPolicy(TokenSelectPolicy):
    """Keys are stored as at position 0, where RoPE leaves them as they are; each read turns what it reads.

    So no position is larger than what a row reads is long, wherever in a text it stands. A candidate's score
    is what it would be right before the local tokens. A request that fits into the budget is plain attention.
    """

    compact = True

    def __init__(self, knobs: TokenSelect, shape: SequenceShape) -> None:
        super().__init__(knobs, shape)
        self.dense = shape.prompt_tokens + shape.max_tokens <= self.budget
        read = self.n_init + self.count + max(self.n_local, knobs.chunk)
        if not self.dense and read > shape.max_position:
            raise RequestError(
                f"kv: tokenselect: a row reads up to {read} tokens (budget, chunk), but the model's context "
                f"is {shape.max_position}",
                param="kv",
            )

    def seen_at(self, start: int, rows: int) -> Sequence[int]:
        return range(start, start + rows) if self.dense else [0] * rows

    def attends(self, start: int, stop: int) -> bool:
        return not self.dense

    def shared_tokens(self, prompt_tokens: int) -> int:
        # Requests of one spec share blocks, and those that fit into the budget store other keys.
        return 0 if self.dense else super().shared_tokens(prompt_tokens)

    def attend(self, layer: int, q: Tensor, cached: CachedTokens) -> Tensor:
        attended = super().attend(layer, q, cached)
        if attended is not None:
            return attended
        return self._read(layer, q, torch.arange(cached.length, device=q.device), cached)

    def _read(self, layer: int, q: Tensor, index: Tensor, cached: CachedTokens) -> Tensor:
        """Causal attention of q over these tokens, the rows' own last, at positions 0, 1, 2, ..."""
        n, m = len(q), len(index)
        keys, values = cached.kv.read_cells(cached.cells(layer, index), q.dtype)  # [Hk, m, D]
        cached.tokens_read += keys[..., 0].numel()
        at = torch.arange(m, device=q.device)
        keys = self._turned(keys.transpose(0, 1), at, cached)
        q, out = self._turned(q, at[m - n :], cached), torch.empty_like(q)
        for first, logits in causal_logits(q, keys):
            count, seen = logits.shape[2:]
            paid = torch.softmax(logits, -1).flatten(1, 2)  # [Hk, G * count, seen]
            read = paid @ values[:, :seen].to(paid.dtype)
            read = read.unflatten(1, (-1, count)).permute(2, 0, 1, 3)
            out[first : first + count] = read.flatten(1, 2).to(out.dtype)
        return out

    def _choose(self, layer: int, q: Tensor, cached: CachedTokens, local: int) -> Tensor:
        at = torch.arange(self.n_local, self.n_local + len(q), device=q.device)
        return super()._choose(layer, self._turned(q, at, cached), cached, local)

    @staticmethod
    def _turned(x: Tensor, at: Tensor, cached: CachedTokens) -> Tensor:
        assert cached.cos_sin is not None
        return turned(x, torch.zeros_like(at), at, cached.cos_sin).to(x.dtype)


def _votes(scores: Tensor) -> Tensor:
    """The sum of heads' softmaxes, `[m]` of `[Hq, m]`.

    Less than e^-70 of the largest counts as that: torch's softmax goes on to denormal numbers, which cost
    more than all else here.
    """
    weights = (scores - scores.amax(-1, keepdim=True)).clamp_min_(-70).exp_()
    return weights.sum(-1).reciprocal_() @ weights
