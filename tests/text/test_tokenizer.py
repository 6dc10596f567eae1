"""Encoding and chat layout against transformers; bytes and text of tokens against `tokenizers`."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import pre_tokenizers

from tiny_models import BOS_ID, CHAT_TEMPLATE, EOS_ID, SPECIAL_TOKENS, tiny_tokenizer, write_tokenizer
from tokenloom.errors import ModelError, RequestError
from tokenloom.models.gguf_file import GGUFFile
from tokenloom.text.tokenizer import Tokenizer

CORPUS = [
    "",
    " ",
    "Hello world",
    "  two leading spaces and two trailing  ",
    "def f(x: int) -> int:\n\treturn x ** 2  # square\n\n\nclass A:\n    pass\n",
    "0 12 345 6789 3.14159 1e-5 2024-01-31 0xFF 七",
    "naïve café, Straße, Ελληνικά, русский, 中文字符, 日本語テキスト, हिन्दी, العربية",
    "e\u0301 vs \u00e9; \u212b; ﬁ",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 \U0001f9ff",
    "tabs\t\tand\r\nwindows\r\n\r\nlines\n\n\n",
    "I'm you're he'll WE'VE it's 'tis rock'n'roll",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><|im_start|>",
    " <|im_end|> <|im_ end|><|im_end|>x",
    "https://example.org/a?b=c&d=%20#frag <html>&amp;</html> a_b-c.d$e",
    "\x00\x01\x7f\u200b\ufeff\u2028\ufffd",
    "word" * 50 + "\n" * 20 + " " * 30,
]
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi there"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?\n\n"}],
    [
        {"role": "user", "content": "Grüße 👋"},
        {"role": "assistant", "content": " Hallo! <|im_end|>"},
        {"role": "user", "content": ""},
    ],
]


@pytest.fixture(scope="module")
def theirs(default_model: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(default_model.parent, gguf_file=default_model.name)


@pytest.fixture(scope="module")
def ours(default_model: Path) -> Tokenizer:
    return Tokenizer.from_gguf(GGUFFile(default_model))


@pytest.fixture
def tiny(tmp_path: Path) -> Tokenizer:
    write_tokenizer(tmp_path)
    return Tokenizer.from_folder(tmp_path)


@pytest.mark.default_model
@pytest.mark.parametrize("text", CORPUS)
def test_default_model_encodes_as_transformers_does(ours: Tokenizer, theirs: Any, text: str) -> None:
    assert ours.encode(text) == theirs.encode(text)
    assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.default_model
def test_default_model_splits_every_kind_of_digit(ours: Tokenizer, theirs: Any) -> None:
    """SmolLM's own tokenizer splits all numerals; transformers leaves that out when it reads a GGUF file."""
    split = copy.deepcopy(theirs.backend_tokenizer)
    split.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    text = "x ½ ² ٣٤ Ⅷ 七 12"
    assert ours.encode(text) == split.encode(text).ids != theirs.encode(text)


@pytest.mark.default_model
def test_default_model_encodes_python_sources_as_transformers_does(ours: Tokenizer, theirs: Any) -> None:
    text = Path(json.__file__).read_text("utf-8") + Path(transformers.__file__).read_text("utf-8")[:50_000]
    assert ours.encode(text) == theirs.encode(text)


@pytest.mark.default_model
@pytest.mark.parametrize("skip_special_tokens", [True, False])
@pytest.mark.parametrize("text", CORPUS)
def test_default_model_decodes_as_transformers_does(
    ours: Tokenizer, theirs: Any, text: str, skip_special_tokens: bool
) -> None:
    ids = theirs.encode(text)
    expected = theirs.decode(ids, skip_special_tokens=skip_special_tokens)
    assert ours.decode(ids, skip_special_tokens=skip_special_tokens) == expected


@pytest.mark.default_model
@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_default_model_lays_out_chats_as_transformers_does(
    ours: Tokenizer, theirs: Any, messages: list[dict[str, Any]], add_generation_prompt: bool
) -> None:
    expected = theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert ours.render_chat(messages, add_generation_prompt=add_generation_prompt) == expected


@pytest.mark.default_model
def test_default_model_knows_its_special_tokens(ours: Tokenizer) -> None:
    assert (ours.bos_token_id, ours.eos_token_id, ours.add_bos) == (1, 2, False)
    assert ours.special_ids == frozenset(range(17))
    assert ours.vocab_size == 49152


