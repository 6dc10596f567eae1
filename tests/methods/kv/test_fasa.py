"""FASA: its selection, its copies of key columns and its calibration, on tiny random models."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from tiny_models import build_tiny
from tokenloom import LLM, SamplingParams
from tokenloom.cache.block_pool import BlockPool
from tokenloom.cache.block_table import BlockTable
from tokenloom.cache.cached_tokens import CachedTokens
from tokenloom.cache.kv_cache import KVCache
from tokenloom.cache.policy import SequenceShape
from tokenloom.calibrate_cli import calibrate_app
from tokenloom.errors import RequestError
from tokenloom.kernels.reference import ReferenceKernels
from tokenloom.methods.calibration import SHIPPED, load, store
from tokenloom.methods.kv.fasa import Fasa, FasaPolicy
from tokenloom.methods.kv.fasa_calibration import agreement, chunk_dims, chunk_logits
from tokenloom.models.rope import Rope

L, HQ, HK, D = 2, 4, 2, 16
SHAPE = SequenceShape(40, 100, L, HQ, HK, D, "tiny-llama")
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
BARE = {"n_sink": 0, "n_local": 0}


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for calibrations that holds none."""
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def pretend(seed: int = 0) -> None:
    """Keep a random table for the tiny model."""
    generator = torch.Generator().manual_seed(seed)
    tables = {
        c: torch.randint(0, 256, (2, L, D // 2, HQ), dtype=torch.uint8, generator=generator)
        for c in ("pair", "adjacent")
    }
    store("fasa", SHAPE, {**tables, "sizes": torch.tensor([8, 64])}, {})


def tiny(tmp_path: Path, **settings: Any) -> LLM:
    folder, _ = build_tiny(tmp_path)
    return LLM(str(folder), model__dtype="float64", model__backend="reference", **settings)


def policy_of(**knobs: Any) -> FasaPolicy:
    policy = Fasa(**knobs).policy(SHAPE)
    assert isinstance(policy, FasaPolicy)
    return policy


def cached_of(length: int, seed: int = 0) -> CachedTokens:
    """Random keys and values in blocks that do not follow one another."""
    kv = KVCache(L, HK, D, num_blocks=64, block_size=4, dtype=torch.float64, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    kv._data.copy_(torch.randn(kv._data.shape, generator=generator, dtype=torch.float64))
    pool = BlockPool(64, 4)
    table = BlockTable(pool)
    for _ in range(-(-length // 4)):
        pool.allocate(None, 1)  # somebody else's
        table.grow((len(table.blocks) + 1) * 4)
    cached = CachedTokens(kv, table, ReferenceKernels())
    cached.length = length
    return cached


def query(seed: int = 1) -> Tensor:
    return torch.randn(1, HQ, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole_logits(q: Tensor, keys: Tensor) -> Tensor:
    """q . k of every head, `[Hq, n]`."""
    return torch.einsum("hd,nhd->hn", q, keys.repeat_interleave(HQ // HK, 1))


# -- chunks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunking", ["pair", "adjacent"])
def test_chunks_add_up_to_the_whole_logit(chunking: str) -> None:
    q, keys = query()[0], cached_of(30).keys(0)
    torch.testing.assert_close(chunk_logits(q, keys, chunking).sum(1), whole_logits(q, keys))


def test_pairs_are_what_rope_turns_together(tmp_path: Path) -> None:
    llm = tiny(tmp_path)
    rope, kernels = Rope(llm.engine.config.rope, D, 512, torch.device("cpu")), ReferenceKernels()
    x = torch.randn(20, HK, D, dtype=torch.float64)
    turned = kernels.rope(x, kernels.rotation(*rope.cos_sin(torch.arange(5, 25)), torch.float64))

    def norms(t: Tensor, chunking: str) -> Tensor:
        return t[:, :, chunk_dims(D, chunking)].norm(dim=-1)

    torch.testing.assert_close(norms(x, "pair"), norms(turned, "pair"), rtol=1e-6, atol=1e-6)
    assert (norms(x, "adjacent") - norms(turned, "adjacent")).abs().max() > 0.1


def test_agreement_is_the_share_of_common_top_tokens() -> None:
    q, keys = query()[0], cached_of(50).keys(0)
    found = agreement(q, keys, "pair", (5, 20))
    whole = whole_logits(q, keys)
    for at, k in enumerate((5, 20)):
        for head in range(HQ):
            top = set(whole[head].topk(k).indices.tolist())
            for chunk in range(D // 2):
                logits = sum(q[head, d] * keys[:, head // (HQ // HK), d] for d in (chunk, chunk + D // 2))
                own = set(logits.topk(k).indices.tolist())  # type: ignore[union-attr]
                assert found[at, head, chunk] == pytest.approx(len(top & own) / k)


# -- selection --------------------------------------------------------------------------------------------


def test_all_chunks_select_what_the_head_itself_would_read() -> None:
    pretend()
    cached, q = cached_of(60), query()
    index = policy_of(budget=12, n_tip=D // 2, **BARE).select(1, q, cached, 12)
    best = whole_logits(q[0], cached.keys(1))[:, :-1].topk(11).indices.sort().values
    assert torch.equal(index[:, :-1], best)
    assert (index[:, -1] == 59).all()  # the row's own token is always read


@pytest.mark.parametrize("chunking", ["pair", "adjacent"])
@pytest.mark.parametrize("group", ["q", "kv"])
def test_selection_is_the_best_by_dominant_chunks(chunking: str, group: str) -> None:
    pretend()
    cached, q = cached_of(60), query()
    policy = policy_of(budget=20, n_tip=3, chunking=chunking, group=group, n_sink=2, n_local=5)
    index = policy.select(1, q, cached, 20)
    table = load("fasa", SHAPE)[chunking][0, 1].float()  # [D / 2, Hq], of the 8 top tokens: nearest to 20
    logits = chunk_logits(q[0], cached.keys(1), chunking)  # [Hq, D / 2, n]
    if group == "kv":
        table = table.view(D // 2, HK, -1).sum(2)
        summed = q[0].view(HK, -1, D).sum(1)
        logits = chunk_logits(summed, cached.keys(1), chunking)
    assert index.shape == (table.shape[1], 20)
    for head in range(table.shape[1]):
        scores = logits[head, table[:, head].topk(3).indices].sum(0)
        wanted = {0, 1, *range(55, 60), *(scores[2:55].topk(13).indices + 2).tolist()}
        assert index[head].tolist() == sorted(wanted)


def test_attention_gets_the_budget_and_no_more() -> None:
    pretend()
    cached, q = cached_of(60), query()
    policy = policy_of(budget=20, n_sink=2, n_local=5)
    attended = policy.attend(1, q, cached)
    assert attended is not None and cached.tokens_read == HQ * 20
    index = policy.select(1, q, cached, 20)
    keys, values = (x.repeat_interleave(HQ // HK, 1) for x in (cached.keys(1), cached.values(1)))
    for head in range(HQ):
        k, v = keys[index[head], head], values[index[head], head]
        weights = torch.softmax(k @ q[0, head] / D**0.5, 0)
        torch.testing.assert_close(attended[0, head], weights @ v)


def test_a_layer_that_is_skipped_and_a_short_cache_read_everything() -> None:
    pretend()
    policy = policy_of(budget=20, n_sink=2, n_local=5)
    assert policy.attend(0, query(), cached_of(60)) is None
    assert policy.attend(1, query(), cached_of(20)) is None
    assert policy_of(budget=0.5).attend(1, query(), cached_of(60)) is not None


def test_prediction_reads_the_dominant_columns_alone() -> None:
    pretend()
    policy = policy_of(budget=20, n_tip=2, group="kv", **BARE)
    policy.select(1, query(), cached_of(60), 20)
    assert policy.tip_bytes == HK * 59 * 2 * 2 * 8  # the row's own token is not asked about


# -- copies of columns ------------------------------------------------------------------------------------


def test_copies_equal_slices_of_the_keys_after_random_growth_and_drops() -> None:
    pretend()
    chance = random.Random(3)
    policy, cached = policy_of(budget=20, n_local=4), cached_of(40)
    for step in range(60):
        if chance.random() < 0.15 and cached.length > 30:
            n = cached.length // 2
            keep = [
                torch.stack([torch.tensor(sorted(chance.sample(range(cached.length), n))) for _ in range(HK)])
                for _ in range(L)
            ]
            cached.keep(keep)
        cached.table.grow(cached.length + 1)
        cached.length += 1
        slot = cached.slots()[-1:]
        for layer in range(L):
            fresh = torch.randn(1, HK, D, generator=torch.Generator().manual_seed(step)).double()
            cached.kv.write(layer, slot, fresh, fresh)
            found = policy.dominant_keys(layer, cached)
            columns = policy.columns[layer]
            for head in range(HK):
                assert torch.equal(found[head], cached.keys(layer)[:, head, columns[head]])


def test_a_fork_goes_on_from_the_same_copies() -> None:
    pretend()
    policy, cached = policy_of(budget=20, n_local=4), cached_of(60)
    policy.select(1, query(), cached, 20)
    other = policy.fork()
    assert isinstance(other, FasaPolicy) and other.copies[1] is not policy.copies[1]
    assert torch.equal(other.select(1, query(2), cached, 20), policy.select(1, query(2), cached, 20))


def test_memory_tier_counts_what_moves_and_answers_the_same() -> None:
    pretend()
    cached, q = cached_of(60), query()
    tiered, plain = (
        policy_of(budget=20, n_local=4, mode="m", group="kv"),
        policy_of(budget=20, n_local=4, group="kv"),
    )
    with pytest.raises(ValueError, match="budget"):
        Fasa(budget=20, n_local=20)
    one, other = tiered.attend(1, q, cached), plain.attend(1, q, cached)
    assert one is not None and other is not None and torch.equal(one, other)
    tiers, row_bytes = tiered.tiers, (2 * D - 4) * 8
    assert tiers is not None and tiers.fetched_bytes == HK * 20 * row_bytes
    tiered.attend(1, q, cached)
    assert (tiers.fetched_bytes, tiers.reused_bytes) == (HK * 20 * row_bytes, HK * 20 * row_bytes)
    assert tiers.slow_bytes == HK * 60 * row_bytes
    assert tiers.fast_bytes == HK * (60 * 4 * 8 + 20 * row_bytes)


# -- through the engine -----------------------------------------------------------------------------------


def prompts(*lengths: int) -> list[list[int]]:
    chance = random.Random(7)
    return [[chance.randrange(256) for _ in range(n)] for n in lengths]


def test_a_budget_for_everything_is_dense(tmp_path: Path) -> None:
    llm = tiny(tmp_path)
    pretend()
    given = prompts(30, 70)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=5)
    dense, neutral = llm.generate(given, params), llm.generate(given, params, kv="fasa(budget=200)")
    for a, b in zip(dense, neutral, strict=True):
        assert a.completions[0].token_ids == b.completions[0].token_ids
        assert a.completions[0].logprobs == b.completions[0].logprobs


def test_answers_do_not_depend_on_the_batch_or_on_preemption(tmp_path: Path) -> None:
    llm = tiny(tmp_path)
    pretend()
    spec = "fasa(budget=24, n_sink=2, n_local=4)"
    given = prompts(90, 41, 60)
    alone = [llm.generate([p], GREEDY, kv=spec)[0].completions[0].token_ids for p in given]
    together = [o.completions[0].token_ids for o in llm.generate(given, GREEDY, kv=spec)]
    token_bytes = 2 * L * HK * D * 8
    small = tiny(tmp_path / "again", cache__kv_bytes=token_bytes * 16 * 14, scheduler__max_batch_tokens=80)
    preempted = [o.completions[0].token_ids for o in small.generate(given, GREEDY, kv=spec)]
    assert small.engine.scheduler.num_preemptions
    assert alone == together == preempted
    assert small.engine.pool.num_used == 0


def test_reads_beside_what_snapkv_has_kept(tmp_path: Path) -> None:
    llm = tiny(tmp_path)
    pretend()
    spec = "snapkv(budget=60, window=8)+fasa(budget=24, n_sink=2, n_local=4)"
    assert len(llm.generate(prompts(100), GREEDY, kv=spec)[0].completions[0].token_ids) == 12


# -- calibration ------------------------------------------------------------------------------------------


def test_without_a_calibration_the_request_is_refused_with_the_command(tmp_path: Path) -> None:
    llm = tiny(tmp_path)
    with pytest.raises(RequestError, match="tokenloom calibrate fasa") as refused:
        llm.generate(prompts(30), GREEDY, kv="fasa")
    assert refused.value.param == "kv"
    assert not llm.engine.has_work


def test_the_command_finds_the_chunk_that_decides(tmp_path: Path) -> None:
    folder, model = build_tiny(tmp_path)
    with torch.no_grad():  # queries and keys live in chunk 5 of every head, nearly alone
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                weight = projection.weight.view(-1, D, 64)
                rest = [d for d in range(D) if d % 8 != 5]
                weight[:, rest] *= 0.05
    model.save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(random.Random(i).randrange(97, 123)) for i in range(600)))
    command = ["fasa", "--model", str(folder), "--text", str(text), "--passages", "2", "--tokens", "128"]
    result = CliRunner().invoke(calibrate_app, [*command, "--rows", "4"])
    assert result.exit_code == 0, result.output
    best = load("fasa", SHAPE)["pair"][0].float().argmax(1)  # [L, Hq]
    assert (best == 5).all()
    llm = LLM(str(folder))
    given = prompts(60)
    assert llm.generate(given, GREEDY, kv="fasa(budget=40, n_sink=2, n_local=4)")[0].completions


def test_the_default_model_comes_calibrated() -> None:
    for name in ("smollm2-135m-instruct", "SmolLM2-135M-Instruct.Q4_1"):
        shape = SequenceShape(100, 10, 30, 9, 3, 64, name)
        assert load("fasa", shape)["pair"].shape[1:] == (30, 32, 9)
        assert load("token_sparse", shape)["drift"].shape == (30,)
    with pytest.raises(RequestError):
        load("fasa", SequenceShape(100, 10, 30, 9, 3, 128, "smollm2-135m-instruct"))
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*")) < 100_000


@pytest.mark.parametrize(
    "spec",
    ["fasa(budget=0)", "fasa(chunking=odd)", "fasa(group=all)", "fasa(mode=x)", "fasa(n_tip=-1)"],
)
def test_senseless_knobs_are_refused(tmp_path: Path, spec: str) -> None:
    llm = tiny(tmp_path)
    with pytest.raises(RequestError, match="fasa"):
        llm.generate(prompts(30), GREEDY, kv=spec)
