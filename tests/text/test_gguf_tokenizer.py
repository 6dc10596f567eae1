"""Tokenizers built from GGUF metadata against the ones transformers builds for the same vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from sentencepiece_like import Metadata, gguf_metadata, pieces
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tiny_models import BOS_ID, EOS_ID, MERGES, SPECIAL_TOKENS, tiny_tokenizer
from tokenloom.errors import ModelError
from tokenloom.text.tokenizer import Tokenizer

TEXTS = [
    "the world",
    "the  the   thing in the world, on.",
    "in",
    "caf\u00e9 中文 ü 😀",
    "a\nb\tc",
    "",
]


def _byte_level(**changes: Any) -> Metadata:
    vocabulary = sorted(tiny_tokenizer().get_vocab().items(), key=lambda item: item[1])
    values: dict[str, Any] = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [token for token, _ in vocabulary],
        "token_type": [3 if token in SPECIAL_TOKENS else 1 for token, _ in vocabulary],
        "merges": MERGES,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        **changes,
    }
    return Metadata(
        Path("bpe.gguf"),
        {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None},
    )


@pytest.fixture(scope="module")
def llama() -> Any:
    """transformers' own Llama tokenizer over the tiny vocabulary."""
    vocabulary = {piece: index for index, (piece, _, _) in enumerate(pieces())}
    ranked = sorted(pieces(), key=lambda item: -item[1])
    merges = [
        (piece[:cut], piece[cut:])
        for piece, _, _ in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    return transformers.LlamaTokenizer(vocab=vocabulary, merges=merges)


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_encodes_and_decodes_as_transformers_does(llama: Any, text: str) -> None:
    tokenizer = Tokenizer.from_gguf(gguf_metadata(add_bos_token=False))
    ids = tokenizer.encode(text)
    assert ids == llama.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == llama.decode(ids, skip_special_tokens=True) == text


def test_sentencepiece_puts_a_space_before_every_run_of_text() -> None:
    """As SentencePiece models were trained, and as llama.cpp does: also after a special token."""
    tokenizer = Tokenizer.from_gguf(gguf_metadata())
    the = tokenizer.backend.token_to_id("▁the")
    assert tokenizer.encode("the</s>the") == [1, the, 2, the]
    without = Tokenizer.from_gguf(gguf_metadata(add_space_prefix=False))
    split = without.encode("the", add_special_tokens=False)
    assert without.encode("the</s>the") == [1, *split, 2, *split]
    assert the not in without.encode("the")


def test_sentencepiece_merges_best_score_first() -> None:
    tokenizer = Tokenizer.from_gguf(gguf_metadata(add_bos_token=False))
    swapped = gguf_metadata(add_bos_token=False)
    texts = swapped.metadata["tokenizer.ggml.tokens"]
    swapped.metadata["tokenizer.ggml.scores"] = [
        50.0 if text == "er" else score
        for text, score in zip(texts, swapped.metadata["tokenizer.ggml.scores"], strict=True)
    ]
    other = Tokenizer.from_gguf(swapped)
    split = [tokenizer.token_bytes(index) for index in tokenizer.encode("ther")]
    other_split = [other.token_bytes(index) for index in other.encode("ther")]
    assert split == [b" the", b"r"]
    assert other_split == [b" t", b"h", b"er"]


def test_bytes_not_in_the_vocabulary_fall_back_to_byte_tokens() -> None:
    tokenizer = Tokenizer.from_gguf(gguf_metadata(add_bos_token=False, add_space_prefix=False))
    assert tokenizer.encode("😀") == [3 + byte for byte in "😀".encode()]
    assert tokenizer.token_bytes(3 + 0xF0) == b"\xf0"


def test_bos_and_eos_flags() -> None:
    def ends(metadata: Metadata) -> list[int]:
        return Tokenizer.from_gguf(metadata).encode("")

    assert ends(gguf_metadata()) == [1]  # SentencePiece models begin with bos unless the file says no
    assert ends(gguf_metadata(add_bos_token=False)) == []
    assert ends(gguf_metadata(add_eos_token=True)) == [1, 2]
    assert ends(_byte_level()) == []
    assert ends(_byte_level(add_bos_token=True)) == [BOS_ID]
    assert ends(_byte_level(pre="llama-bpe")) == [BOS_ID]
    assert Tokenizer.from_gguf(gguf_metadata()).add_bos


@pytest.mark.parametrize("pre", ["gpt-2", "default", None, "smollm", "llama-bpe", "llama3", "qwen2"])
def test_pre_tokenizers_cut_as_the_original_models_do(pre: str | None) -> None:
    """Digits, contractions and spaces are where these differ; a vocabulary of bytes alone shows the cuts."""
    backend = Tokenizer.from_gguf(_byte_level(pre=pre, add_bos_token=False)).backend
    text = "He'S 12345 a  b\n\n c!\n"
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    gpt2 = "He|'|S|Ġ12345|Ġa|Ġ|Ġb|ĊĊ|Ġc|!|Ċ"
    llama3 = "He|'S|Ġ|123|45|Ġa|Ġ|Ġb|ĊĊ|Ġc|!Ċ"
    expected = {
        "smollm": "He|'|S|Ġ|1|2|3|4|5|Ġa|Ġ|Ġb|ĊĊ|Ġc|!|Ċ",
        "llama-bpe": llama3,
        "llama3": llama3,
        "qwen2": "He|'S|Ġ|1|2|3|4|5|Ġa|Ġ|Ġb|ĊĊ|Ġc|!Ċ",
    }
    assert "|".join(pieces) == expected.get(pre or "default", gpt2)


def test_qwen2_composes_unicode_and_others_do_not() -> None:
    split, composed = "e\u0301", list("\u00e9".encode())
    assert Tokenizer.from_gguf(_byte_level(pre="qwen2")).encode(split) == composed
    assert Tokenizer.from_gguf(_byte_level(pre="smollm")).encode(split) == list(split.encode())


def test_llama3_takes_whole_words_from_the_vocabulary() -> None:
    """Llama 3 ignores merges for words that are tokens: a word without a path of merges is one token."""
    metadata = _byte_level(pre="llama-bpe", add_bos_token=False)
    metadata.metadata["tokenizer.ggml.tokens"] = [*metadata.metadata["tokenizer.ggml.tokens"], "zqz"]
    assert Tokenizer.from_gguf(metadata).encode("zqz") == [288]


def test_user_defined_tokens_match_whole_but_are_not_special() -> None:
    metadata = _byte_level()
    metadata.metadata["tokenizer.ggml.tokens"] = [*metadata.metadata["tokenizer.ggml.tokens"], "<think>"]
    metadata.metadata["tokenizer.ggml.token_type"] = [*metadata.metadata["tokenizer.ggml.token_type"], 4]
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.encode("a<think>") == [97, 288]
    assert tokenizer.decode([97, 288, EOS_ID]) == "a<think>"


def test_chat_templates_of_gguf() -> None:
    metadata = _byte_level()
    assert Tokenizer.from_gguf(metadata).chat_template is None
    metadata.metadata |= {
        "tokenizer.chat_template": "A{{ bos_token }}",
        "tokenizer.chat_template.tool_use": "B",
    }
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.chat_template == "A{{ bos_token }}"
    assert tokenizer.render_chat([]) == "A<|im_start|>"
    assert tokenizer.render_chat([], tools=[{}]) == "B"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (_byte_level(pre="gpt-9"), r"bpe\.gguf: tokenizer\.ggml\.pre: 'gpt-9' is not supported"),
        (_byte_level(model="t5"), r"bpe\.gguf: tokenizer\.ggml\.model: 't5' is not supported"),
        (_byte_level(model=None), r"tokenizer\.ggml\.model: is missing"),
        (_byte_level(tokens=None), r"tokenizer\.ggml\.tokens: is missing"),
        (
            _byte_level(tokens=["a", "a"], bos_token_id=0, eos_token_id=0),
            r"tokenizer\.ggml\.tokens: some tokens appear twice",
        ),
        (_byte_level(merges=None), r"tokenizer\.ggml\.merges: is missing"),
        (_byte_level(merges=["nope nope"]), r"tokenizer\.ggml\.merges: do not fit"),
        (_byte_level(bos_token_id=288), r"tokenizer\.ggml\.bos_token_id: 288 is outside the 288 tokens"),
        (_byte_level(bos_token_id=-1), r"tokenizer\.ggml\.bos_token_id: -1 is outside"),
        (_byte_level(padding_token_id="x"), r"tokenizer\.ggml\.padding_token_id: 'x' is outside"),
        (_byte_level(token_type=3), r"tokenizer\.ggml\.token_type: must be a list of int"),
        (_byte_level(merges=[1]), r"tokenizer\.ggml\.merges: must be a list of str"),
        (gguf_metadata(unknown_token_id=10**9), r"tokenizer\.ggml\.unknown_token_id: 1000000000 is outside"),
        (gguf_metadata(scores=None), r"sp\.gguf: tokenizer\.ggml\.scores: is missing"),
        (gguf_metadata(scores=[0.0]), r"tokenizer\.ggml\.scores: has 1 entries"),
    ],
)
def test_complaints_name_file_and_key(metadata: Metadata, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Tokenizer.from_gguf(metadata)


def test_byte_level_vocabulary_is_decoded_as_tokenizers_does() -> None:
    tokenizer = Tokenizer.from_gguf(_byte_level())
    reference = tokenizers.decoders.ByteLevel()
    spelling = bytes_to_unicode()
    for byte in range(128):
        assert tokenizer.decode([byte]) == reference.decode([spelling[byte]])
