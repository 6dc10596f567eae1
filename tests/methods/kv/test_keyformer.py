"""Keyformer and H2O against the same thing over lists, and whatever else runs beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
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
from tokenloom.methods.kv.keyformer import H2O, Keyformer
from tokenloom.methods.kv.noise import mixed, noise, streams, uniform, unit
from tokenloom.models.loader import ModelFiles, open_model

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 3, 4, 2, 16
PROMPT = [(i * i * 7 + 3 * i) % 190 for i in range(40)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelFiles, ListModel]:
    folder, model = build_tiny(
        tmp_path_factory.mktemp("llama"), num_hidden_layers=LAYERS, max_position_embeddings=2048
    )
    return open_model(str(folder)), ListModel(model)


def engine(files: ModelFiles, **flags: Any) -> Engine:
    return build_engine(files, cache__kv_bytes=flags.pop("cache__kv_bytes", 8 * 2**20), **flags)


def request(
    spec: str, prompt: list[int] = PROMPT, max_tokens: int = 24, name: str = "r", **params: Any
) -> Request:
    return kv_rig.request(prompt, spec, name, max_tokens=max_tokens, **params)


def steps(target: Engine, asked: Request) -> Iterator[tuple[Any, Any]]:
    """Policy and cached tokens after each step from the prompt's end on."""
    target.add(asked)
    sequence = asked.sequences[0]
    while target.has_work:
        target.step()
        if sequence.num_output and not asked.finished:
            yield sequence.policy, sequence.cached


