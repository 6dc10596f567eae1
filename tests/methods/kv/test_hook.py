"""What holds for every KV method: off means off, memory is real, and a batch changes nobody's answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kv_rig import BLOCK, answer, bits, build_engine, request, run, text_of, tiny_files, tokens
from tokenloom.batch import Batch
from tokenloom.cache.block_pool import OutOfBlocks
from tokenloom.cache.kv_cache import KVCache
from tokenloom.cache.policy import KVPolicy, SequenceShape
from tokenloom.engine.engine import Engine
from tokenloom.engine.request import Request
from tokenloom.errors import RequestError
from tokenloom.kernels import native
from tokenloom.methods.kv import Combination
from tokenloom.models.loader import ModelFiles

PROMPT = text_of(1, 90)
# At a budget that holds everything each of these is plain attention.
NEUTRAL = [
    "snapkv(budget=500)",
    "snapkv(budget=500)+pyramid+adakv+merge",
    "keydiff(budget=500)",
    "knorm(budget=500)",
    "random(budget=1.0)",
    "streaming(budget=500)",
    "quest(budget=500)",
    "tokenselect(budget=500)",
    "snapkv(budget=500)+quest(budget=500)",
    "kivi(bits=2, residual=512, keep_sinks=4, hadamard=True)",
    "snapkv(budget=500)+kivi(residual=512)",
    "kvsharer(layers=0)",
]
# At these each drops or skips most of the prompt.
SMALL = [
    "snapkv(budget=24, window=8)",
    "snapkv(budget=24, window=8, pooling=max)+merge",
    "snapkv(budget=0.3, window=8)+pyramid(beta=4)",
    "snapkv(budget=24, window=8)+adakv",
    "snapkv(budget=24, window=8)+pyramid+adakv+merge",
    "keydiff(budget=24, window=8)",
    "knorm(budget=24)",
    "random(budget=24, window=8)",
    "streaming(budget=24)",
    "streaming(budget=24, positions=cache)",
    "quest(budget=12, page=4, dense_layers=1)",
    "quest(budget=12, page=4, dense_layers=0, group=q)",
    "tokenselect(budget=24, n_init=2, chunk=8, theta=1.0)",
    "tokenselect(budget=0.25, n_init=2, chunk=8, theta=1.0)",
    "tokenselect(budget=24, n_init=2, chunk=8, prefill=False)",
    "keydiff(budget=60, window=8)+quest(budget=12, page=4, dense_layers=0)",
    "kivi(bits=2, residual=32, keep_sinks=4)",
    "snapkv(budget=50, window=8)+merge+kivi(residual=0, axis=token, hadamard=True)",
    "kvsharer(map=[[2,0]])",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return tiny_files(tmp_path_factory.mktemp("llama"))


BACKENDS: dict[str, dict[str, Any]] = {
    "reference": {"model__backend": "reference", "model__dtype": "float32"},
    "torch": {"model__backend": "torch"},
}
if native is not None:
    BACKENDS["native"] = {"model__backend": "cpu", "model__dtype": "float32", "model__quantize": "q8"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spec", NEUTRAL)
def test_a_neutral_setting_gives_the_bits_of_no_method(files: ModelFiles, backend: str, spec: str) -> None:
    engine = build_engine(files, cache__prefix_caching=False, **BACKENDS[backend])
    assert bits(answer(engine, PROMPT, spec)) == bits(answer(engine, PROMPT))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
@pytest.mark.parametrize("spec", SMALL)
def test_a_dense_request_beside_it_keeps_its_bits_and_it_keeps_its_own(
    files: ModelFiles, backend: str, spec: str
) -> None:
    """Both backends give a row the same bits in any batch, so methods must too."""
    engine = build_engine(files, cache__prefix_caching=False, **BACKENDS[backend])
    others = [text_of(5, 33), text_of(6, 70)]
    alone = [answer(engine, PROMPT, spec), *(answer(engine, other) for other in others)]
    if backend == "reference":  # there, chunks of a prompt make no difference either
        engine = build_engine(
            files, cache__prefix_caching=False, scheduler__max_batch_tokens=80, **BACKENDS[backend]
        )
    together = run(
        engine,
        request(PROMPT, spec, "a"),
        request(others[0], "", "b"),
        request(others[1], "", "c"),
        request(PROMPT, spec, "d"),
    )
    assert [bits(o) for o in together[:3]] == [bits(o) for o in alone]
    assert bits(together[3]) == bits(alone[0])


@pytest.mark.parametrize("spec", SMALL)
def test_a_small_budget_changes_what_is_said(files: ModelFiles, spec: str) -> None:
    engine = build_engine(files, cache__prefix_caching=False)
    assert bits(answer(engine, PROMPT, spec)) != bits(answer(engine, PROMPT))


@pytest.mark.parametrize("spec", SMALL)
def test_chunks_of_the_prompt_do_not_matter(files: ModelFiles, spec: str) -> None:
    whole = build_engine(files, cache__prefix_caching=False, model__backend="reference")
    chunked = build_engine(
        files,
        cache__prefix_caching=False,
        model__backend="reference",
        scheduler__max_batch_tokens=19,
        scheduler__max_running=8,
    )
    assert tokens(answer(whole, PROMPT, spec)) == tokens(answer(chunked, PROMPT, spec))


@pytest.mark.parametrize("spec", SMALL)
def test_what_was_preempted_is_computed_again_to_the_same_answer(files: ModelFiles, spec: str) -> None:
    roomy = build_engine(files, cache__prefix_caching=False, model__backend="reference")
    expected = [answer(roomy, text_of(i, 60), spec, max_tokens=40) for i in range(3)]
    token_bytes = 3 * 2 * 2 * 16 * 8
    tight = build_engine(
        files,
        cache__prefix_caching=False,
        model__backend="reference",
        cache__kv_bytes=token_bytes * BLOCK * 37,
    )
    outputs = run(tight, *(request(text_of(i, 60), spec, str(i), max_tokens=40) for i in range(3)))
    assert [tokens(o) for o in outputs] == [tokens(e) for e in expected]
    if "quest" in spec or "tokenselect" in spec:  # these keep all tokens, which do not fit
        assert tight.scheduler.num_preemptions > 0


@pytest.mark.parametrize("spec", SMALL)
def test_choices_that_share_a_prompt_go_their_own_ways(files: ModelFiles, spec: str) -> None:
    engine = build_engine(files, cache__prefix_caching=False, model__backend="reference")
    options: dict[str, Any] = {"temperature": 1.5, "seed": 3}
    both = answer(engine, PROMPT, spec, n=3, max_tokens=20, **options)
    assert len({tuple(t) for t in tokens(both)}) == 3
    assert tokens(answer(engine, PROMPT, spec, max_tokens=20, **options))[0] == tokens(both)[0]
    assert tokens(both) == tokens(answer(engine, PROMPT, spec, n=3, max_tokens=20, **options))


@pytest.mark.parametrize("spec", SMALL)
def test_a_shared_prefix_changes_nothing(files: ModelFiles, spec: str) -> None:
    plain = build_engine(files, cache__prefix_caching=False, model__backend="reference")
    caching = build_engine(files, model__backend="reference")
    longer = PROMPT[:64] + text_of(9, 40)
    expected = [tokens(answer(plain, PROMPT, spec)), tokens(answer(plain, longer, spec))]
    dense = tokens(answer(plain, longer))
    for _ in range(2):
        assert tokens(answer(caching, PROMPT, spec)) == expected[0]
        assert tokens(answer(caching, longer, spec)) == expected[1]
        assert tokens(answer(caching, longer)) == dense
    assert caching.scheduler.prefix_hits > 0


def in_use(engine: Engine) -> int:
    return sum(len(s.blocks) for s in engine.scheduler.running)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("snapkv(budget=24, window=8)", 24 // BLOCK),
        ("keydiff(budget=20, window=8)", 20 // BLOCK),
        ("streaming(budget=16)", 16 // BLOCK),
        ("snapkv(budget=24, window=8)+pyramid+adakv", 24 // BLOCK),
        ("snapkv(budget=0.5, window=8)", -(-45 // BLOCK)),
    ],
)
def test_blocks_in_use_after_the_prompt_are_the_budgets(files: ModelFiles, spec: str, expected: int) -> None:
    engine = build_engine(files, cache__prefix_caching=False)
    engine.add(request(PROMPT, spec, max_tokens=30))
    engine.step()
    assert engine.pool.num_used == in_use(engine) == expected
    for _ in range(9):
        engine.step()
    if "streaming" in spec:
        assert engine.pool.num_used <= expected + 1
    else:
        assert engine.pool.num_used - expected in (2, 3)  # 9 tokens that followed
    engine.abort("r")
    assert engine.pool.num_used == 0


@pytest.mark.parametrize(
    "spec", ["snapkv(budget=24, window=8)", "snapkv(budget=24, window=8)+adakv", "streaming(budget=24)"]
)
def test_an_evictors_peak_is_the_prompt_and_prompts_leave_in_inference_mode(
    files: ModelFiles, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, used, inferring = build_engine(files), [], []
    allocate, copy_cells = engine.pool.allocate, engine.kv.copy_cells

    def watched(*args: Any) -> int:
        block = allocate(*args)
        used.append(engine.pool.num_used)
        return block

    def watched_copy(source: torch.Tensor, target: torch.Tensor) -> None:
        inferring.append(torch.is_inference_mode_enabled())
        copy_cells(source, target)

    monkeypatch.setattr(engine.pool, "allocate", watched)
    monkeypatch.setattr(engine.kv, "copy_cells", watched_copy)
    answer(engine, PROMPT, spec)
    assert max(used) == -(-len(PROMPT) // BLOCK)
    assert inferring and all(inferring)


def test_a_stream_far_longer_than_its_budget_uses_the_same_blocks_throughout(files: ModelFiles) -> None:
    engine, seen = build_engine(files, cache__prefix_caching=False), []
    prompt = request(PROMPT, "streaming(budget=20)", max_tokens=300)
    run(engine, prompt, watch=lambda: seen.append(engine.pool.num_used))
    assert len(set(seen[1:-1])) == 1 and seen[1] == 20 // BLOCK + 1


def test_positions_go_on_after_tokens_were_dropped(files: ModelFiles) -> None:
    """With everything but its last tokens dropped, a model must still answer by their true positions."""
    engine = build_engine(files, cache__prefix_caching=False)
    seen = []
    forward = engine.decoder.forward

    def spy(batch: Batch, kv: KVCache) -> Tensor:
        seen.append(batch.positions.tolist())
        return forward(batch, kv)

    engine.decoder.forward = spy  # type: ignore[method-assign]
    answer(engine, PROMPT, "streaming(budget=16)", max_tokens=5)
    assert seen == [list(range(90)), [90], [91], [92], [93]]


def test_a_method_that_watches_and_leaves_all_as_it_is_costs_no_bit(files: ModelFiles) -> None:
    """Fused layers stop before attention for a policy; what comes out is what one call gives."""

    class Watcher(KVPolicy):
        def attends(self, start: int, stop: int) -> bool:
            return True

    class Watching:
        spec, namespace = "watching", None

        def check(self, *settings: Any) -> None:
            return

        def policy(self, shape: SequenceShape) -> KVPolicy:
            assert shape == SequenceShape(90, 12, 3, 4, 2, 16, "tiny-llama", 512)
            return Watcher()

    for backend, flags in BACKENDS.items():
        engine = build_engine(files, cache__prefix_caching=False, **flags)
        expected, watched = answer(engine, PROMPT), request(PROMPT)
        watched.kv = Watching()
        beside = [] if backend == "torch" else [request(text_of(2, 20), "", "other")]
        assert bits(run(engine, watched, *beside)[0]) == bits(expected)


def test_eight_bits_are_a_setting_of_the_server(files: ModelFiles) -> None:
    engine = build_engine(
        files, model__dtype="float32", model__backend="torch", methods__kv="snapkv(budget=24)+int8"
    )
    assert engine.kv.quantized
    assert len(tokens(answer(engine, PROMPT, "snapkv(budget=24, window=8)+pyramid+merge+int8"))[0]) == 12
    plain = build_engine(files)
    with pytest.raises(RequestError, match="int8: the server's cache is not in 8 bits"):
        plain.add(request(PROMPT, "int8"))


def test_chunks_that_a_server_cannot_hold_are_refused(files: ModelFiles) -> None:
    engine = build_engine(files, scheduler__max_batch_tokens=80)
    with pytest.raises(RequestError, match=r"chunk=32 rows and 64 decodes .* fit .*=80"):
        engine.add(request(PROMPT, "tokenselect(budget=64, chunk=32)"))


def test_sliding_windows_are_refused(tmp_path: Path) -> None:
    from tiny_models import build_tiny
    from tokenloom.models.loader import open_model

    folder, _ = build_tiny(tmp_path, "mistral")
    with pytest.raises(RequestError, match="sliding window"):
        build_engine(open_model(str(folder))).add(request(PROMPT, "snapkv"))


def test_a_policy_that_fails_ends_in_an_error_of_the_loop_not_in_lost_blocks(files: ModelFiles) -> None:
    class Broken:
        spec, namespace = "broken", None

        def check(self, *settings: Any) -> None:
            return

        def policy(self, shape: SequenceShape) -> KVPolicy:
            class Policy(KVPolicy):
                def attends(self, start: int, stop: int) -> bool:
                    return True

                def attend(self, layer: int, q: torch.Tensor, cached: Any) -> None:
                    raise ZeroDivisionError

            return Policy()

    engine, broken = build_engine(files), request(PROMPT)
    broken.kv = Broken()
    engine.add(broken)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    engine.abort("r")
    assert engine.pool.num_used == 0


def test_rows_of_a_prompt_that_are_asked_for_are_computed(files: ModelFiles) -> None:
    engine = build_engine(files)
    plain, under = (
        run(engine, Request(str(i), PROMPT, request(PROMPT, prompt_logprobs=1).params, kv=r.kv))[0]
        for i, r in enumerate((request(PROMPT), request(PROMPT, "snapkv(budget=24, window=8)")))
    )
    assert plain.prompt_logprobs == under.prompt_logprobs


def test_a_prefix_hit_ends_where_a_whole_chunk_does(files: ModelFiles) -> None:
    """Chunks of 6 rows and blocks of 4 tokens: only every third block ends with a chunk."""
    spec = "tokenselect(budget=24, n_init=2, chunk=6, theta=1.0)"
    plain = build_engine(files, cache__prefix_caching=False, model__backend="reference")
    caching = build_engine(files, model__backend="reference")
    answer(caching, PROMPT[:70] + text_of(9, 8), spec)
    assert bits(answer(caching, PROMPT, spec)) == bits(answer(plain, PROMPT, spec))
    assert caching.scheduler.prefix_hits == 60


def test_a_ring_goes_on_dropping_the_oldest_after_blocks_were_short(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_engine(files, cache__prefix_caching=False)
    engine.add(request(PROMPT, "streaming(budget=12)", max_tokens=40))
    for _ in range(6):
        engine.step()
    sequence = engine.scheduler.running[0]
    assert sequence.cached is not None and sequence.policy is not None

    def short(*args: Any) -> None:
        raise OutOfBlocks

    with monkeypatch.context() as patch:
        patch.setattr(sequence.cached, "overwrite", short)
        engine.step()
    assert sequence.cached.length == 13
    dropped, overwrite = [], sequence.cached.overwrite

    def spy(index: torch.Tensor) -> None:
        dropped.append(index.unique().tolist())
        overwrite(index)

    monkeypatch.setattr(sequence.cached, "overwrite", spy)
    engine.step()
    # Five of the eight that are not sinks were replaced before; these are the two oldest.
    assert dropped == [[9], [10]]
    assert sequence.cached.length == 12


@pytest.mark.parametrize("spec", ["streaming(budget=12)", "snapkv(budget=24, window=8)"])
def test_who_cannot_drop_for_want_of_blocks_reads_no_more_for_it(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    """It waits, or is computed again: the answer is that of an engine with room."""
    undisturbed = bits(answer(build_engine(files, model__backend="reference"), PROMPT, spec))
    engine = build_engine(files, model__backend="reference")
    found: list[tuple[int, float]] = []

    def step() -> None:
        for output in engine.step():
            entries = [e for delta in output.deltas for e in delta.logprobs or []]
            found.extend((e.token_id, e.logprob) for e in entries if output.request_id == "poor")

    engine.add(request(text_of(3, 20), name="other", max_tokens=30))
    step()
    engine.add(request(PROMPT, spec, name="poor"))
    while len(engine.scheduler.running) < 2:
        step()

    def short(cached: object) -> None:
        raise OutOfBlocks

    policy = engine.scheduler.running[1].policy
    assert policy is not None
    monkeypatch.setattr(policy, "drop", short)
    while engine.has_work:
        step()
    assert engine.stats().preemptions > 0
    assert [found] == undisturbed


def test_policies_are_made_when_a_sequence_begins_not_when_it_ends(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    plain = Combination.policy

    def spy(self: Combination, shape: SequenceShape) -> KVPolicy:
        made.append(shape)
        return plain(self, shape)

    monkeypatch.setattr(Combination, "policy", spy)
    engine = build_engine(files)
    answer(engine, PROMPT, "streaming(budget=12)")
    assert len(made) == 2  # to validate the request, and for its sequence
