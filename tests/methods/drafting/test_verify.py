"""Guesses change how many passes an answer takes, and nothing else: not its tokens, nor their probabilities,
nor what the prefix cache holds, whoever guesses and whatever is beside it in the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from draft_rig import (
    Scripted,
    build_engine,
    foretelling,
    random_tree,
    request,
    run,
    same,
    text_of,
    tiny_files,
)
from tokenloom.batch import BatchBuilder, SegmentKind
from tokenloom.engine.adapters import AdapterRegistry
from tokenloom.engine.request import Request
from tokenloom.errors import RequestError
from tokenloom.kernels import native
from tokenloom.methods.drafting.draft_model import Resident
from tokenloom.models.adapters import Adapter, Dims, LoraConfig
from tokenloom.models.loader import ModelFiles

SPECS = [
    "ngram(fixed=True)",
    "token_recycling(tree=paper80)",
    "token_recycling(tree=n16, conflict=accepted_wins)",
    "token_recycling(tree=chain4, scope=request)+ngram",
    "draft_model(layers=1, fixed=True)",
    "token_recycling+ngram",
]
BACKENDS = {
    "reference": {"model__backend": "reference"},
    "torch": {"model__backend": "torch"},
    "native": {"model__backend": "cpu", "model__dtype": "float32", "model__quantize": "q8"},
    "native int8": {"model__backend": "cpu", "model__dtype": "float32", "cache__dtype": "int8"},
}
EXACT = ("reference", "native")  # a row has the same bits in any batch


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return tiny_files(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return tiny_files(tmp_path_factory.mktemp("mistral"), "mistral")


def backend(name: str) -> dict[str, Any]:
    if name.startswith("native") and native is None:
        pytest.skip("the native kernels were not built")
    return BACKENDS[name]


def answer_of(engine: Any, prompt: list[int], **params: Any) -> list[int]:
    return [*prompt, *run(engine, request(prompt, **params))[0].completions[0].token_ids]


# -- the pass ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_node_has_the_logits_and_keys_of_its_path(
    files: ModelFiles, sliding: ModelFiles, kind: str, name: str
) -> None:
    engine = build_engine(files if kind == "llama" else sliding, **backend(name))
    decoder, kv, size = engine.decoder, engine.kv, engine.pool.block_size
    prompt, tree = text_of(0, 30), random_tree(7, 81, [5, 6, 7, 8])
    blocks = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()

    def add(builder: BatchBuilder, tokens: list[int], start: int, logits: str) -> None:
        builder.add(
            SegmentKind.DECODE,
            tokens,
            blocks,
            kv_start=start,
            block_size=size,
            contiguous=False,
            logits=logits,
        )

    builder = BatchBuilder(engine.device)
    add(builder, prompt[:-1], 0, "none")
    decoder.forward(builder.build(), kv)
    builder = BatchBuilder(engine.device)
    parents = [-1, *(node + 1 for node in tree.parents)]
    builder.add_draft(
        [prompt[-1], *tree.tokens], parents, blocks, kv_start=29, block_size=size, contiguous=False
    )
    drafted = decoder.logits(decoder.forward(builder.build(), kv))
    keys = [
        [k[blocks[i // size] * size + i % size].clone() for k in kv.keys] for i in range(29, 30 + len(tree))
    ]
    tolerance = 0.0 if name in EXACT else 1e-4 if "int8" in name else 1e-5
    for node in (0, 13, len(tree) - 1, tree.depths.index(max(tree.depths))):
        path = []
        while node >= 0:
            path.insert(0, node)
            node = tree.parents[node]
        for depth, token in enumerate([prompt[-1], *(tree.tokens[i] for i in path)]):
            builder = BatchBuilder(engine.device)
            add(builder, [token], 29 + depth, "last")
            dense = decoder.logits(decoder.forward(builder.build(), kv))[0]
            row = 0 if depth == 0 else path[depth - 1] + 1
            torch.testing.assert_close(drafted[row], dense, rtol=0, atol=tolerance)
            at = 29 + depth
            for had, k in zip(keys[row], kv.keys, strict=True):
                now = k[blocks[at // size] * size + at % size]
                torch.testing.assert_close(had, now, rtol=0, atol=1 if k.dtype == torch.int8 else 1e-6)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        *((spec, "native") for spec in SPECS),
        *((spec, "reference") for spec in SPECS[1:5:2]),
        (SPECS[3], "native int8"),
        (SPECS[1], "torch"),
    ],
)
def test_an_answer_is_the_same_whoever_guesses(files: ModelFiles, spec: str, name: str) -> None:
    engine = build_engine(files, **backend(name), cache__prefix_caching=False)  # else chunks would differ
    prompt = text_of(3, 9) * 2
    tolerance = 0.0 if name in EXACT else 1e-5
    for params in ({}, {"temperature": 0.8, "seed": 11, "top_p": 0.9}):
        plain = run(engine, request(prompt, max_tokens=16, **params))[0]
        for _ in range(2):  # cold and warm
            same(run(engine, request(prompt, spec, max_tokens=16, **params))[0], plain, tolerance)


@pytest.mark.parametrize("nodes", [0, 12, 60])
def test_right_guesses_save_passes_wherever_they_stand_in_the_tree(files: ModelFiles, nodes: int) -> None:
    engine = build_engine(files)
    prompt = text_of(1, 20)
    text = answer_of(engine, prompt, max_tokens=25)
    output = run(engine, request(prompt, Scripted(foretelling(text, 3, nodes)), max_tokens=25))[0]
    assert [*prompt, *output.completions[0].token_ids] == text
    assert output.drafts is not None
    assert (output.drafts.passes, output.drafts.accepted_at) == (6, [6, 6, 6])


def test_a_garbage_table_changes_no_answer(files: ModelFiles) -> None:
    engine = build_engine(files)
    prompt = text_of(2, 15)
    plain = run(engine, request(prompt))[0]
    run(engine, request(prompt, "token_recycling(tree=paper80)"))
    [table] = engine.drafting.shared["token_recycling"]._tables.values()
    table.cells[:] = torch.randint(0, 289, table.cells.shape, dtype=torch.int32).numpy()
    same(run(engine, request(prompt, "token_recycling(tree=paper80)"))[0], plain)


# -- mixes -------------------------------------------------------------------------------------------------


@st.composite
def mixes(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Requests of all kinds, most of them with guesses that are partly right."""
    return draw(
        st.lists(
            st.fixed_dictionaries(
                {
                    "prompt": st.lists(st.integers(0, 199), min_size=1, max_size=30),
                    "draft": st.sampled_from(["", "right", "right", *SPECS]),
                    "ahead": st.integers(0, 6),
                    "nodes": st.integers(0, 20),
                    "params": st.fixed_dictionaries(
                        {
                            "max_tokens": st.integers(1, 14),
                            "temperature": st.sampled_from([0.0, 0.7]),
                            "seed": st.integers(0, 9),
                            "n": st.sampled_from([1, 1, 2]),
                            "ignore_eos": st.booleans(),
                            "stop": st.sampled_from([(), ("e",), ("a", "in")]),
                            "repetition_penalty": st.sampled_from([1.0, 1.3]),
                            "frequency_penalty": st.sampled_from([0.0, 0.5]),
                            "logit_bias": st.sampled_from([{}, {65: 4.0}]),
                            "min_tokens": st.sampled_from([0, 1]),
                            "top_k": st.sampled_from([0, 5]),
                        }
                    ),
                }
            ),
            min_size=1,
            max_size=4,
        )
    )


