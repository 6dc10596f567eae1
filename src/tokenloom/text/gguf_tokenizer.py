"""A `tokenizers` pipeline built from the vocabulary that a GGUF file carries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from tokenloom.errors import ModelError

_PREFIX = "tokenizer.ggml."
# Token types of the GGUF specification.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPECIAL_KEYS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def build_tokenizer(metadata: Mapping[str, Any], file: str) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer that `tokenizer.ggml.*` describes, and its named special tokens ("bos_token", ...).

    Raises ModelError naming `file` and the key that is missing, malformed or not supported.
    """
    builder = _Builder(metadata, file)
    special = {}
    for name, key in _SPECIAL_KEYS.items():
        index = builder.token_id(key)
        if index is not None:
            special[name] = builder.tokens[index]
    return builder.build(), special


class _Builder:
    def __init__(self, metadata: Mapping[str, Any], file: str) -> None:
        self.metadata = metadata
        self.file = file
        self.tokens: list[str] = self._list("tokens", str)
        self.types: list[int] = self._list("token_type", int) if _PREFIX + "token_type" in metadata else []

    def build(self) -> Tokenizer:
        kind = self._required("model")
        if kind == "gpt2":
            tokenizer, adds_bos = self._byte_level()
        elif kind == "llama":
            tokenizer, adds_bos = self._sentencepiece()
        else:
            self._fail("model", f"{kind!r} is not supported; gpt2 and llama are")
        tokenizer.add_special_tokens(list(self._added(_CONTROL, _UNKNOWN, special=True)))
        tokenizer.add_tokens(list(self._added(_USER_DEFINED, special=False)))
        self._add_ends(tokenizer, adds_bos)
        return tokenizer

    def _fail(self, key: str, problem: str) -> NoReturn:
        raise ModelError(f"{self.file}: {_PREFIX}{key}: {problem}")

    def _required(self, key: str) -> Any:
        value = self.metadata.get(_PREFIX + key)
        if value is None:
            self._fail(key, "is missing")
        return value

    def _list(self, key: str, kind: type) -> list[Any]:
        values = self._required(key)
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            self._fail(key, f"must be a list of {kind.__name__} values")
        return values

    def token_id(self, name: str) -> int | None:
        """The id stored under `{name}_token_id`, which must be one of the tokens'."""
        key = f"{name}_token_id"
        index = self.metadata.get(_PREFIX + key)
        if index is not None and (not isinstance(index, int) or not 0 <= index < len(self.tokens)):
            self._fail(key, f"{index!r} is outside the {len(self.tokens)} tokens")
        return index

    def _vocabulary(self) -> dict[str, int]:
        vocabulary = {token: index for index, token in enumerate(self.tokens)}
        if len(vocabulary) < len(self.tokens):
            self._fail("tokens", "some tokens appear twice")
        return vocabulary

    def _byte_level(self) -> tuple[Tokenizer, bool]:
        """GPT-2's byte-level BPE; `pre` names how text is cut before merging."""
        merges = []
        for merge in self._list("merges", str):
            left, _, right = merge.partition(" ")
            merges.append((left, right))
        pre = self.metadata.get(_PREFIX + "pre", "default")
        is_llama3 = pre in ("llama-bpe", "llama3", "llama-v3")
        try:
            model = models.BPE(vocab=self._vocabulary(), merges=merges, ignore_merges=is_llama3)
        except Exception as error:
            self._fail("merges", f"do not fit the tokens ({error})")
        tokenizer = Tokenizer(model)
        if pre in ("default", "gpt-2", "gpt2"):
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        elif pre == "smollm":
            digits = pre_tokenizers.Digits(individual_digits=True)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        elif is_llama3:
            tokenizer.pre_tokenizer = _split_then_bytes(_LLAMA3_SPLIT)
        elif pre == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
            tokenizer.pre_tokenizer = _split_then_bytes(_QWEN2_SPLIT)
        else:
            self._fail(
                "pre", f"{pre!r} is not supported; smollm, gpt-2, default, llama-bpe, llama3 and qwen2 are"
            )
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer, is_llama3

    def _sentencepiece(self) -> tuple[Tokenizer, bool]:
        """SentencePiece's BPE: the merges are the splits of the pieces, best score first."""
        unknown = self.token_id("unknown") or 0
        vocabulary = self._vocabulary()
        model = models.BPE(
            vocab=vocabulary,
            merges=self._merges_from_scores(vocabulary),
            unk_token=self.tokens[unknown] if self.tokens else None,
            fuse_unk=True,
            byte_fallback=True,
        )
        tokenizer = Tokenizer(model)
        adds_space = self.metadata.get(_PREFIX + "add_space_prefix", True)
        spaces = normalizers.Replace(" ", "▁")
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.normalizer = (
            normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if adds_space else spaces
        )
        tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if adds_space else steps)
        return tokenizer, True

    def _merges_from_scores(self, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
        scores = self._list("scores", float)
        if len(scores) != len(self.tokens):
            self._fail("scores", f"has {len(scores)} entries for {len(self.tokens)} tokens")
        ranked = sorted(vocabulary.items(), key=lambda item: (-scores[item[1]], item[1]))
        return [
            (piece[:cut], piece[cut:])
            for piece, _ in ranked
            for cut in range(1, len(piece))
            if piece[:cut] in vocabulary and piece[cut:] in vocabulary
        ]

    def _added(self, *kinds: int, special: bool) -> Iterator[AddedToken]:
        for token, kind in zip(self.tokens, self.types, strict=False):
            if kind in kinds:
                yield AddedToken(token, special=special, normalized=False)

    def _add_ends(self, tokenizer: Tokenizer, adds_bos: bool) -> None:
        ends = {}
        for name, default in (("bos", adds_bos), ("eos", False)):
            index = self.token_id(name)
            if index is not None and self.metadata.get(f"{_PREFIX}add_{name}_token", default):
                ends[name] = (self.tokens[index], index)
        if ends:
            # A list, because the template's string form could not hold a token with a space or a colon.
            before = [ends["bos"][0]] if "bos" in ends else []
            after = [ends["eos"][0]] if "eos" in ends else []
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[*before, "$A", *after], special_tokens=list(ends.values())
            )


def _split_then_bytes(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
