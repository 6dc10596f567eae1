"""Probes hold what they ask for, where they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny_models import build_tiny
from tokenloom.bench.kv.probes import KINDS, Sizes, build
from tokenloom.bench.kv.text import Corpus, read_text
from tokenloom.errors import RequestError
from tokenloom.models.loader import open_model
from tokenloom.text.tokenizer import Tokenizer

SIZES = Sizes(prompt_tokens=400, rows=16, copy_tokens=350, depths=(0.0, 0.5, 1.0), keys=3, asked=2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return open_model(str(build_tiny(tmp_path_factory.mktemp("llama"), "llama")[0])).tokenizer


@pytest.fixture
def corpus(tokenizer: Tokenizer) -> Corpus:
    return Corpus(tokenizer, "docs", seed=1)


def test_the_same_seed_gives_the_same_probes(tokenizer: Tokenizer) -> None:
    one, other, third = (build(list(KINDS), Corpus(tokenizer, "docs", seed), SIZES) for seed in (1, 1, 2))
    assert one == other
    assert one != third


def test_text_goes_on_where_the_prompt_ends(corpus: Corpus) -> None:
    (probe,) = build(["text"], corpus, SIZES)
    assert len(probe.prompt) == 400
    assert probe.given is not None and len(probe.given) == 17
    assert probe.answers == (range(1, 17),)
    text = corpus.tokenizer.decode(probe.prompt + probe.given)
    assert text in read_text("docs")


def test_copies_block_is_in_the_prompt_where_it_says(corpus: Corpus) -> None:
    probes = {probe.group: probe for probe in build(["copy"], corpus, SIZES)}
    assert set(probes) == {"copy early", "copy middle", "copy late", "copy absent"}
    for place, at in (("early", 50), ("middle", 175), ("late", 300)):
        probe = probes[f"copy {place}"]
        assert probe.given is not None
        assert probe.prompt[at : at + len(probe.given)] == probe.given
        assert len(probe.prompt) == 350 + len(probe.given)
        assert probe.answers == (range(8, len(probe.given)),)
    assert len(probes["copy absent"].prompt) == 350


def test_needles_are_at_their_depths_and_answers_are_theirs(corpus: Corpus) -> None:
    for depth, probe in zip(SIZES.depths, build(["needle"], corpus, SIZES), strict=True):
        assert len(probe.prompt) == 400
        assert probe.given is not None
        (answer,) = probe.answers
        number = corpus.tokenizer.decode(probe.given[answer.start : answer.stop])
        assert len(number) == 5 and number.isdigit()
        prompt = corpus.tokenizer.decode(probe.prompt)
        asked = corpus.tokenizer.decode(probe.given[: answer.start])
        assert prompt.count(f"{asked}{number}.") == 1
        assert abs(prompt.index(number) / len(prompt) - depth) < 0.15


def test_the_question_can_be_in_the_prompt(tokenizer: Tokenizer) -> None:
    outside, inside = (
        build(
            ["multikey"], Corpus(tokenizer, "docs", 3), Sizes(400, keys=3, asked=2, question_in_prompt=within)
        )[0]
        for within in (False, True)
    )
    assert outside.given is not None and inside.given is not None
    assert len(outside.prompt) == len(inside.prompt) == 400
    assert inside.answers[0].start == 1  # the last token of the question is fed as a row of its own
    for probe in (outside, inside):
        assert probe.given is not None
        assert all(tokenizer.decode(probe.given[a.start : a.stop]).isdigit() for a in probe.answers)


def test_a_summary_is_asked_for_in_a_chat(corpus: Corpus) -> None:
    (probe,) = build(["summary"], corpus, SIZES)
    assert probe.given is None and probe.new_tokens == 16
    assert len(probe.prompt) == 400
    text = corpus.tokenizer.decode(probe.prompt, skip_special_tokens=False)
    assert "summary" in text and text.endswith("<|im_start|>assistant\n")


def test_what_cannot_be_built_is_refused(corpus: Corpus) -> None:
    with pytest.raises(RequestError, match="haystack"):
        build(["haystack"], corpus, SIZES)
    with pytest.raises(RequestError, match="no room"):
        build(["multikey"], corpus, Sizes(100, keys=30))
    with pytest.raises(RequestError, match="/nowhere"):
        read_text("/nowhere")


def test_a_file_of_text_can_be_used(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two three " * 10)
    corpus = Corpus(tokenizer, str(tmp_path / "text.txt"))
    assert len(corpus.take(1000)) == 1000
