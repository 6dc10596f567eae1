"""Token Recycling's tree, its table, and where the table is kept."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from draft_rig import build_engine, request, run, same, text_of, tiny_files
from tokenloom.engine.draft import DraftPlace, Verified
from tokenloom.engine.engine import Engine
from tokenloom.errors import RequestError
from tokenloom.methods.drafting.adjacency import MOST_TABLES, Adjacency, Store
from tokenloom.methods.drafting.token_recycling import PAPER80, TREES, Recycler, TokenRecycling
from tokenloom.models.loader import ModelFiles


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return tiny_files(tmp_path_factory.mktemp("llama"))


def place(home: Path | None = None, adapter: str = "", salt: str | None = None) -> DraftPlace:
    return DraftPlace("m", 10, (adapter, salt), {}, home, None)


def table_of(engine: Engine) -> np.ndarray:
    [table] = engine.drafting.shared["token_recycling"]._tables.values()
    return table.cells - 1


def verified(tokens: list[int], depths: list[int], accepted: list[int], top: list[list[int]]) -> Verified:
    return Verified(tokens, depths, accepted, np.array(top))


def test_the_papers_tree_has_its_levels() -> None:
    assert Counter(map(len, PAPER80)) == {1: 8, 2: 21, 3: 25, 4: 15, 5: 8, 6: 3}
    assert sum((*path, 0) not in PAPER80 for path in PAPER80) == 40  # leaves


@pytest.mark.parametrize("tree", TREES)
def test_parents_and_better_ranks_come_first(tree: str) -> None:
    for i, path in enumerate(TREES[tree]):
        before = TREES[tree][:i]
        assert len(path) == 1 or path[:-1] in before
        assert path[-1] == 0 or (*path[:-1], path[-1] - 1) in before


def test_a_tree_is_read_off_the_table_from_the_last_token() -> None:
    table = Adjacency(10, 2)
    table.update([1, 2, 3], np.array([[2, 3], [4, 5], [6, 7]]))
    tree = Recycler(TokenRecycling(k=2), table).propose([9, 1], 80)
    paths = []
    for node, token in enumerate(tree.tokens):
        parent = tree.parents[node]
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    assert set(paths) == {(2,), (3,), (2, 4), (2, 5), (3, 6), (3, 7)}


def test_an_empty_table_guesses_nothing() -> None:
    assert len(Recycler(TokenRecycling(), Adjacency(10, 8)).propose([1], 80)) == 0


@pytest.mark.parametrize(("conflict", "expected"), [("bfs_last", [7, 7]), ("accepted_wins", [6, 6])])
def test_a_token_at_several_nodes_keeps_one_row(conflict: str, expected: list[int]) -> None:
    table = Adjacency(10, 2)
    # Token 5 is known, at depth 1, where it was right, and at depth 2; the rows are in no order of depth.
    seen = verified([5, 5, 5], [0, 2, 1], [0, 2], [[8, 8], [7, 7], [6, 6]])
    Recycler(TokenRecycling(k=2, conflict=conflict), table).learn(seen)
    assert table.successors(5) == expected


def test_after_a_run_every_row_is_empty_or_distinct_tokens(files: ModelFiles) -> None:
    engine = build_engine(files)
    run(engine, request(text_of(0, 12), "token_recycling(tree=paper80)", max_tokens=40))
    data = table_of(engine)
    full = data[(data >= 0).all(1)]
    assert len(full) > 20
    assert (data[(data < 0).any(1)] == -1).all()
    assert all(len(set(row)) == 8 for row in full.tolist())


def test_the_same_run_leaves_the_same_table(files: ModelFiles) -> None:
    tables = []
    for _ in range(2):
        engine = build_engine(files, model__backend="reference")
        run(engine, request(text_of(0, 12), "token_recycling(tree=n16)", max_tokens=30))
        tables.append(table_of(engine))
    assert np.array_equal(*tables)


def test_memory_is_four_bytes_a_cell_and_reported(files: ModelFiles) -> None:
    engine = build_engine(files)
    run(engine, request([1, 2, 3], "token_recycling(k=4)"))
    assert engine.stats().draft_bytes == 288 * 4 * 4


@pytest.mark.parametrize("scope", ["adapter", "engine"])
def test_adapters_and_tenants_have_tables_of_their_own(scope: str) -> None:
    store = Store()
    tables = [store.table(place(adapter=a, salt=s), 8, scope) for a in ("", "x") for s in (None, "tenant")]
    assert len(set(map(id, tables))) == (4 if scope == "adapter" else 2)


def test_tables_are_not_without_number() -> None:
    store = Store()
    for i in range(MOST_TABLES + 5):
        store.table(place(salt=str(i)), 8, "adapter")
    assert store.num_bytes == MOST_TABLES * 10 * 8 * 4


def test_eight_at_once_with_tables_of_their_own_are_each_as_alone(files: ModelFiles) -> None:
    spec = "token_recycling(tree=n16, scope=request)"
    alone = [run(build_engine(files), request(text_of(i, 8), spec))[0] for i in range(8)]
    engine = build_engine(files)
    outputs = run(engine, *(request(text_of(i, 8), spec, f"r{i}") for i in range(8)))
    for output, expected in zip(outputs, alone, strict=True):
        same(output, expected)
        assert output.drafts == expected.drafts


def test_what_was_learned_is_there_after_a_restart(tmp_path: Path) -> None:
    first = Store().table(place(tmp_path), 8, "adapter")
    first.update(list(range(10)) * 10, np.arange(800).reshape(100, 8) % 10)
    first.save()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    assert np.array_equal(Store().table(place(tmp_path), 8, "adapter").cells, first.cells)


def test_a_tenants_words_stay_in_memory(tmp_path: Path) -> None:
    assert Store().table(place(tmp_path, salt="tenant"), 8, "adapter").path is None


@pytest.mark.parametrize("content", [b"", b"no numbers", None])
def test_a_file_that_does_not_fit_is_as_none(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "t.npy"
    if content is None:
        np.save(path, np.full((10, 8), 11, np.int32))  # ids end at 9
    else:
        path.write_bytes(content)
    assert Adjacency(10, 8, path).successors(3) == [-1] * 8


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("token_recycling(k=0)", "k is 0"),
        ("token_recycling(tree=oak)", "tree is 'oak'"),
        ("token_recycling(scope=world)", "scope"),
        ("token_recycling(conflict=war)", "conflict"),
        ("ngram(tokens=0)", "tokens is 0"),
        ("ngram(longest=1, shortest=2)", "shortest=2"),
        ("draft_model", "either model or layers"),
        ("ngram+ngram", "named twice"),
        ("draft_model(layers=2)", "the model itself has 2"),
        ("draft_model(model='/etc')", "drafting.models"),
    ],
)
def test_faulty_specs_are_refused(files: ModelFiles, spec: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as error:
        build_engine(files).add(request([1], spec))
    assert error.value.param == "draft"
