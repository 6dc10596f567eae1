"""SpAtten's switches against the same thing over lists, alone and together, and whatever runs beside them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import kv_rig
from kv_rig import build_engine, run, same
from list_model import ListModel
from tiny_models import build_tiny
from tokenloom.engine.engine import Engine
from tokenloom.engine.request import Request
from tokenloom.methods.kv import combine
from tokenloom.methods.kv.key_planes import BLOCK, encode, from_high, split, step_of
from tokenloom.methods.kv.spatten import Ramp, Switch
from tokenloom.methods.kv.spatten_policy import SpAtten, best
from tokenloom.models.loader import ModelFiles, open_model

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 4, 4, 2, 16
PROMPT = [(i * i * 7 + 3 * i) % 190 for i in range(40)]
TOKEN = "spatten_token(skip_front=0.25, protect_sink=2, protect_recent=5)"
HEAD = "spatten_head(r_end=0.6, score_rows=9)"
LOCAL_V = "spatten_local_v(keep=0.4)"
PQ = "spatten_pq(hi=3, lo=4, threshold=0.3, exclude_sinks=2)"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelFiles, ListModel]:
    folder, model = build_tiny(tmp_path_factory.mktemp("llama"), num_hidden_layers=LAYERS)
    return open_model(str(folder)), ListModel(model)


def engine(files: ModelFiles, **flags: Any) -> Engine:
    return build_engine(files, cache__kv_bytes=flags.pop("cache__kv_bytes", 8 * 2**20), **flags)


def request(
    spec: str, prompt: list[int] = PROMPT, max_tokens: int = 16, name: str = "r", **params: Any
) -> Request:
    return kv_rig.request(prompt, spec, name, max_tokens=max_tokens, **params)


def switches(spec: str) -> dict[str, Any]:
    method = combine(spec)
    assert method is not None
    return {part.kind: part for _, part in method.named if isinstance(part, Switch)}


class Lists:
    """The sheet's decode step, a row at a time, for lists of keys and values by layer."""

    def __init__(self, knobs: dict[str, Any], prompt: int) -> None:
        self.knobs, self.prompt = knobs, prompt
        self.keys: list[list[Tensor]] = [[] for _ in range(LAYERS)]
        self.values: list[list[Tensor]] = [[] for _ in range(LAYERS)]
        self.s_t: list[float] = []
        self.s_h = [0.0] * HEADS
        self.alive: list[int] = []
        self.heard: list[int] = []
        self.read: list[list[int]] = []  # of the last row, by layer
        self.lows = 0

    def attend(self, layer: int, position: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys[layer].append(k)
        self.values[layer].append(v)
        if layer == 0:
            self.s_t.append(0.0)
            self.alive, self.heard, self.read = list(range(position + 1)), list(range(HEADS)), []
        decoding = position >= self.prompt
        if decoding:
            self.narrow(layer, position + 1)
        self.read.append(self.alive)
        out = torch.zeros(HEADS, HEAD_DIM, dtype=q.dtype)
        for head in self.heard:
            p = self.probabilities(layer, head, q[head], decoding)
            self.pay(position, p)
            rows = list(range(len(p)))
            if decoding and "local_v" in self.knobs:
                rows = (-p).sort(stable=True).indices.tolist()
                rows = rows[: max(1, int(len(p) * self.knobs["local_v"].keep))]
            kv_head = head // (HEADS // KV_HEADS)
            for i in rows:
                out[head] += p[i] * self.values[layer][self.alive[i]][kv_head]
        self.hear(position, out)
        return out

    def narrow(self, layer: int, length: int) -> None:
        token, head = self.knobs.get("token"), self.knobs.get("head")
        if token is not None:
            pinned = {*range(token.protect_sink), *range(length - token.protect_recent, length)}
            count = max(token.ramp.keep(layer, LAYERS, length), len(pinned))
            ranked = sorted(self.alive, key=lambda j: (j not in pinned, -self.s_t[j], j))
            self.alive = sorted(ranked[:count])
        if head is not None:
            ranked = sorted(self.heard, key=lambda m: (-self.s_h[m], m))
            self.heard = sorted(ranked[: head.ramp.keep(layer, LAYERS, HEADS)])

    def probabilities(self, layer: int, head: int, q: Tensor, decoding: bool) -> Tensor:
        kv_head, pq = head // (HEADS // KV_HEADS), self.knobs.get("pq")
        keys = torch.stack([k[kv_head] for k in self.keys[layer]])
        if pq is None or not decoding:
            return torch.softmax(keys[self.alive] @ q / math.sqrt(HEAD_DIM), 0)
        high, full = keys.clone(), keys.clone()
        for block in range(0, len(keys), 16):
            rows = keys[block : block + 16]
            step = rows.abs().amax(0) / (2 ** (pq.hi + pq.lo - 1) - 1)
            code = (rows / step).round()
            full[block : block + 16] = code * step
            high[block : block + 16] = ((code / 2**pq.lo).floor() * 2**pq.lo + (2**pq.lo - 1) / 2) * step
        p = torch.softmax(high[self.alive] @ q / math.sqrt(HEAD_DIM), 0)
        if max(float(p[i]) for i, j in enumerate(self.alive) if j >= pq.exclude_sinks) < pq.threshold:
            self.lows += 1
            p = torch.softmax(full[self.alive] @ q / math.sqrt(HEAD_DIM), 0)
        return p

    def pay(self, position: int, p: Tensor) -> None:
        token = self.knobs.get("token")
        if token is None or position < self.prompt - (token.score_rows or self.prompt):
            return
        for i, j in enumerate(self.alive):
            rows = min(self.prompt - j, token.score_rows or self.prompt)
            self.s_t[j] += float(p[i]) / (rows if token.row_norm and position < self.prompt else 1)

    def hear(self, position: int, out: Tensor) -> None:
        if "head" in self.knobs and position >= self.prompt - self.knobs["head"].score_rows:
            for m in range(HEADS):
                self.s_h[m] += float(out[m].abs().sum())


@pytest.mark.parametrize("rows", [1000, 7])
@pytest.mark.parametrize(
    "spec",
    [
        TOKEN,
        "spatten_token(r_start=0.5, r_end=0.9, protect_sink=0, protect_recent=1, row_norm=False)",
        "spatten_token(skip_front=0.0, protect_recent=3, score_rows=11)",
        HEAD,
        LOCAL_V,
        PQ,
        f"{TOKEN}+{LOCAL_V}",
        f"{HEAD}+{PQ}",
        f"{TOKEN}+{HEAD}+{LOCAL_V}+{PQ}",
    ],
)
def test_it_reads_and_says_what_lists_do(tiny: tuple[ModelFiles, ListModel], spec: str, rows: int) -> None:
    files, model = tiny
    asked, lists = request(spec), Lists(switches(spec), len(PROMPT))
    target = engine(files, scheduler__max_batch_tokens=rows, scheduler__max_running=4)
    target.add(asked)
    sequence, position = asked.sequences[0], 0
    policy, tokens = sequence.policy, sequence.tokens
    reads = watch_reads(policy)
    while target.has_work:
        target.step()
        if not sequence.num_output:
            continue
        while position < len(tokens) - 1:
            logits = model.logits(tokens[position], position, lists.attend)
            position += 1
        assert tokens[-1] == int(logits.argmax())
        assert isinstance(policy, SpAtten)
        if "token" in lists.knobs:
            torch.testing.assert_close(policy.token_sums.tolist(), lists.s_t, rtol=1e-5, atol=0)
        if "head" in lists.knobs:
            torch.testing.assert_close(policy.head_sums.tolist(), lists.s_h, rtol=1e-5, atol=0)
        if sequence.num_output > 1:
            assert reads == lists.read
            assert all(set(b) <= set(a) for a, b in itertools.pairwise(reads))  # nested
        assert policy.counts["low"] == lists.lows
        reads.clear()
    assert position == len(PROMPT) + 15
    if "pq" in lists.knobs:
        assert 0 < lists.lows < policy.counts["heads"]


def watch_reads(policy: Any) -> list[list[int]]:
    """What the layers of the latest row read."""
    reads: list[list[int]] = []
    decode = policy._decode

    def watched(layer: int, q: Tensor, cached: Any) -> Tensor | None:
        reads.append(list(range(cached.length)) if policy.alive is None else policy.alive.tolist())
        result: Tensor | None = decode(layer, q, cached)
        return result

    policy._decode = watched
    return reads


def test_a_row_and_layer_add_as_much_as_there_are_heads(tiny: tuple[ModelFiles, ListModel]) -> None:
    files, _ = tiny
    for spec, heads in (
        ("spatten_token(row_norm=False)", HEADS * LAYERS),
        # 4 heads in two layers of four, and 3 and 1 in the others.
        ("spatten_token(row_norm=False)+spatten_head(r_start=0.25, r_end=0.75, skip_front=0.5)", 12),
    ):
        asked, target = request(spec), engine(files)
        target.add(asked)
        totals = []
        while not asked.finished:
            policy = asked.sequences[0].policy
            target.step()
            assert isinstance(policy, SpAtten)
            totals.append(float(policy.token_sums.sum()))
        assert totals[0] == pytest.approx(len(PROMPT) * HEADS * LAYERS)
        assert [b - a for a, b in itertools.pairwise(totals)] == pytest.approx([heads] * 15)


@pytest.mark.parametrize(
    "spec",
    [
        "spatten_token(r_start=0, r_end=0)",
        "spatten_head(r_end=0)",
        "spatten_local_v(keep=1)",
        "spatten_token(r_start=0, r_end=0)+spatten_head(r_end=0)+spatten_local_v(keep=1)",
        "spatten_token(r_start=0.5, protect_recent=1000)",
    ],
)
def test_neutral_is_dense_beside_dense_requests(tiny: tuple[ModelFiles, ListModel], spec: str) -> None:
    files, _ = tiny
    target = engine(files, scheduler__max_batch_tokens=16, scheduler__max_running=8)
    asked = [request(spec if i % 2 else "off", [i, *PROMPT[i:]], 16 - i, name=f"r{i}") for i in range(6)]
    for each, out in zip(asked, run(target, *asked), strict=True):
        same(out, run(engine(files), request("off", each.prompt, each.params.max_tokens or 0))[0])


def test_sixteen_bits_are_dense_but_for_their_rounding(tiny: tuple[ModelFiles, ListModel]) -> None:
    files, _ = tiny
    dense = run(engine(files), request("off"))[0]
    for spec in ("spatten_pq(hi=16, lo=0, threshold=0)", "spatten_pq(hi=8, lo=8, threshold=2)"):
        same(run(engine(files), request(spec))[0], dense, 1e-2)


def test_low_bits_are_always_or_never_read(tiny: tuple[ModelFiles, ListModel]) -> None:
    files, _ = tiny
    answers = {}
    for hi, lo, threshold, share in ((6, 4, 2.0, 1), (10, 0, 0.0, 0), (6, 4, 0.0, 0)):
        asked = request(f"spatten_pq(hi={hi}, lo={lo}, threshold={threshold})")
        leader = engine(files)
        leader.add(asked)
        policy = asked.sequences[0].policy
        while leader.has_work:
            leader.step()
        assert isinstance(policy, SpAtten)
        assert policy.counts["heads"] == 15 * LAYERS * HEADS
        assert policy.counts["low"] == share * policy.counts["heads"]
        answers[hi, threshold] = run(engine(files), request(asked.kv.spec if asked.kv else ""))[0]
    same(answers[6, 2.0], answers[10, 0.0])


@pytest.mark.parametrize("spec", [f"{TOKEN}+{HEAD}+{LOCAL_V}+{PQ}", TOKEN])
def test_answers_do_not_depend_on_batch_chunks_or_preemption(
    tiny: tuple[ModelFiles, ListModel], spec: str
) -> None:
    files, _ = tiny
    alone = [run(engine(files), request(spec, [i, *PROMPT[i:]]))[0] for i in range(6)]
    token_bytes = 2 * LAYERS * KV_HEADS * HEAD_DIM * 8
    for flags in (
        {},
        {"scheduler__max_batch_tokens": 9, "scheduler__max_running": 9},
        {"cache__kv_bytes": 120 * token_bytes},
    ):
        target = engine(files, **flags)
        asked = [request(spec, [i, *PROMPT[i:]], name=f"r{i}") for i in range(6)]
        asked.append(request("off", PROMPT[:17], 30, name="dense"))
        for got, want in zip(run(target, *asked), alone, strict=False):
            same(got, want)
    assert target.stats().preemptions > 0


def test_prefix_hits_leave_the_rows_that_are_summed_over(tiny: tuple[ModelFiles, ListModel]) -> None:
    files, _ = tiny
    for spec, hits in ((TOKEN, 0), ("spatten_token(score_rows=8)", 32), (HEAD, 28), (LOCAL_V, 36)):
        target = engine(files)
        run(target, request("off"))
        warm = run(target, request(spec))[0]
        assert warm.cached_tokens == hits
        same(warm, run(engine(files), request(spec))[0])


def test_a_silent_head_is_a_zero_before_the_output_projection(tiny: tuple[ModelFiles, ListModel]) -> None:
    files, _ = tiny
    asked, target = request("spatten_head(r_start=0.5, r_end=0.5, skip_front=0.0)"), engine(files)
    target.add(asked)
    policy = asked.sequences[0].policy
    assert isinstance(policy, SpAtten)
    decode, seen = policy._decode, []

    def watched(layer: int, q: Tensor, cached: Any) -> Tensor | None:
        out = decode(layer, q, cached)
        assert out is not None and policy.heard is not None
        silent = [m for m in range(HEADS) if m not in policy.heard.tolist()]
        loud = cached.attend(layer, q)[:, policy.heard]
        torch.testing.assert_close(out[:, policy.heard], loud)
        seen.append((len(silent), float(out[:, silent].abs().sum())))
        return out

    policy._decode = watched  # type: ignore[method-assign]
    while target.has_work:
        target.step()
    assert seen == [(2, 0.0)] * 15 * LAYERS


def test_the_planes_hold_all_of_a_code() -> None:
    keys = torch.randn(50, 2, 8, generator=torch.Generator().manual_seed(1))
    for hi, lo in ((8, 4), (6, 4), (4, 4), (16, 0), (2, 14)):
        codes = encode(keys, step_of(keys, (0,), hi + lo), hi + lo)
        high, low = split(codes, lo)
        assert torch.equal((high << lo) + low, codes)
        assert codes.abs().max() == 2 ** (hi + lo - 1) - 1
        assert int(high.min()) >= -(2 ** (hi - 1)) and int(high.max()) < 2 ** (hi - 1)
        assert int(low.min()) >= 0 and int(low.max()) < 2**lo
        assert ((from_high(high, lo, keys.dtype) - codes).abs() <= 2**lo / 2).all()


def test_probabilities_move_at_most_twice_as_much_as_scores() -> None:
    generator = torch.Generator().manual_seed(2)
    for bits in (3, 4, 6, 8):
        keys = torch.randn(4 * BLOCK, 16, generator=generator)
        step = step_of(keys, (0,), bits)
        exact = torch.randn(20, 16, generator=generator) @ keys.t() / 4
        rough = torch.randn(0)
        queries = exact.new_empty(20, 16).normal_(generator=generator)
        exact, rough = queries @ keys.t() / 4, queries @ (encode(keys, step, bits) * step).t() / 4
        moved = (torch.softmax(rough, -1) - torch.softmax(exact, -1)).abs().sum(-1)
        assert (moved <= 2 * (rough - exact).abs().amax(-1)).all()


def test_of_equals_the_first_are_best() -> None:
    assert best(torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, 2.0]), 3).tolist() == [1, 2, 3]
    assert best(torch.ones(9), 4).tolist() == [0, 1, 2, 3]
    assert best(torch.tensor([torch.inf, 1.0, torch.inf]), 2).tolist() == [0, 2]