def check(files: ModelFiles, mix: list[dict[str, Any]], tolerance: float, **flags: Any) -> None:
    alone = build_engine(files, **{k: v for k, v in flags.items() if k.startswith("model")})
    plain = [run(alone, request(m["prompt"], **m["params"]))[0] for m in mix]
    requests: list[Request] = []
    for i, (m, known) in enumerate(zip(mix, plain, strict=True)):
        draft = m["draft"]
        if draft == "right":
            text = [*m["prompt"], *known.completions[0].token_ids]
            draft = Scripted(foretelling(text, m["ahead"], m["nodes"]), wants=3)
        requests.append(request(m["prompt"], draft, f"r{i}", **m["params"]))
    engine = build_engine(files, **flags)
    for actual, expected in zip(run(engine, *requests), plain, strict=True):
        same(actual, expected, tolerance)
    residents = [kept for kept in engine.drafting.shared.values() if isinstance(kept, Resident)]
    assert all(resident.pool.num_used == 0 for resident in residents)


relaxed = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@relaxed
@given(mixes(), st.integers(3, 40))
def test_any_batch_mix_and_chunk_size_gives_the_same_answers(files: ModelFiles, mix: Any, rows: int) -> None:
    check(files, mix, 1e-9, scheduler__max_batch_tokens=rows)