@pytest.mark.default_model
def test_bytes_of_all_tokens_rebuild_the_text(ours: Tokenizer) -> None:
    for text in CORPUS:
        assert b"".join(map(ours.token_bytes, ours.encode(text))).decode() == text


def test_folder_encodes_as_transformers_does(tiny: Tokenizer, tmp_path: Path) -> None:
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in CORPUS:
        assert tiny.encode(text) == reference.encode(text)
    assert tiny.render_chat(CHATS[2]) == reference.apply_chat_template(
        CHATS[2], tokenize=False, add_generation_prompt=True
    )


def test_every_byte_token_is_its_byte(tiny: Tokenizer) -> None:
    assert [tiny.token_bytes(index) for index in range(256)] == [bytes([byte]) for byte in range(256)]


def test_special_tokens_are_their_own_text(tiny: Tokenizer) -> None:
    assert [tiny.token_bytes(256 + i) for i in range(3)] == [token.encode() for token in SPECIAL_TOKENS]
    ids = tiny.encode("a<|im_end|>b")
    assert ids == [97, EOS_ID, 98]
    assert tiny.decode(ids) == "ab"
    assert tiny.decode(ids, skip_special_tokens=False) == "a<|im_end|>b"


def test_added_tokens_are_their_own_text_whatever_their_letters(tmp_path: Path) -> None:
    backend = tiny_tokenizer()
    backend.add_tokens(["<grüße>", "<你>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.decode(tokenizer.encode("x<grüße>y<你>")) == "x<grüße>y<你>"


def test_bos_is_added_where_the_tokenizer_says_so(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    write_tokenizer(tmp_path)
    backend = tiny_tokenizer()
    backend.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", BOS_ID)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.add_bos
    assert tokenizer.encode("a") == [BOS_ID, 97]
    assert tokenizer.encode("a", add_special_tokens=False) == [97]


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    backend = tiny_tokenizer()
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_folder(tmp_path).encode("xyxyxy") == list(b"xyxyxy")


def test_a_lone_surrogate_is_refused(tiny: Tokenizer) -> None:
    with pytest.raises(RequestError, match="prompt holds a lone surrogate at character 2") as error:
        tiny.encode("ab\ud800c")
    assert error.value.param == "prompt"


@pytest.mark.parametrize("token_id", [-1, 288, 10**9])
def test_ids_outside_the_vocabulary_are_refused(tiny: Tokenizer, token_id: int) -> None:
    for use in (tiny.token_bytes, lambda index: tiny.decode([1, index])):
        with pytest.raises(RequestError, match=f"token id {token_id} is not in the vocabulary"):
            use(token_id)


def test_jinja_file_goes_before_the_inline_template(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    assert Tokenizer.from_folder(tmp_path).chat_template == CHAT_TEMPLATE
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert Tokenizer.from_folder(tmp_path).render_chat([{"content": "ü"}]) == "ü!"


def test_named_templates_serve_tools(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools | length }} tools"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.render_chat([]) == "plain"
    assert tokenizer.render_chat([], tools=[{}, {}]) == "2 tools"


def test_special_tokens_given_as_objects_are_read(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    special = {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "bos_token": None}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (EOS_ID, None)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, r"tokenizer\.json: is missing"),
        ("tokenizer.json", "{}", r"tokenizer\.json: not a readable tokenizer"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: not valid JSON"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: must hold a JSON object"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, file: str, content: str | None, message: str) -> None:
    write_tokenizer(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(ModelError, match=message):
        Tokenizer.from_folder(tmp_path)


def test_other_kinds_of_tokenizer_are_refused(tmp_path: Path) -> None:
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    backend.decoder = tokenizers.decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match=r"tokenizer\.json: decoder: \['WordPiece'\] is not supported"):
        Tokenizer.from_folder(tmp_path)


def test_special_tokens_that_are_not_text_are_named(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "\\ud800"}')
    with pytest.raises(ModelError, match="a special token is not text"):
        Tokenizer.from_folder(tmp_path)


def test_a_template_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelError, match=r"chat_template.jinja: cannot be read"):
        Tokenizer.from_folder(tmp_path)
