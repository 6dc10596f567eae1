"""Text to token ids and back, and chats to text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from tokenloom.errors import ModelError, RequestError
from tokenloom.text.chat_template import ChatTemplate, plain_messages
from tokenloom.text.detokenizer import Detokenizer
from tokenloom.text.gguf_tokenizer import build_tokenizer

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class GGUFMetadata(Protocol):
    """The part of a GGUF file that describes its tokenizer."""

    path: Path
    metadata: dict[str, Any]


class Tokenizer:
    """One model's tokenizer with its special tokens and chat template.

    `special_tokens` maps names such as "bos_token" to their text; `special_ids` are the ids that
    `decode(skip_special_tokens=True)` leaves out; `add_bos` says whether `encode` begins with the bos token.
    `vocab_size` counts ids, including those up to the model's own size that no text produces.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        chat_templates: Mapping[str, str],
        file: str,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens)
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")
        added = backend.get_added_tokens_decoder()
        named = (backend.token_to_id(token) for token in self.special_tokens.values())
        self.special_ids = frozenset(
            [index for index, token in added.items() if token.special]
            + [index for index in named if index is not None]
        )
        self.add_bos = self.bos_token_id is not None and backend.encode("").ids[:1] == [self.bos_token_id]
        self.vocab_size = 1 + max(backend.get_vocab().values())
        self._added_ids = frozenset(added)
        self._templates = {name: ChatTemplate(source) for name, source in chat_templates.items()}
        self._is_byte_level, self._strips_space = _decoding(backend, file)

    @classmethod
    def from_folder(cls, path: Path | str) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja.

        Raises ModelError naming the file that is missing or broken.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ModelError(f"{file}: is missing (a SentencePiece tokenizer.model alone is not read)")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{file}: not a readable tokenizer ({error})") from error
        config = _read_json(folder / "tokenizer_config.json")
        special = _special_tokens({**_read_json(folder / "special_tokens_map.json"), **config})
        try:
            backend.add_special_tokens(
                [tokenizers.AddedToken(token, normalized=False) for token in special.values()]
            )
        except UnicodeEncodeError as error:
            raise ModelError(f"{folder}: a special token is not text ({error.reason})") from error
        return cls(backend, special, _folder_templates(folder, config), str(file))

    @classmethod
    def from_gguf(cls, reader: GGUFMetadata) -> Tokenizer:
        """Build the tokenizer of a GGUF file. Raises ModelError naming the file and the key at fault."""
        metadata, file = reader.metadata, str(reader.path)
        backend, special = build_tokenizer(metadata, file)
        prefix = "tokenizer.chat_template"
        templates = {
            key.removeprefix(prefix).removeprefix(".") or "default": source
            for key, source in metadata.items()
            if key == prefix or key.startswith(prefix + ".")
        }
        return cls(backend, special, templates, file)

    @property
    def chat_template(self) -> str | None:
        """Source of the default chat template; None if the model has none."""
        template = self._templates.get("default")
        return None if template is None else template.source

    @property
    def tool_template(self) -> str | None:
        """Source of the chat template for conversations with tools; None if the model has none."""
        template = self._templates.get("tool_use")
        return self.chat_template if template is None else template.source

    def pad_vocabulary(self, vocab_size: int) -> None:
        """Take in the ids up to the model's vocabulary size: it can emit them, and they decode to nothing."""
        self.vocab_size = max(self.vocab_size, vocab_size)
        for cached in ("_bytes_of", "_bytes_of_text"):
            self.__dict__.pop(cached, None)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`; special tokens written in it are recognised.

        A rendered chat already holds its bos token, so encode it with `add_special_tokens=False`.

        Raises RequestError (param "prompt") if `text` holds a lone surrogate.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"prompt holds a lone surrogate at character {error.start}, which is not text", param="prompt"
            ) from None
        # The batch call lets other threads run meanwhile, which `encode` does not; it is no slower.
        [encoding] = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; broken UTF-8 becomes U+FFFD. Raises RequestError for an unknown id."""
        detokenizer = self.detokenizer(skip_special_tokens)
        return detokenizer.push(ids) + detokenizer.finish()

    def detokenizer(self, skip_special_tokens: bool = True) -> Detokenizer:
        """A fresh incremental decoder for one sequence."""
        table = self._bytes_of_text if skip_special_tokens else self._bytes_of
        return Detokenizer(table, strip_space=self._strips_space)

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes that a token stands for. Raises RequestError for an id outside the vocabulary."""
        try:
            return self._bytes_of[token_id]
        except KeyError:
            raise RequestError(f"token id {token_id} is not in the vocabulary") from None

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Lay out a conversation as the model was trained to read it; `variables` go to the template.

        Raises RequestError (param "messages") if the model has no template, or if the template fails.
        """
        named = "tool_use" if tools and "tool_use" in self._templates else "default"
        if named not in self._templates:
            raise RequestError(
                "this model has no chat template; send a plain prompt to the completions API instead",
                param="messages",
                code="no_chat_template",
            )
        return self._templates[named].render(
            **{**self.special_tokens, **variables},
            messages=plain_messages(messages),
            tools=tools or None,
            documents=variables.get("documents"),
            add_generation_prompt=add_generation_prompt,
        )

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    @cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        table = dict.fromkeys(range(self.vocab_size), b"")
        spell = _byte_level_bytes if self._is_byte_level else _sentencepiece_bytes
        for token, index in self.backend.get_vocab().items():
            table[index] = token.encode() if index in self._added_ids else spell(token)
        return table

    @cached_property
    def _bytes_of_text(self) -> dict[int, bytes]:
        return {**self._bytes_of, **dict.fromkeys(self.special_ids, b"")}


def _decoding(backend: tokenizers.Tokenizer, file: str) -> tuple[bool, bool]:
    """Whether tokens are spelled in the byte-level alphabet, and whether decoding drops a leading space."""
    state: dict[str, Any] = json.loads(backend.decoder.__getstate__()) if backend.decoder else {}
    steps = state.get("decoders", [state])
    kinds = [step.get("type") for step in steps]
    if "ByteLevel" in kinds:
        return True, False
    if not {"Metaspace", "ByteFallback"} & set(kinds):
        raise ModelError(f"{file}: decoder: {kinds} is not supported; byte-level and SentencePiece BPE are")
    strips = any(
        (step.get("type") == "Strip" and step.get("content") == " " and step.get("start"))
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )
    return False, bool(strips)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the rest follows from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:  # a token outside the alphabet stands for its own text, as in `tokenizers`
        return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace("▁", " ").encode()


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: must hold a JSON object")
    return content


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The named special tokens, given as text or as an object with the text under `content`."""
    tokens = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _folder_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name; a chat_template.jinja goes before the one in tokenizer_config.json."""
    inline = config.get("chat_template")
    templates = {"default": inline} if isinstance(inline, str) else {}
    if isinstance(inline, list):
        entries = [entry for entry in inline if isinstance(entry, dict)]
        templates = {str(entry.get("name")): str(entry.get("template")) for entry in entries}
    if (folder / "chat_template.jinja").is_file():
        try:
            templates["default"] = (folder / "chat_template.jinja").read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{folder / 'chat_template.jinja'}: cannot be read ({error})") from error
    return templates
