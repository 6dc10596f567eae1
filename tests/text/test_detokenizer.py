"""Whatever the pieces, incremental text put together is the text of the whole."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece_like import gguf_metadata

from tiny_models import tiny_tokenizer, write_tokenizer
from tokenloom.errors import RequestError
from tokenloom.models.gguf_file import GGUFFile
from tokenloom.text.detokenizer import Detokenizer
from tokenloom.text.tokenizer import Tokenizer

any_ids = st.lists(st.integers(0, 10**6), max_size=40)
many = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def default(default_model: Path) -> Tokenizer:
    return Tokenizer.from_gguf(GGUFFile(default_model))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    return Tokenizer.from_gguf(gguf_metadata())


def _pushed(tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip_special_tokens: bool) -> str:
    detokenizer = tokenizer.detokenizer(skip_special_tokens)
    edges = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    parts = [detokenizer.push(ids[start:end]) for start, end in itertools.pairwise(edges)]
    return "".join(parts) + detokenizer.finish()


@pytest.mark.default_model
@many
@given(ids=any_ids, cuts=any_ids, skip=st.booleans())
def test_pieces_equal_the_whole_for_the_default_model(
    default: Tokenizer, ids: list[int], cuts: list[int], skip: bool
) -> None:
    ids = [index % default.vocab_size for index in ids]
    assert _pushed(default, ids, cuts, skip) == default.decode(ids, skip)
    assert default.decode(ids, skip) == default.backend.decode(ids, skip_special_tokens=skip)


@many
@given(ids=any_ids, cuts=any_ids, skip=st.booleans())
def test_pieces_equal_the_whole_for_bytes(
    tiny: Tokenizer, ids: list[int], cuts: list[int], skip: bool
) -> None:
    ids = [index % tiny.vocab_size for index in ids]
    assert _pushed(tiny, ids, cuts, skip) == tiny.decode(ids, skip)
    assert tiny.decode(ids, skip) == tiny.backend.decode(ids, skip_special_tokens=skip)


@many
@given(ids=any_ids, cuts=any_ids, skip=st.booleans())
def test_pieces_equal_the_whole_for_sentencepiece(
    sentencepiece: Tokenizer, ids: list[int], cuts: list[int], skip: bool
) -> None:
    ids = [index % sentencepiece.vocab_size for index in ids]
    assert _pushed(sentencepiece, ids, cuts, skip) == sentencepiece.decode(ids, skip)


@many
@given(text=st.text(max_size=30), cuts=any_ids)
def test_sentencepiece_text_comes_back_as_tokenizers_gives_it(
    sentencepiece: Tokenizer, text: str, cuts: list[int]
) -> None:
    ids = sentencepiece.encode(text)
    expected = sentencepiece.backend.decode(ids, skip_special_tokens=True)
    assert _pushed(sentencepiece, ids, cuts, True) == expected


@pytest.mark.parametrize("character", ["é", "中", "😀"])
def test_no_character_is_cut(tiny: Tokenizer, character: str) -> None:
    data = list(character.encode())
    detokenizer = tiny.detokenizer()
    assert [detokenizer.push([byte]) for byte in data] == [""] * (len(data) - 1) + [character]


def test_what_stays_incomplete_becomes_a_replacement_character(tiny: Tokenizer) -> None:
    detokenizer = tiny.detokenizer()
    assert detokenizer.push([0xE4, 0xB8]) == ""
    assert detokenizer.finish() == "\ufffd"
    detokenizer = tiny.detokenizer()
    assert detokenizer.push([0xE4, 0xB8, ord("a"), 0xFF]) == "\ufffda\ufffd"


def test_special_tokens_are_shown_only_when_asked(tiny: Tokenizer) -> None:
    ids = tiny.encode("hi<|im_end|>")
    assert tiny.detokenizer().push(ids) == "hi"
    assert tiny.detokenizer(skip_special_tokens=False).push(ids) == "hi<|im_end|>"


def test_sentencepiece_drops_one_leading_space_once(sentencepiece: Tokenizer) -> None:
    the = sentencepiece.backend.token_to_id("▁the")
    detokenizer = sentencepiece.detokenizer()
    assert [detokenizer.push([1]), detokenizer.push([the]), detokenizer.push([the])] == ["", "the", " the"]
    spaces = sentencepiece.backend.token_to_id("▁▁▁")
    assert sentencepiece.detokenizer().push([spaces]) == "  "
    assert sentencepiece.detokenizer(skip_special_tokens=False).push([1, the]) == "<s> the"


def test_metaspace_decoders_drop_the_leading_space_too(tmp_path: Path) -> None:
    backend = tiny_tokenizer()
    backend.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
    backend.add_tokens(["▁x"])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_folder(tmp_path)._strips_space


def test_an_unknown_id_is_named() -> None:
    with pytest.raises(RequestError, match="token id 7 is not in the vocabulary"):
        Detokenizer({0: b"a"}).push([0, 7])
