"""Token Sparse Attention: what it keeps, what its rows get, and what becomes of the cache."""

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
from tokenloom.cache.policy import SequenceShape
from tokenloom.calibrate_cli import calibrate_app
from tokenloom.engine.request import Request
from tokenloom.errors import RequestError
from tokenloom.kernels import native
from tokenloom.methods.calibration import load
from tokenloom.methods.kv import combine, token_sparse
from tokenloom.methods.kv.token_sparse import TokenSparse, TokenSparsePolicy, attention_of, kept_tokens

L, HQ, HK, D = 3, 4, 2, 16
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
SPEC = "token_sparse(tau=0.3, window=8, pool=3, min_tokens=16, layers=[1], rows=32)"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path / "state"))


def tiny(tmp_path: Path, **settings: Any) -> LLM:
    folder, _ = build_tiny(tmp_path, num_hidden_layers=L)
    return LLM(str(folder), **{"model__dtype": "float64", "model__backend": "reference", **settings})


def prompts(*lengths: int) -> list[list[int]]:
    chance = random.Random(5)
    return [[chance.randrange(256) for _ in range(n)] for n in lengths]


def ids(outputs: list[Any]) -> list[list[int]]:
    return [output.completions[0].token_ids for output in outputs]


class Trace:
    """Runs a prompt; keeps what each call of `attend` got and gave, and the keys at its end."""

    def __init__(self, llm: LLM, prompt: list[int], spec: str) -> None:
        self.calls: list[tuple[int, int, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]] = []
        method = combine(spec)
        request = Request("traced", prompt, SamplingParams(temperature=0, max_tokens=2), kv=method)
        llm.engine.add(request)
        sequence = request.sequences[0]
        policy, cached = sequence.policy, sequence.cached
        assert isinstance(policy, TokenSparsePolicy) and cached is not None
        self.policy = policy
        attend, choose, chosen = policy.attend, policy.choose, list[Tensor]()

        def choosing(q: Tensor, keys: Tensor) -> Tensor:
            chosen.append(choose(q, keys))
            return chosen[-1]

        def tracing(layer: int, q: Tensor, at: Any) -> Tensor | None:
            chosen.clear()
            out = attend(layer, q, at)
            kept = chosen[0] if chosen else None
            keys, values = at.keys(layer).clone(), at.values(layer).clone()
            self.calls.append((layer, at.start, q.clone(), keys, values, kept, out))
            return out

        policy.attend, policy.choose = tracing, choosing  # type: ignore[method-assign]
        while sequence.num_computed < len(prompt):
            llm.engine.step()
        cached.length = len(prompt)
        self.keys = [cached.keys(layer).clone() for layer in range(L)]
        llm.engine.abort("traced")