@dataclass
class Lists:
    """Algorithm 1 of Keyformer, a row at a time; for each layer and kv head a list of [position, k, v, f]."""

    knobs: Keyformer | H2O
    prompt: int
    max_tokens: int
    kept: list[list[list[list[Any]]]] = field(
        default_factory=lambda: [[[] for _ in range(KV_HEADS)] for _ in range(LAYERS)]
    )

    def attend(self, layer: int, position: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = []
        for head in range(HEADS):
            kv_head = head // (HEADS // KV_HEADS)
            tokens = self.kept[layer][kv_head]
            if head % (HEADS // KV_HEADS) == 0:
                for token in tokens:
                    token[3] *= self.knobs.forget
                tokens.append([position, k[kv_head], v[kv_head], 0.0])
            logits = torch.stack([q[head] @ token[1] for token in tokens]) / math.sqrt(HEAD_DIM)
            out.append(torch.softmax(logits, 0) @ torch.stack([token[2] for token in tokens]))
            self.pay(layer, head, position, logits, tokens)
        return torch.stack(out)

    def pay(self, layer: int, head: int, position: int, logits: Tensor, tokens: list[list[Any]]) -> None:
        knobs = self.knobs
        if knobs.score_rows and position < self.prompt - knobs.score_rows:
            return
        if isinstance(knobs, Keyformer):
            stream = streams(knobs.seed, layer, HEADS, logits.device)[head]
            row = stream if knobs.frozen else mixed(stream ^ torch.tensor(position))
            if knobs.noise != "none":
                drawn = [
                    noise(knobs.noise, row, mixed(torch.tensor(token[0])), logits.dtype) for token in tokens
                ]
                logits = logits + torch.stack(drawn)
            written = max(0, position + 1 - self.prompt)
            t = min(1.0, written / (knobs.tau_horizon or self.max_tokens))
            logits = logits / (knobs.tau_init + t * (knobs.tau_end - knobs.tau_init))
        for token, paid in zip(tokens, torch.softmax(logits, 0), strict=True):
            token[3] += float(paid)

    def evict(self, position: int, budget: int, window: int) -> None:
        """After the row at `position`."""
        if position < self.prompt - 1:
            return
        for layer in self.kept:
            for head, tokens in enumerate(layer):
                old = [t for t in tokens if t[0] <= position - window]
                compete = old
                if not getattr(self.knobs, "compete", True):
                    compete = [t for t in old if t[0] < self.prompt - window]
                pinned = [t for t in compete if t[0] < self.knobs.sinks]
                others = sorted(
                    (t for t in compete if t not in pinned), key=self.worth(position), reverse=True
                )
                stay = pinned + others[: budget - window - len(pinned)]
                new = [t for t in tokens if t[0] > position - window]
                layer[head] = sorted(stay + new, key=lambda t: t[0])

    def worth(self, position: int) -> Any:
        first = self.prompt - self.knobs.score_rows if self.knobs.score_rows else 0

        def of(token: list[Any]) -> float:
            seen = [position - row for row in range(max(token[0], first), position + 1)]
            return token[3] / (sum(self.knobs.forget**age for age in seen) if self.knobs.row_norm else 1)

        return of

    def sets(self) -> list[list[list[int]]]:
        return [[[token[0] for token in tokens] for tokens in layer] for layer in self.kept]


@pytest.mark.parametrize("rows", [1000, 7])
@pytest.mark.parametrize(
    "spec",
    [
        "h2o(budget=12, min_prompt=0)",
        "h2o(budget=12, min_prompt=0, row_norm=True, sinks=2)",
        "h2o(budget=0.4, min_prompt=0, score_rows=9, forget=0.9, row_norm=True)",
        "keyformer(budget=12, min_prompt=0)",
        "keyformer(budget=12, min_prompt=0, recent=0.0, tau_horizon=5, seed=3)",
        "keyformer(budget=12, min_prompt=0, noise=gaussian, frozen=True, sinks=3)",
        "keyformer(budget=12, min_prompt=0, compete=False)",
    ],
)
def test_it_keeps_and_says_what_lists_do(tiny: tuple[ModelFiles, ListModel], spec: str, rows: int) -> None:
    files, model = tiny
    asked = request(spec)
    assert asked.kv is not None
    knobs = asked.kv.named[0][1]  # type: ignore[attr-defined]
    target = engine(files, scheduler__max_batch_tokens=rows, scheduler__max_running=4)
    lists = Lists(knobs, len(PROMPT), 24)
    position, outputs, target_steps = 0, [], steps(target, asked)
    for policy, cached in target_steps:
        tokens = asked.sequences[0].tokens
        budget, window = policy.budget, policy.window
        while position < len(tokens) - 1:  # the last one's row is yet to come
            logits = model.logits(tokens[position], position, lists.attend)
            lists.evict(position, budget, window)
            position += 1
        outputs.append((tokens[-1], int(logits.argmax())))
        assert policy.positions.sort(-1).values.tolist() == lists.sets()
        assert cached.length == budget == policy.sums.shape[-1]
        for layer in range(LAYERS):  # what lies in the cache are those tokens' keys, wherever
            keys = cached.keys(layer)
            for head, tokens_of in enumerate(lists.kept[layer]):
                order = policy.positions[layer, head].argsort()
                want = torch.stack([token[1] for token in tokens_of])
                torch.testing.assert_close(keys[order, head], want, rtol=0, atol=1e-5)
    assert len(outputs) == 23 and all(a == b for a, b in outputs)


@pytest.mark.parametrize(
    "spec", ["h2o(budget=64, min_prompt=0)", "keyformer(budget=1.0)", "keyformer(budget=5)"]
)
def test_neutral_is_dense_beside_dense_requests(tiny: tuple[ModelFiles, ListModel], spec: str) -> None:
    # A budget that holds everything; a prompt shorter than min_prompt.
    files, _ = tiny
    target = engine(files, scheduler__max_batch_tokens=16, scheduler__max_running=8)
    asked = [request(spec if i % 2 else "off", [i, *PROMPT[i:]], 24 - 3 * i, name=f"r{i}") for i in range(6)]
    for each, out in zip(asked, run(target, *asked), strict=True):
        same(out, run(engine(files), request("off", each.prompt, each.params.max_tokens or 0))[0])


def test_answers_do_not_depend_on_batch_chunks_or_preemption(tiny: tuple[ModelFiles, ListModel]) -> None:
    files, _ = tiny
    spec = "keyformer(budget=12, min_prompt=0, seed=5)"
    alone = [run(engine(files), request(spec, [i, *PROMPT[i:]]))[0] for i in range(8)]
    token_bytes = 2 * LAYERS * KV_HEADS * HEAD_DIM * 8
    for flags in (
        {},
        {"scheduler__max_batch_tokens": 9, "scheduler__max_running": 9},
        {"cache__kv_bytes": 100 * token_bytes},
    ):
        target = engine(files, **flags)
        # The first ones grow, and take blocks from those that came later.
        dense = [request("off", PROMPT[:17], 40, name=f"dense{i}") for i in range(2)]
        asked = [request(spec, [i, *PROMPT[i:]], name=f"r{i}") for i in range(8)]
        for got, want in zip(run(target, *dense, *asked)[2:], alone, strict=True):
            same(got, want)
    assert target.stats().preemptions > 0


def test_choices_of_a_request_go_on_each_for_itself(tiny: tuple[ModelFiles, ListModel]) -> None:
    files, _ = tiny
    spec = "h2o(budget=12, min_prompt=0)"
    two = run(engine(files), request(spec, n=2, temperature=1, seed=1))[0]
    first, second = (c.token_ids for c in two.completions)
    assert first != second
    greedy = run(engine(files), request(spec, n=2))[0]
    alone = run(engine(files), request(spec))[0].completions[0].token_ids
    assert [c.token_ids for c in greedy.completions] == [alone, alone]


def test_the_prefix_cache_stands_in_for_no_row_that_is_scored(tiny: tuple[ModelFiles, ListModel]) -> None:
    files, _ = tiny
    target = engine(files)
    for spec, hits in (
        ("h2o(budget=12, min_prompt=0)", 0),
        ("h2o(budget=12, min_prompt=0, score_rows=10)", 28),
    ):
        run(target, request("off"))  # leaves the prompt's blocks behind
        warm = run(target, request(spec))[0]
        assert warm.cached_tokens == hits
        same(warm, run(engine(files), request(spec))[0])


def test_a_window_of_the_whole_budget_slides(tiny: tuple[ModelFiles, ListModel]) -> None:
    files, _ = tiny
    spec = "keyformer(budget=12, min_prompt=0, recent=1.0)"
    for policy, cached in steps(engine(files), request(spec)):
        want = torch.arange(cached.computed - 12, cached.computed).expand_as(policy.positions)
        assert torch.equal(policy.positions.sort(-1).values, want)
    same(
        run(engine(files), request(spec))[0], run(engine(files), request("streaming(budget=12, sinks=0)"))[0]
    )


def test_a_budget_larger_than_the_prompt_fills_up_first(tiny: tuple[ModelFiles, ListModel]) -> None:
    files, _ = tiny
    lengths = [cached.length for _, cached in steps(engine(files), request("h2o(budget=50, min_prompt=0)"))]
    assert lengths == [*range(40, 50), *[50] * 13]


def test_memory_does_not_grow(tiny: tuple[ModelFiles, ListModel]) -> None:
    files, _ = tiny
    target = engine(files)
    used = []
    for policy, cached in steps(target, request("keyformer(budget=14, min_prompt=0)", max_tokens=500)):
        used.append(target.pool.num_used)
        assert cached.length == 14 and policy.positions.shape == (LAYERS, KV_HEADS, 14)
        ordered = policy.positions.sort(-1).values
        assert (ordered[..., 1:] > ordered[..., :-1]).all()
    assert len(used) == 499 and set(used) == {4}  # 15 tokens at most, 4 to a block


@pytest.mark.parametrize("spec", ["keyformer", "h2o"])
def test_a_quarter_is_at_most_thirty_per_cent_of_dense_bytes(
    tiny: tuple[ModelFiles, ListModel], spec: str
) -> None:
    """By the pool's own count, after the prompt and all through an answer of half its length."""
    files, _ = tiny
    prompt, blocks = [(i * 31) % 190 for i in range(320)], []
    for chosen in (f"{spec}(budget=0.25)", "off"):
        target = engine(files, cache__prefix_caching=False)
        asked = request(chosen, prompt, max_tokens=160)
        target.add(asked)
        used: list[int] = []
        while target.has_work:
            target.step()
            if asked.sequences[0].num_output and not asked.finished:
                used.append(target.pool.num_used)
        blocks.append(used)
    for evicting, dense in zip(*blocks, strict=True):
        assert evicting <= 0.3 * dense
    assert set(blocks[0]) == {80 // kv_rig.BLOCK + 1} | {80 // kv_rig.BLOCK}


def test_only_competing_tokens_get_among_the_keys(tiny: tuple[ModelFiles, ListModel]) -> None:
    files, _ = tiny
    for compete in (True, False):
        spec = f"keyformer(budget=12, min_prompt=0, compete={compete})"
        keys = []
        for policy, cached in steps(engine(files), request(spec, max_tokens=300)):
            old = policy.positions.masked_fill(policy.positions >= cached.computed - policy.window, -1)
            keys.append(old.sort(-1).values)
        assert any((old >= len(PROMPT)).any() for old in keys) == compete
        assert all(torch.equal(old, keys[0]) for old in keys) != compete


def test_h2o_is_keyformer_without_noise_and_heat(tiny: tuple[ModelFiles, ListModel]) -> None:
    files, _ = tiny
    plain = "keyformer(budget=12, min_prompt=0, noise=none, tau_end=1, recent=0.5)"
    expected = run(engine(files), request("h2o(budget=12, min_prompt=0)"))[0]
    same(run(engine(files), request(plain))[0], expected, 0)
    same(run(engine(files), request(plain.replace("none", "constant")))[0], expected)
    noisy = run(engine(files), request(plain.replace("none", "gumbel")))[0]
    assert noisy.completions[0].logprobs != expected.completions[0].logprobs


def test_every_row_pays_one_and_heat_makes_it_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(KV_HEADS, 2, 5, 30, generator=generator)
    logits[..., 2, 27:] = -torch.inf
    rows, keys = torch.arange(25, 30), torch.arange(30).expand(KV_HEADS, -1)
    paid = Keyformer().attention(logits.clone(), 0, rows, keys, 3, 9)
    torch.testing.assert_close(paid.sum(-1), torch.ones(KV_HEADS, 2, 5))
    assert (paid[..., 2, 27:] == 0).all()
    hot = Keyformer(tau_init=1e6, tau_end=1e6).attention(logits.clone(), 0, rows, keys, 3, 9)
    torch.testing.assert_close(hot[..., 0, :], torch.full((KV_HEADS, 2, 30), 1 / 30), rtol=1e-4, atol=0)


def test_noise_is_gumbels_and_its_own_for_every_row_key_head_layer_and_seed() -> None:
    rows = mixed(streams(0, 0, 4, torch.device("cpu"))[:, None, None] ^ torch.arange(200)[:, None])
    keys = mixed(torch.arange(300))
    u = uniform(rows, keys, torch.float64)
    assert u.unique().numel() > 0.97 * u.numel()  # 23 bits: few of 240,000 are equal
    for kind in ("gumbel", "gaussian"):
        drawn = noise(kind, rows, keys, torch.float64)
        assert abs(drawn.mean() - 0.5772) < 0.01 and abs(drawn.std() - 1.2825) < 0.01
    flat = (u - 0.5).flatten(0, 1)
    for other in (u.roll(1, 0), u.roll(1, 1), u.roll(1, 2)):  # neighbours by head, row and key
        assert abs(((u - 0.5) * (other - 0.5)).mean() * 12) < 0.01
    assert abs(torch.corrcoef(flat[::8]).fill_diagonal_(0)).max() < 0.3
    ends = [streams(seed, layer, 4, torch.device("cpu")) for seed in (0, 1, -1, 10**30) for layer in (0, 1)]
    assert torch.cat(ends).unique().numel() == 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_bits_make_infinite_noise(dtype: torch.dtype) -> None:
    # One of 16 million would do: a prompt draws more, and its sums would be NaN.
    ends = unit(torch.tensor([0, -1, 2**31 - 1, -(2**31)], dtype=torch.int32), dtype)
    assert (ends > 0).all() and (ends < 1).all()
    assert ends.log().neg().log().isfinite().all() and (2 * ends - 1).erfinv().isfinite().all()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("keyformer(noise=pink)", "gumbel"),
        ("keyformer(tau_end=0)", "tau_end"),
        ("h2o(budget=0)", "budget"),
        ("h2o(recent=2)", "recent"),
        ("h2o(tau_end=2)", "no knob"),
        ("h2o+keyformer", "both a evictor"),
        ("keyformer+quest", "keyformer"),
        ("snapkv+keyformer", "both decide"),
    ],
)
def test_knobs_out_of_range_are_refused(spec: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        combine(spec)
