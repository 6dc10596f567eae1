"""Prompt tokens ride along and leave no trace but guesses: not in answers, logits, keys or blocks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from draft_rig import build_engine, request, run, same, text_of, tiny_files
from ppd_rig import ACCURACY, install, random_vectors
from tokenloom.batch import Batch, BatchBuilder, SegmentKind
from tokenloom.engine.draft import Tree, Verified
from tokenloom.engine.engine import Engine
from tokenloom.engine.latency_model import Features
from tokenloom.errors import RequestError
from tokenloom.kernels import native
from tokenloom.methods.calibration import SHIPPED
from tokenloom.methods.drafting import draft_method
from tokenloom.methods.drafting.adjacency import Adjacency
from tokenloom.methods.drafting.combination import Together
from tokenloom.methods.drafting.ppd import Learned, Ppd, Prompter, Record
from tokenloom.methods.drafting.ppd_student import Student, read
from tokenloom.methods.drafting.ppd_text import Sample
from tokenloom.methods.drafting.ppd_training import Recipe, train
from tokenloom.methods.drafting.token_recycling import Recycler, TokenRecycling
from tokenloom.models.loader import ModelFiles

BACKENDS: dict[str, dict[str, Any]] = {
    "reference": {"model__backend": "reference"},
    "native": {"model__backend": "cpu", "model__dtype": "float32", "model__quantize": "q8"},
}
TABLE = tuple(map(tuple, ACCURACY.tolist()))


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return tiny_files(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def trained(files: ModelFiles) -> Tensor:
    """Vectors trained on the very answer that tests ask for."""
    engine = build_engine(files)
    prompt = text_of(3, 18)
    [output] = run(engine, request(prompt, max_tokens=40))
    sample = Sample([*prompt, *output.completions[0].token_ids], len(prompt))
    return train(engine, [sample], Recipe(steps=40, texts=1, rate=0.1, dtype=torch.float64)).embeddings


def engine_with(files: ModelFiles, vectors: Tensor, name: str = "", **flags: Any) -> Engine:
    if name == "native" and native is None:
        pytest.skip("the native kernels were not built")
    engine = build_engine(files, **BACKENDS.get(name, {}), **flags)
    install(engine, vectors)
    return engine


def batches_of(engine: Engine) -> list[Batch]:
    """All batches that the engine runs from now on."""
    seen: list[Batch] = []
    forward = engine.decoder.forward

    def spy(batch: Batch, kv: Any) -> Tensor:
        seen.append(batch)
        return forward(batch, kv)

    engine.decoder.forward = spy  # type: ignore[method-assign]
    return seen


# -- the pass ----------------------------------------------------------------------------------------------


def drafted(
    engine: Engine, prompt: list[int], tree: Tree, prompts: list[int], vectors: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits of the tree's rows behind a prompt, and of its prompt tokens."""
    blocks = torch.randperm(40, generator=torch.Generator().manual_seed(1)).tolist()
    common: dict[str, Any] = {"block_size": engine.pool.block_size, "contiguous": False}
    builder = BatchBuilder(engine.device)
    builder.add(SegmentKind.PREFILL, prompt[:-1], blocks, kv_start=0, logits="none", **common)
    engine.decoder.forward(builder.build(), engine.kv)
    builder = BatchBuilder(engine.device)
    tokens, parents = [prompt[-1], *tree.tokens], [-1, *(p + 1 for p in tree.parents)]
    start = len(prompt) - 1
    builder.add_draft(tokens, parents, blocks, kv_start=start, prompts=prompts, vectors=vectors, **common)
    batch = builder.build()
    hidden = engine.decoder.forward(batch, engine.kv)
    assert batch.logits_rows.tolist() == list(range(len(tokens)))
    return engine.decoder.logits(hidden[batch.logits_rows]), engine.decoder.logits(hidden[len(tokens) :])


def small_tree() -> Tree:
    tree = Tree()
    first = tree.add(5, -1, "a")
    tree.add(6, -1, "b")
    tree.add(7, first, "c")
    return tree