def masked(q: Tensor, keys: Tensor, values: Tensor, kept: Tensor, start: int) -> Tensor:
    """Attention of every row over all keys, those that its head does not keep masked; other rows zero."""
    n, out = len(q), torch.zeros_like(q)
    for head in range(HQ):
        own = kept[head // (HQ // len(kept))]
        k, v = keys[:, head // (HQ // HK)], values[:, head // (HQ // HK)]
        scores = q[:, head] @ k.t() / D**0.5
        allowed = torch.zeros(len(keys), dtype=torch.bool)
        allowed[own] = True
        ahead = torch.arange(len(keys)) > torch.arange(start, start + n)[:, None]
        scores = scores.masked_fill(~allowed | ahead, -torch.inf)
        rows = own[own >= start] - start
        out[rows, head] = torch.softmax(scores, -1)[rows] @ v
    return out


# -- what is kept -----------------------------------------------------------------------------------------


def test_the_smallest_scores_go_until_they_hold_tau() -> None:
    scores = torch.tensor([0.994, 0.001, 0.003, 0.002], dtype=torch.float64)
    assert kept_tokens(scores, 0.005, 1) == 1  # 3 of 4 go: .001, .003, and the one that reaches .006
    assert kept_tokens(scores, 0.005, 3) == 3
    assert kept_tokens(scores * 7, 0.005, 1) == 1
    assert kept_tokens(scores, 0.0, 1) == 4
    assert kept_tokens(scores, 0.0005, 1) == 4  # not even the smallest


def policy_of(**knobs: Any) -> Any:
    shape = SequenceShape(60, 5, 2, 4, 2, 16)
    return TokenSparse(layers=(1,), window=8, pool=1, min_tokens=4, **knobs).policy(shape)


def test_rows_by_lot_observe_what_is_before_them() -> None:
    keys, q = torch.randn(60, 2, 16).double(), torch.randn(32, 4, 16).double()
    rows = torch.tensor([3, 30, 17])
    seen = attention_of(keys, q[rows], rows + 28)
    for i, row in enumerate(rows.tolist()):
        for head in range(4):
            weights = torch.softmax(keys[: row + 29, head // 2] @ q[row, head] / 4, 0)
            torch.testing.assert_close(seen[head // 2, head % 2, i, : row + 29], weights)
            assert not seen[head // 2, head % 2, i, row + 29 :].any()
    last, lot, again = (
        policy_of(tau=0.3, observers=observers).choose(q, keys) for observers in ("last", "random", "random")
    )
    assert torch.equal(lot, again) and not (last.shape == lot.shape and torch.equal(last, lot))


@pytest.mark.parametrize(("keep", "kept"), [(0.25, 13), (0.5, 26), (0.02, 4), (1.0, 52)])
def test_a_fixed_part_is_kept_whatever_the_scores(keep: float, kept: int) -> None:
    keys, q = torch.randn(60, 2, 16), torch.randn(32, 4, 16)
    assert policy_of(keep=keep).choose(q, keys).shape == (4, kept + 8)


@pytest.mark.parametrize("group", ["q", "kv"])
@pytest.mark.parametrize("length", [100, 128])
def test_kept_rows_attend_among_kept_tokens_and_others_get_zeros(
    tmp_path: Path, group: str, length: int
) -> None:
    trace = Trace(tiny(tmp_path), prompts(length)[0], SPEC.replace("rows", f"group={group}, rows"))
    sparse = [call for call in trace.calls if call[5] is not None]
    assert [call[0] for call in sparse] == [1]
    for layer, start, q, keys, values, kept, out in sparse:
        assert kept is not None and out is not None
        for begin in range(0, len(q), 32):
            part = q[begin : begin + 32]
            end = start + begin + len(part)
            own = trace.policy.choose(part, keys[:end])
            torch.testing.assert_close(
                out[begin : begin + 32], masked(part, keys[:end], values[:end], own, start + begin)
            )
            assert own.shape[1] < end and (own.diff(dim=1) > 0).all()
            window = min(8, len(part))
            assert torch.equal(own[:, -window:], torch.arange(end - window, end).expand(len(own), -1))
        assert trace.policy.kept[layer]


def test_the_whole_prompt_at_once(tmp_path: Path) -> None:
    spec = SPEC.replace("rows=32", "rows=256, chunk=final")
    trace = Trace(tiny(tmp_path), prompts(200)[0], spec)
    _, start, q, keys, values, kept, out = next(call for call in trace.calls if call[5] is not None)
    assert start == 0 and len(q) == 200 and kept is not None and out is not None
    torch.testing.assert_close(out, masked(q, keys, values, kept, 0))
    assert (out == 0).all(-1).any()
    assert not any(call[5] is not None for call in Trace(tiny(tmp_path), prompts(300)[0], spec).calls)


@pytest.mark.skipif(native is None, reason="no native kernels were built")
def test_native_kernels_attend_alike(tmp_path: Path) -> None:
    llm = tiny(tmp_path, model__dtype="float32", model__backend="cpu")
    trace = Trace(llm, prompts(128)[0], SPEC)
    _, start, q, keys, values, kept, out = next(call for call in trace.calls if call[5] is not None)
    assert kept is not None and out is not None
    end = start + 32
    torch.testing.assert_close(
        out[:32], masked(q[:32], keys[:end], values[:end], kept, start), rtol=1e-4, atol=1e-5
    )


def test_keeping_everything_is_plain_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, prompt = tiny(tmp_path, cache__prefix_caching=False), prompts(130)[0]
    dense = Trace(llm, prompt, SPEC.replace("tau=0.3", "tau=0.0"))
    monkeypatch.setattr(token_sparse, "kept_tokens", lambda scores, tau, min_tokens: len(scores))
    whole = Trace(llm, prompt, SPEC.replace("[1]", "[0, 1, 2]"))
    assert any(call[6] is not None for call in whole.calls)
    for one, other in zip(dense.keys, whole.keys, strict=True):
        torch.testing.assert_close(one, other)


# -- the cache, and what follows --------------------------------------------------------------------------


def test_keys_change_behind_the_first_sparse_layer_alone(tmp_path: Path) -> None:
    llm, prompt = tiny(tmp_path, cache__prefix_caching=False), prompts(128)[0]
    dense = Trace(llm, prompt, SPEC.replace("tau=0.3", "tau=0.0"))
    sparse = Trace(llm, prompt, SPEC)
    assert torch.equal(dense.keys[0], sparse.keys[0]) and torch.equal(dense.keys[1], sparse.keys[1])
    assert not torch.equal(dense.keys[2], sparse.keys[2])


@pytest.mark.parametrize(
    "spec",
    [
        SPEC.replace("tau=0.3", "tau=0"),
        SPEC.replace("min_tokens=16", "min_tokens=200"),
        SPEC.replace("layers=[1]", "delta=0"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_neutral_settings_are_dense(tmp_path: Path, spec: str, backend: str) -> None:
    llm = tiny(tmp_path, model__backend=backend)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=5)
    given = prompts(130, 40)
    for a, b in zip(llm.generate(given, params), llm.generate(given, params, kv=spec), strict=True):
        assert a.completions[0].token_ids == b.completions[0].token_ids
        assert a.completions[0].logprobs == b.completions[0].logprobs


def test_answers_do_not_depend_on_the_batch_or_on_preemption(tmp_path: Path) -> None:
    given = prompts(150, 97, 64, 33)
    llm = tiny(tmp_path)
    alone = [ids(llm.generate([p], GREEDY, kv=SPEC))[0] for p in given]
    assert alone != ids(llm.generate(given, GREEDY))
    for settings in ({}, {"scheduler__max_batch_tokens": 96 + 4, "scheduler__max_running": 4}):
        other = tiny(tmp_path / f"with{len(settings)}", **settings)
        assert ids(other.generate(given, GREEDY, kv=SPEC)) == alone
    token_bytes = 2 * L * HK * D * 8
    small = tiny(tmp_path / "small", cache__kv_bytes=token_bytes * 16 * 17)
    assert ids(small.generate(given, GREEDY, kv=SPEC)) == alone
    assert small.engine.pool.num_used == 0


def test_no_prompt_is_shared_whose_keys_depend_on_what_follows(tmp_path: Path) -> None:
    llm, prompt = tiny(tmp_path), prompts(128)[0]
    for spec in (SPEC, "off"):
        first = llm.generate([prompt], GREEDY, kv=spec)[0]
        again = llm.generate([prompt], GREEDY, kv=spec)[0]
        assert first.completions[0].token_ids == again.completions[0].token_ids
        assert (again.cached_tokens > 0) == (spec == "off")


def test_decoding_reads_the_whole_cache_unless_a_selector_stands_beside(tmp_path: Path) -> None:
    llm = tiny(tmp_path)
    given = prompts(128)
    plain = ids(llm.generate(given, GREEDY, kv=SPEC))
    assert plain == ids(llm.generate(given, GREEDY, kv=f"{SPEC}+quest(budget=4096)"))
    assert plain == ids(llm.generate(given, GREEDY, kv=f"quest(budget=4096)+{SPEC}"))
    assert ids(llm.generate(given, GREEDY, kv=f"{SPEC}+snapkv(budget=40, window=8)"))
    with pytest.raises(RequestError, match="both choose"):
        llm.generate(given, GREEDY, kv=f"{SPEC}+tokenselect")


# -- settings, calibration --------------------------------------------------------------------------------


def test_layers_of_least_drift_are_measured(tmp_path: Path) -> None:
    folder, model = build_tiny(tmp_path, num_hidden_layers=L)
    with torch.no_grad():  # layer 1 hardly moves its tokens
        model.model.layers[1].self_attn.o_proj.weight.mul_(0.01)
        model.model.layers[1].mlp.down_proj.weight.mul_(0.01)
    model.save_pretrained(folder)
    llm = LLM(str(folder), model__dtype="float64")
    spec = SPEC.replace("layers=[1], ", "")
    with pytest.raises(RequestError, match="tokenloom calibrate token_sparse"):
        llm.generate(prompts(100), GREEDY, kv=spec)
    result = CliRunner().invoke(calibrate_app, ["token_sparse", "--model", str(folder), "--tokens", "128"])
    assert result.exit_code == 0, result.output
    shape = Request("r", [1], GREEDY).shape(llm.engine.config, llm.engine.name)
    assert load("token_sparse", shape)["drift"].argmin() == 1
    trace = Trace(llm, prompts(100)[0], spec.replace("tau", "delta=0.34, tau"))
    assert list(trace.policy.kept) == [1]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("token_sparse(tau=2)", "tau"),
        ("token_sparse(pool=4)", "odd"),
        ("token_sparse(layers=[9])", "no layer 9"),
        ("token_sparse(layers=[-1])", "layers"),
        ("token_sparse(chunk=final)", "min_tokens"),
        ("token_sparse(rows=1000, layers=[1])", "max_batch_tokens"),
        ("token_sparse(chunk=all)", "chunk"),
    ],
)
def test_senseless_knobs_are_refused(tmp_path: Path, spec: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        tiny(tmp_path).generate(prompts(30), GREEDY, kv=spec)
