"""What n-gram lookup, draft models and combinations propose; when the engine asks them."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

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
from tokenloom.engine.draft import DraftPlace, Tree
from tokenloom.engine.drafting import LISTEN_EVERY, MOST_WAIT, PROBE_AFTER, features_of
from tokenloom.engine.latency_model import Features, LatencyModel
from tokenloom.engine.pass_times import pass_times
from tokenloom.engine.scheduler import Plan
from tokenloom.errors import RequestError
from tokenloom.methods.drafting import draft_method
from tokenloom.methods.drafting.combination import Together
from tokenloom.methods.drafting.draft_model import MOST_RESIDENT
from tokenloom.methods.drafting.ngram import AGREEMENT, Ngram, NgramDrafter
from tokenloom.models.loader import ModelFiles


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return tiny_files(tmp_path_factory.mktemp("llama"))


def proposal(text: str, **knobs: int) -> str:
    drafter = NgramDrafter(Ngram(**knobs))
    return "".join(map(chr, drafter.propose([ord(c) for c in text], 64).tokens))


def test_lookup_copies_what_followed_the_latest_place() -> None:
    assert proposal("abc1 abc2 abc", tokens=4) == "2 ab"


def test_longer_matches_come_first() -> None:
    assert proposal("xbc1 bc2 xbc", tokens=1) == "1"


def test_of_equal_matches_the_place_before_which_most_agrees_is_taken() -> None:
    assert proposal("long ago abc1 dabc2 dabc3 so long ago abc", tokens=1) == "1"
    assert proposal("xabc1 yabc2 zabc", tokens=1) == "2"


def test_guesses_are_told_apart_by_how_much_of_the_text_agrees() -> None:
    text = [ord(c) for c in "0abcdefgh 1abcd"]
    tree = NgramDrafter(Ngram(tokens=3)).propose(text, 64)
    assert tree.keys == [("ngram", 4), ("ngram", 5), ("ngram", 6)]
    endless = NgramDrafter(Ngram(tokens=2)).propose([7] * 40, 64)
    assert endless.keys == [("ngram", AGREEMENT)] * 2


def test_a_loop_is_foretold_as_far_as_asked() -> None:
    assert proposal("abcabc", tokens=8) == "abcabcab"


def test_nothing_known_is_nothing_guessed() -> None:
    assert proposal("abcd") == "" and proposal("a") == ""


def test_lookup_in_a_growing_text_is_lookup_in_the_whole() -> None:
    text = [t % 3 for t in text_of(0, 60)]
    grown = NgramDrafter(Ngram())
    for end in range(1, 60, 3):
        assert grown.propose(text[:end], 64).tokens == NgramDrafter(Ngram()).propose(text[:end], 64).tokens


def test_a_combination_fills_what_the_first_leaves() -> None:
    def chain(*tokens: int) -> Scripted:
        made, parent = Tree(), -1
        for token in tokens:
            parent = made.add(token, parent, tokens)
        return Scripted(lambda _: made)

    both = Together([chain(1, 2), chain(1, 3, 4)])
    merged = both.propose([0], 4)
    assert (merged.tokens, merged.parents) == ([1, 2, 3], [-1, 0, 0])


def test_what_stands_in_the_text_goes_before_what_stood_elsewhere() -> None:
    method = draft_method("token_recycling+ngram")
    assert method is not None
    drafter = method.drafter(DraftPlace("m", 10, ("", None), {}, None, None))
    assert isinstance(drafter, Together) and isinstance(drafter.drafters[0], NgramDrafter)


def test_a_model_that_drafts_for_itself_is_always_right(files: ModelFiles, tmp_path: Path) -> None:
    engine = build_engine(files, drafting__models=[str(files.path)])
    prompt = text_of(3, 20)
    plain = run(engine, request(prompt))[0]
    output = run(engine, request(prompt, f"draft_model(model={str(files.path)!r}, tokens=3, fixed=True)"))[0]
    same(output, plain)
    assert output.drafts is not None and output.drafts.accepted == output.drafts.tokens > 0
    [resident] = engine.drafting.shared.values()
    assert resident.pool.num_used == 0


def test_a_draft_model_reads_on_where_its_guesses_were_wrong(files: ModelFiles) -> None:
    engine = build_engine(files)
    method = draft_method("draft_model(layers=1)")
    assert method is not None
    place = DraftPlace("m", 288, ("", None), engine.drafting.shared, None, engine)
    text, going = text_of(5, 40), method.drafter(place)
    for end in (7, 8, 12, 13, 40):
        assert going.propose(text[:end], 4).tokens == method.drafter(place).propose(text[:end], 4).tokens


def test_a_draft_model_of_another_vocabulary_is_refused(files: ModelFiles, tmp_path: Path) -> None:
    other = tiny_files(tmp_path, vocab_size=320)
    engine = build_engine(files, drafting__models=[str(other.path)])
    with pytest.raises(ValueError, match="vocabulary"):
        engine.add(request([1], f"draft_model(model={str(other.path)!r})"))


def test_requests_do_not_fill_the_memory_with_draft_models(tmp_path: Path) -> None:
    engine = build_engine(tiny_files(tmp_path, num_hidden_layers=6))
    for layers in range(1, MOST_RESIDENT + 1):
        engine.add(request([1], f"draft_model(layers={layers})", f"r{layers}", max_tokens=1))
    with pytest.raises(RequestError, match="in memory already"):
        engine.add(request([1], "draft_model(layers=5)"))


# -- when --------------------------------------------------------------------------------------------------


def flat_machine(row_ms: float) -> LatencyModel:
    """A pass takes 10 ms, and each of its rows so many more."""
    return LatencyModel.fit([(Features(rows=n, head_rows=n), 10.0 + row_ms * n) for n in range(1, 120)])


def drafted(files: ModelFiles, row_ms: float, right: bool, tokens: int = 200) -> list[int]:
    """Guesses of each pass, on a machine whose times are given."""
    engine = build_engine(files)
    prompt = text_of(1, 10)
    text = [*prompt, *run(engine, request(prompt, max_tokens=tokens))[0].completions[0].token_ids]
    method = Scripted(foretelling(text, 4) if right else lambda tokens: random_tree(0, 4, []), fixed=False)
    model = flat_machine(row_ms)
    model.observe = lambda features, measured_ms: None  # type: ignore[method-assign]
    engine.drafting._latency = model
    counts: list[int] = []
    add_guesses = engine.drafting.plan

    def counted(plan: Plan) -> None:
        add_guesses(plan)
        counts.append(sum(len(draft.tree) for draft in plan.drafts.values()))

    engine.drafting.plan = counted  # type: ignore[method-assign]
    run(engine, request(prompt, method, max_tokens=tokens, logprobs=None))
    return counts


def test_right_guesses_are_verified_where_rows_are_cheap(files: ModelFiles) -> None:
    counts = drafted(files, 0.5, right=True, tokens=100)
    assert len(counts) < 35 and min(counts[5:-3]) >= 4


def test_wrong_guesses_are_given_up_and_tried_again_ever_more_rarely(files: ModelFiles) -> None:
    counts = drafted(files, 0.5, right=False)
    tries = [i for i, n in enumerate(counts) if n]
    late = [i for i in tries if i > 30]
    assert 0 < len(late) <= 4
    gaps = [b - a for a, b in itertools.pairwise(late)]
    assert gaps == sorted(gaps) and all(PROBE_AFTER <= gap <= MOST_WAIT for gap in gaps)


def test_a_drafter_that_rests_hears_one_pass_in_eight(files: ModelFiles) -> None:
    engine, method = build_engine(files), Scripted(lambda tokens: random_tree(0, 4, []), fixed=False, wants=2)
    engine.drafting._latency = flat_machine(1000.0)
    run(engine, request(text_of(1, 10), method, max_tokens=160, logprobs=None))
    assert all(len(verified.tokens) == len(verified.top) == 1 for verified in method.heard)
    assert len(method.heard) == 159 // LISTEN_EVERY  # passes after the prompt's


def test_a_drafter_that_rests_is_asked_for_what_differs_alone(files: ModelFiles) -> None:
    """Guesses of a kind that was refused are not weighed before the rest is over; others are at once."""
    engine, asked = build_engine(files), Counter[str]()
    kinds = iter("aaabaaab" * 100)

    def guess(tokens: list[int]) -> Tree:
        tree = Tree()
        tree.add(0, -1, next(kinds))
        return tree

    method = Scripted(guess, fixed=False)
    engine.drafting._latency = flat_machine(1000.0)
    choose = engine.drafting._choose

    def counted(plan: Plan, parts: Any) -> None:
        asked.update(key for part in parts for key in part.tree.keys)
        choose(plan, parts)

    engine.drafting._choose = counted  # type: ignore[method-assign]
    run(engine, request(text_of(1, 10), method, max_tokens=PROBE_AFTER, logprobs=None))
    assert asked == {"a": 1, "b": 1}


def test_fewer_neighbours_end_a_rest(files: ModelFiles) -> None:
    engine, asked = build_engine(files), []
    method = Scripted(lambda tokens: asked.append(len(tokens)) or random_tree(0, 4, []), fixed=False)
    method.glance = lambda tokens, most: Tree()  # type: ignore[method-assign]
    engine.drafting._latency = flat_machine(1000.0)
    engine.add(request(text_of(1, 10), method, max_tokens=60, logprobs=None))
    engine.add(request(text_of(2, 10), name="neighbour", max_tokens=5))
    for _ in range(12):
        engine.step()
    assert asked == [11, 15]  # at first, and when it is alone
    engine.abort("r")


def test_nothing_is_tried_where_even_right_guesses_would_lose(files: ModelFiles) -> None:
    assert not any(drafted(files, 1000.0, right=True, tokens=60)[20:])


def test_drafted_rows_count_in_what_an_iteration_is_planned_to_take(files: ModelFiles) -> None:
    engine = build_engine(files)
    engine.add(request([1] * 9, Scripted(lambda tokens: random_tree(0, 5, []))))
    engine.step()
    plan = engine.scheduler.schedule()
    before = features_of(plan)
    engine.drafting.plan(plan)
    after = features_of(plan)
    assert (after.rows - before.rows, after.head_rows - before.head_rows) == (5, 5)
    assert after.context > before.context
    engine.abort("r")


def test_guesses_take_no_row_from_prompts(files: ModelFiles) -> None:
    engine = build_engine(files, scheduler__max_batch_tokens=8)
    engine.add(request([1] * 4, Scripted(lambda tokens: random_tree(0, 20, []))))
    engine.step()
    engine.add(request([2] * 30, name="other"))
    plan: list[Plan] = []
    schedule = engine.scheduler.schedule
    engine.scheduler.schedule = lambda: plan.append(schedule()) or plan[-1]  # type: ignore[method-assign,func-returns-value]
    engine.step()
    assert list(plan[0].rows.values()) == [1, 7] and plan[0].num_rows == 8
    for name in ("r", "other"):
        engine.abort(name)


def test_pass_times_are_measured_once(files: ModelFiles, tmp_path: Path) -> None:
    engine = build_engine(files)
    first = pass_times(engine, tmp_path)
    assert first.predict(Features(rows=1, context=64, head_rows=1)) > 0
    assert engine.pool.num_used == 0
    assert pass_times(engine, tmp_path).beta == first.beta


def test_where_nothing_can_be_measured_nothing_is_guessed(files: ModelFiles) -> None:
    engine = build_engine(files)
    taken = [engine.pool.allocate() for _ in range(engine.pool.num_blocks)]
    model = pass_times(engine, None)
    assert model.predict(Features(rows=2, head_rows=2)) >= 1.9 * model.predict(Features(rows=1, head_rows=1))
    for block in taken:
        engine.pool.release(block)