@pytest.mark.parametrize("name", BACKENDS)
def test_prompt_tokens_change_no_other_rows_logits(files: ModelFiles, name: str) -> None:
    engine = engine_with(files, random_vectors(64), name)
    vectors = random_vectors(64).to(engine.dtype)
    plain, _ = drafted(engine, text_of(0, 17), small_tree(), [0, 0, 0, 0], vectors)
    beside, said = drafted(engine, text_of(0, 17), small_tree(), [3, 1, 2, 3], vectors)
    assert torch.equal(plain, beside)
    assert len(said) == 9


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_prompt_tokens_say_what_they_say_in_training(tmp_path: Path, kind: str) -> None:
    """Below each node: positions by depth; read are the prefix, the node's path and the chain so far, as far
    as the window reaches."""
    engine = engine_with(tiny_files(tmp_path, kind), random_vectors(64), "reference")
    vectors, prompt, tree = random_vectors(64).double(), text_of(0, 17), small_tree()
    _, said = drafted(engine, prompt, tree, [3, 3, 3, 3], vectors)
    student = Student(engine, torch.float64)
    for chain, path in enumerate([[], [5], [6], [5, 7]]):
        text = [*prompt, *path]
        [expected] = student.logits(vectors, [len(text)], read(engine, text, torch.float64))
        torch.testing.assert_close(said[3 * chain : 3 * chain + 3], expected, rtol=0, atol=1e-9)


def test_an_override_replaces_the_embedding_and_nothing_else(files: ModelFiles) -> None:
    engine = engine_with(files, random_vectors(64), "native")
    tokens = text_of(0, 6)
    vectors = engine.decoder.embed(torch.tensor(tokens[2:5]))
    path = Tree()
    for i, token in enumerate(tokens[2:5]):
        path.add(token, i - 1, "a")
    by_token, _ = drafted(engine, tokens[:2], path, [0] * 4, vectors)
    _, by_vector = drafted(engine, tokens[:2], Tree(), [3], vectors)
    assert torch.equal(by_token[1:], by_vector)


# -- answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", ["random", "zero", "trained"])
def test_an_answer_is_the_same_whatever_the_vectors_are(
    files: ModelFiles, trained: Tensor, kind: str, name: str
) -> None:
    vectors = {"random": random_vectors(64), "zero": torch.zeros(3, 64), "trained": trained}[kind]
    engine = engine_with(files, vectors, name, cache__prefix_caching=False)
    prompt = text_of(3, 18)
    for params in ({}, {"temperature": 0.9, "seed": 5, "top_p": 0.9}):
        plain = run(engine, request(prompt, max_tokens=20, **params))[0]
        same(run(engine, request(prompt, "ppd(rows=24)", max_tokens=20, **params))[0], plain, 0.0)


def foresee(engine: Engine, text: list[int]) -> None:
    """Let every prompt token's likeliest guess be right."""

    def guesses(plan: Any, hidden: Tensor) -> dict[Any, np.ndarray]:
        found = {}
        for sequence, draft in plan.drafts.items():
            at = len(sequence.tokens)
            ahead = [text[at + i] if at + i < len(text) else 0 for i in range(len(draft.prompt_rows))]
            found[sequence] = np.array([[t, *((t + r) % 288 for r in range(1, 10))] for t in ahead])
        return {sequence: rows for sequence, rows in found.items() if len(rows)}

    engine.drafting._guesses = guesses  # type: ignore[method-assign]


def test_right_guesses_save_passes(files: ModelFiles) -> None:
    """Every pass but the first two accepts as deep as the prompt tokens below the last node reached."""
    engine, prompt = engine_with(files, random_vectors(64)), text_of(3, 18)
    plain = run(engine, request(prompt, max_tokens=26))[0]
    foresee(engine, [*prompt, *plain.completions[0].token_ids])
    [output] = run(engine, request(prompt, "ppd(rows=64)", max_tokens=26))
    same(output, plain)
    assert output.drafts is not None
    passes, (first, second, third) = output.drafts.passes, output.drafts.accepted_at
    assert first == second == passes and third > 0
    assert 2 + passes + output.drafts.accepted == 26


def test_beside_others_in_one_batch(files: ModelFiles, trained: Tensor) -> None:
    specs = ["ppd(rows=16)", "", "token_recycling(tree=n16)+ppd(rows=12)", "ngram+ppd", "ppd"]
    prompts = [text_of(seed, 9 + seed) for seed in range(len(specs))]
    alone = engine_with(files, trained, "reference")
    plain = [run(alone, request(prompt, max_tokens=12))[0] for prompt in prompts]
    for flags in ({"scheduler__max_batch_tokens": 25}, {"cache__kv_bytes": 2**16, "cache__block_size": 2}):
        engine = engine_with(files, trained, "reference", **flags)
        asked = [
            request(p, s, f"r{i}", max_tokens=12) for i, (p, s) in enumerate(zip(prompts, specs, strict=True))
        ]
        for actual, expected in zip(run(engine, *asked), plain, strict=True):
            same(actual, expected, 0.0)