def test_a_ramp_starts_late_and_ends_at_r_end() -> None:
    ramp = Ramp(0.2, 0.8, 0.15)
    kept = [ramp.keep(layer, 30, 1000) for layer in range(30)]
    assert kept[:4] == [1000] * 4 and kept[4] == 800 and kept[-1] == 200
    assert all(a >= b for a, b in itertools.pairwise(kept))
    assert Ramp(0.8, 0.8, 0).keep(0, 1, 10) == 2 and Ramp(1, 1, 0).keep(0, 1, 10) == 1


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("spatten_token+spatten_token(r_end=0.5)", "spatten_token and spatten_token are both"),
        ("spatten_token+spatten_head+spatten_token", "spatten_head and spatten_token are both"),
        ("spatten_pq+quest", "spatten_pq and quest are both"),
        ("quest+spatten_pq", "quest and spatten_pq are both"),
        ("spatten_token+snapkv", "importance by token"),
        ("snapkv+spatten_local_v+spatten_token", "importance by token"),
        ("spatten_token(r_start=0.9)", "r_end must be at least"),
        ("spatten_local_v(keep=2)", "keep"),
        ("spatten_pq(hi=12, lo=8)", "at most 16"),
        ("spatten_pq(steps=row)", "block, tensor"),
    ],
)
def test_what_does_not_go_together_is_refused(spec: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        combine(spec)


def test_values_and_bits_are_pruned_of_what_an_evictor_left(tiny: tuple[ModelFiles, ListModel]) -> None:
    files, _ = tiny
    spec = "snapkv(budget=20, window=4)"
    kept = run(engine(files), request(spec))[0]
    same(run(engine(files), request(f"{spec}+spatten_local_v(keep=1)"))[0], kept)
    same(run(engine(files), request(f"{spec}+spatten_pq(hi=16, lo=0)"))[0], kept, 1e-2)