@settings(relaxed, max_examples=5)
@given(mixes(), st.integers(3, 40))
def test_on_the_reference_backend_to_the_bit(files: ModelFiles, mix: Any, rows: int) -> None:
    check(files, mix, 0.0, scheduler__max_batch_tokens=rows, model__backend="reference")


@settings(relaxed, max_examples=8)
@given(mixes())
def test_guesses_give_way_where_memory_is_short(files: ModelFiles, mix: Any) -> None:
    token_bytes = 2 * files.config.num_layers * files.config.num_kv_heads * files.config.head_dim * 8
    check(files, mix, 1e-9, cache__kv_bytes=56 * token_bytes, cache__block_size=2)


@settings(relaxed, max_examples=5)
@given(mixes())
def test_rows_of_a_tree_may_share_their_prefix(files: ModelFiles, mix: Any) -> None:
    long = [{**m, "prompt": [*text_of(9, 70), *m["prompt"]]} for m in mix]
    check(files, long, 1e-9, cache__shared_prefix_attention="on")


@pytest.mark.parametrize("name", ["torch", "native"])
def test_a_shared_prefix_ends_before_the_first_branch(files: ModelFiles, name: str) -> None:
    engine = build_engine(files, **backend(name), cache__shared_prefix_attention="on")
    prompt = text_of(9, 300 if name == "native" else 75)
    text = answer_of(build_engine(files, **backend(name)), prompt)
    output = run(engine, request(prompt, Scripted(foretelling(text, 3, 20))))[0]
    assert [*prompt, *output.completions[0].token_ids] == text
    assert engine.stats().prefix_reads_saved > 0


@settings(relaxed, max_examples=5)
@given(mixes())
def test_sliding_windows_do_not_mind(sliding: ModelFiles, mix: Any) -> None:
    check(sliding, mix, 1e-9)


@pytest.mark.parametrize("name", ["reference", "native"])
def test_with_and_without_adapters_in_one_batch(files: ModelFiles, name: str) -> None:
    engine = build_engine(files, **backend(name), cache__prefix_caching=False)
    config = LoraConfig(r=4, targets=("q_proj", "down_proj"))
    adapter = Adapter(config, Dims.of(engine.config), engine.dtype, engine.device)
    adapter.flat.copy_(0.3 * torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(0)))
    loaded = AdapterRegistry(2).put("a", adapter, Path())
    prompt = text_of(5, 12)

    def asked(draft: Any, tuned: bool, name: str) -> Request:
        made = request(prompt, draft, name)
        made.adapter = loaded if tuned else None
        return made

    plain = [run(engine, asked("", tuned, "r"))[0] for tuned in (False, True)]
    assert plain[0].completions[0].token_ids != plain[1].completions[0].token_ids
    texts = [[*prompt, *p.completions[0].token_ids] for p in plain]
    for beside in ([], [asked("", True, "p")]):
        drafts = [Scripted(foretelling(text, 2, 6), wants=1) for text in texts]
        # Not in the order of the batch, where rows of one adapter are side by side.
        mixed = [asked(drafts[1], True, "t"), asked(drafts[0], False, "b"), *beside]
        for output, expected in zip(run(engine, *mixed), [plain[1], plain[0], plain[1]], strict=False):
            same(output, expected, 0.0)
        for draft, text in zip(drafts, texts, strict=True):  # each hears what its own rows said
            assert [draft.heard[0].top[row, 0] for row in draft.heard[0].accepted] == text[13:16]