def test_the_context_may_end_before_the_prompt_tokens_do(tmp_path: Path) -> None:
    files = tiny_files(tmp_path, max_position_embeddings=32)
    engine = engine_with(files, random_vectors(64))
    prompt = text_of(2, 20)
    plain = run(engine, request(prompt, max_tokens=None))[0]
    assert len(plain.completions[0].token_ids) == 12
    same(run(engine, request(prompt, "ppd(rows=24)", max_tokens=None))[0], plain)


# -- what is left behind -----------------------------------------------------------------------------------


def test_the_cache_holds_the_texts_keys_and_no_others(files: ModelFiles) -> None:
    engine, plain = (engine_with(files, random_vectors(64), "reference") for _ in range(2))
    prompt = text_of(3, 18)
    [known] = run(plain, request(prompt, max_tokens=40))
    foresee(engine, [*prompt, *known.completions[0].token_ids])
    engine.add(request(prompt, "ppd(rows=64)", max_tokens=30))
    plain.add(request(prompt, max_tokens=30))
    for _ in range(6):
        engine.step()
    [sequence] = engine.scheduler.running
    for _ in range(sequence.num_output):
        plain.step()
    [other] = plain.scheduler.running
    count = sequence.num_computed
    assert sequence.tokens == other.tokens and count == other.num_computed > len(prompt) + 12
    assert len(sequence.table.blocks) == -(-count // engine.pool.block_size)
    for ours, theirs in zip(engine.kv.keys + engine.kv.values, plain.kv.keys + plain.kv.values, strict=True):
        at = [[table.slot(i) for i in range(count)] for table in (sequence.table, other.table)]
        assert torch.equal(ours[at[0]], theirs[at[1]])


def test_a_pass_has_the_rows_of_its_tree(files: ModelFiles) -> None:
    engine = engine_with(files, random_vectors(64))
    seen = batches_of(engine)
    [output] = run(engine, request(text_of(1, 9), "ppd(rows=20)", max_tokens=10))
    assert output.drafts is not None
    first, *later = (batch for batch in seen[1:] if batch.overrides)
    assert first.num_rows == 1 + len(first.overrides[0].rows) <= 4  # no guesses yet: the root's alone
    for batch in later:
        nodes, prompts = len(batch.logits_rows) - 1, len(batch.overrides[0].rows)
        assert nodes > 0 and batch.num_rows == 1 + nodes + prompts <= 21


# -- how many rows -----------------------------------------------------------------------------------------


class Machine:
    """Milliseconds of a pass: `base`, and `row` for each row."""

    def __init__(self, base: float, row: float) -> None:
        self.base, self.row = base, row

    def corrected(self, features: Features) -> float:
        return self.base + self.row * features.rows

    def observe(self, features: Features, ms: float) -> None: ...


@pytest.mark.parametrize(("row_ms", "few", "many"), [(10.0, 0, 0), (0.3, 3, 12), (0.001, 32, 64)])
def test_a_pass_carries_the_rows_that_pay_on_the_machine(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch, row_ms: float, few: int, many: int
) -> None:
    engine = engine_with(files, random_vectors(64))
    monkeypatch.setattr(engine.drafting, "_model", lambda: Machine(10.0, row_ms))
    monkeypatch.setattr(Record, "skill", 1.0)
    seen = batches_of(engine)
    run(engine, request(text_of(1, 9), "ppd", max_tokens=10))
    rows = [batch.num_rows - 1 for batch in seen[3:-3]]
    assert rows and few <= max(rows) <= many


def test_guesses_that_are_always_wrong_are_given_up(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_with(files, random_vectors(64))
    monkeypatch.setattr(engine.drafting, "_model", lambda: Machine(10.0, 0.2))
    seen = batches_of(engine)
    run(engine, request(text_of(1, 9), "ppd", max_tokens=120))
    early, late = (sum(b.num_rows - 1 for b in part) for part in (seen[1:41], seen[-40:]))
    assert late < early / 2


# -- the drafter -------------------------------------------------------------------------------------------


@pytest.fixture
def prompter() -> Iterator[Prompter]:
    made = Prompter(Ppd(rows=32), Learned(torch.zeros(3, 8), TABLE), Record())
    made.guesses, made.length = np.arange(30).reshape(3, 10) + 100, 4
    yield made


def test_guesses_are_used_for_the_text_that_they_were_made_for(prompter: Prompter) -> None:
    tree = prompter.propose([1, 2, 3, 4], 64)
    assert [tree.tokens[node] for node in tree.children[-1]][:2] == [100, 101]
    assert {tree.tokens[node] // 10 for node in range(len(tree)) if tree.depths[node] == 2} == {11}
    prompter.length = 3
    stale = prompter.propose([1, 2, 3, 4], 64)
    assert len(stale) == 0 and stale.prompts == tree.prompts[:1]


def test_the_next_guesses_come_from_below_the_last_accepted_token(prompter: Prompter) -> None:
    prompter.propose([1, 2, 3, 4], 64)
    prompter.learn(Verified([4, 100, 110], [0, 1, 2], [0, 1], np.empty((0, 0)), np.full((1, 10), 9)))
    assert prompter.length == 6 and len(prompter.guesses) == 1
    assert prompter.record.accepted == 1
    tree = prompter.propose([1, 2, 3, 4, 100, 8], 64)
    assert set(tree.tokens) == {9} and set(tree.depths) == {1}


def test_a_tables_guesses_and_prompt_tokens_grow_one_tree(prompter: Prompter) -> None:
    table = Adjacency(200, 2)
    table.update([4, 100], np.array([[100, 50], [51, 52]]))
    recycler = Recycler(TokenRecycling(k=2, tree="n16"), table)
    together = Together([prompter, recycler])
    tree = together.propose([1, 2, 3, 4], 64)
    children = [tree.tokens[node] for node in tree.children[-1]]
    assert {100, 101, 50} <= set(children) and len(children) == len(set(children))
    assert {51, 52} <= {tree.tokens[node] for node in tree.children[tree.child(-1, 100)]}
    assert tree.prompts[0] > 1 and tree.vectors is not None


def test_planned_rows_are_added_to_the_nodes_of_others(prompter: Prompter) -> None:
    table = Adjacency(200, 2)
    table.update([4], np.array([[50, 60]]))
    together = Together([Prompter(Ppd(), prompter.learned, Record()), Recycler(TokenRecycling(k=2), table)])
    assert not together.fixed and together.gains(64)
    tree = together.propose([1, 2, 3, 4], 64)
    before = len(tree)
    together.grow(tree, [1, 2, 3, 4], 16)
    assert before == 2 and sum(tree.prompts) > 0


def test_a_tree_is_cut_to_rows_nodes_first() -> None:
    tree = small_tree()
    tree.prompts, tree.vectors = [3, 2, 2, 2], torch.zeros(3, 8)
    assert tree.num_rows == 12
    for rows, nodes, prompts in ((12, 3, [3, 2, 2, 2]), (7, 3, [3, 1, 0, 0]), (2, 2, [0, 0, 0])):
        cut = tree.within(rows)
        assert (len(cut), cut.prompts) == (nodes, prompts)


# -- what is refused ---------------------------------------------------------------------------------------


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(RequestError) as error:
        call()
    assert error.value.param == "draft"
    return str(error.value)


def test_a_model_without_vectors_is_told_how_to_get_them(files: ModelFiles) -> None:
    engine = build_engine(files)
    assert "tokenloom train ppd" in refusal(lambda: engine.add(request([1, 2], "ppd")))


def test_vectors_of_another_width_are_refused(files: ModelFiles) -> None:
    engine = engine_with(files, random_vectors(32))
    assert "width 64" in refusal(lambda: engine.add(request([1, 2], "ppd")))


@pytest.mark.parametrize("rows", [-1, 2, 129])
def test_rows_out_of_range_are_refused(rows: int) -> None:
    assert "rows" in refusal(lambda: draft_method(f"ppd(rows={rows})"))


# -- what comes along --------------------------------------------------------------------------------------


def test_the_default_models_vectors_are_three_and_a_table() -> None:
    path = SHIPPED / "smollm2-135m-instruct@30x9x3x64" / "ppd.safetensors"
    with safe_open(path, "pt") as stored:
        assert set(stored.keys()) == {"embeddings", "accuracy"}
        assert stored.get_tensor("embeddings").shape == (3, 576)
        table = stored.get_tensor("accuracy")
        log = json.loads(stored.metadata()["training"])
    assert path.stat().st_size < 20_000
    assert torch.equal(table, torch.tensor(log["accuracy"]["trained"], dtype=torch.float32))
    for worse in ("random", "untrained"):
        assert (table[:, 0] > 1.5 * torch.tensor(log["accuracy"][worse])[:, 0]).all()