# -- the end of an answer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 6])
def test_no_answer_is_longer_than_asked(files: ModelFiles, max_tokens: int) -> None:
    engine = build_engine(files)
    text = answer_of(engine, text_of(1, 10), max_tokens=30)
    scripted = Scripted(foretelling(text, 8))
    [output] = run(engine, request(text_of(1, 10), scripted, max_tokens=max_tokens))
    assert output.completions[0].token_ids == text[10 : 10 + max_tokens]
    assert all(max(verified.depths) <= max_tokens - 2 for verified in scripted.heard)
    assert scripted.closed == (max_tokens > 1)


def test_an_end_token_among_accepted_guesses_ends_the_answer(files: ModelFiles) -> None:
    engine = build_engine(files)
    prompt = text_of(1, 10)
    text = answer_of(engine, prompt)
    end = text[14]
    params = {"stop_token_ids": [end]}
    plain = run(engine, request(prompt, **params))[0]
    assert plain.completions[0].stop_reason == end
    same(run(engine, request(prompt, Scripted(foretelling(text, 9)), **params))[0], plain)


def test_the_context_is_not_overrun(files: ModelFiles) -> None:
    engine = build_engine(files, model__max_model_len=24)
    endless = Scripted(lambda tokens: random_tree(0, 8, [1] * 8))
    [output] = run(engine, request([1] * 20, endless, max_tokens=None, logprobs=None))
    assert len(output.completions[0].token_ids) == 4


# -- what is left behind -----------------------------------------------------------------------------------


def test_the_prefix_cache_holds_what_it_would_have_held(files: ModelFiles) -> None:
    prompt = text_of(4, 11)
    text = answer_of(build_engine(files), prompt, max_tokens=40)
    plain, drafting = build_engine(files), build_engine(files)
    run(plain, request(prompt, max_tokens=40))
    run(drafting, request(prompt, Scripted(foretelling(text, 5, 9)), max_tokens=40))
    assert drafting.pool._block_of.keys() == plain.pool._block_of.keys()
    again = [run(e, request([*text, 7], "ngram"))[0] for e in (plain, drafting)]
    assert again[0].cached_tokens == again[1].cached_tokens == 48
    same(again[1], again[0])


def test_blocks_of_rejected_guesses_go_back_at_once(files: ModelFiles) -> None:
    engine = build_engine(files)
    engine.add(request([1, 2, 3], Scripted(lambda tokens: random_tree(0, 40, []))))
    for _ in range(4):
        engine.step()
        [sequence] = engine.scheduler.running
        assert len(sequence.table.blocks) == -(-sequence.num_computed // engine.pool.block_size)
    engine.abort("r")
    assert engine.pool.num_used == 0


def test_a_drafter_hears_the_candidates_of_every_row(files: ModelFiles) -> None:
    engine = build_engine(files)
    prompt = text_of(6, 12)
    text = answer_of(engine, prompt)
    scripted = Scripted(foretelling(text, 2, 7), wants=5)
    run(engine, request(prompt, scripted))
    first = scripted.heard[0]
    assert first.top.shape == (8, 5) and len(first.tokens) == len(first.depths) == 8
    known, right, righter = first.accepted
    assert (known, first.depths[right], first.depths[righter]) == (0, 1, 2)
    assert [first.tokens[row] for row in first.accepted] == text[12:15]
    assert [first.top[row, 0] for row in first.accepted] == text[13:16]


def test_drafting_and_dropping_are_not_mixed(files: ModelFiles) -> None:
    from tokenloom.methods.kv import combine

    engine = build_engine(files)
    both = request([1, 2, 3], "ngram")
    both.kv = combine("streaming(budget=16)")
    with pytest.raises(RequestError, match="kv") as error:
        engine.add(both)
    assert error.value.param == "draft"
