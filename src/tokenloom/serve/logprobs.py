"""Log-probabilities in three shapes: chat, legacy completions, and prompts as vLLM has them."""

from __future__ import annotations

from collections.abc import Sequence

from tokenloom.engine.outputs import TokenLogprob
from tokenloom.serve.chat_protocol import ChatLogprob, ChatLogprobs, TopLogprob
from tokenloom.serve.completions_protocol import CompletionLogprobs
from tokenloom.serve.protocol import PromptLogprob, PromptLogprobs
from tokenloom.text.tokenizer import Tokenizer

# JSON has no infinity; OpenAI reports this for what is all but impossible.
_LOWEST = -9999.0


def chat_logprobs(entries: Sequence[TokenLogprob], tokenizer: Tokenizer) -> ChatLogprobs:
    """One entry per token. A token's text may be U+FFFD where its bytes are part of a character."""
    content = []
    for entry in entries:
        token, data, logprob = _spell(entry.token_id, entry.logprob, tokenizer)
        top = []
        for alternative in entry.top:
            text, spelled, value = _spell(*alternative, tokenizer)
            top.append(TopLogprob(token=text, bytes=spelled, logprob=value))
        content.append(ChatLogprob(token=token, bytes=data, logprob=logprob, top_logprobs=top))
    return ChatLogprobs(content=content, refusal=None)


def _spell(token_id: int, logprob: float, tokenizer: Tokenizer) -> tuple[str, list[int], float]:
    data = tokenizer.token_bytes(token_id)
    return data.decode("utf-8", "replace"), list(data), max(logprob, _LOWEST)


def prompt_logprobs(entries: Sequence[TokenLogprob | None], tokenizer: Tokenizer) -> PromptLogprobs:
    """For each token of the prompt a map from id to log-probability, itself included."""

    def alternatives(entry: TokenLogprob) -> dict[str, PromptLogprob]:
        pairs = {**dict(entry.top), entry.token_id: entry.logprob}
        return {
            str(token): PromptLogprob(
                logprob=max(logprob, _LOWEST),
                decoded_token=tokenizer.token_bytes(token).decode("utf-8", "replace"),
            )
            for token, logprob in pairs.items()
        }

    return [None if entry is None else alternatives(entry) for entry in entries]


class CompletionLogprobsWriter:
    """Writes the legacy lists of one choice, whose tokens may come in several goes.

    A token that is no complete text is spelled `bytes:\\xe2\\x82`, as OpenAI's API did, so that alternatives
    stay apart. Offsets count characters of the choice's text: special tokens that were left out of it have
    no width, and a token that only begins a character has none either.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self.tokenizer = tokenizer
        self._decode = tokenizer.detokenizer(skip_special_tokens).push
        self._offset = 0

    def write_prompt(
        self, ids: Sequence[int], entries: Sequence[TokenLogprob | None], text: str
    ) -> CompletionLogprobs:
        """The tokens of an echoed prompt; `text` is how it is echoed."""
        decode = self.tokenizer.detokenizer(False).push
        offsets, offset = [], 0
        for token in ids:
            offsets.append(min(offset, len(text)))
            offset += len(decode([token]))
        self._offset = len(text)
        # A bos token that the tokenizer put before the text has no width in it.
        surplus = max(0, offset - len(text))
        return self._lists(ids, entries, [max(0, at - surplus) for at in offsets])

    def write(self, ids: Sequence[int], entries: Sequence[TokenLogprob]) -> CompletionLogprobs:
        """The next tokens of the answer."""
        offsets = []
        for token in ids:
            offsets.append(self._offset)
            self._offset += len(self._decode([token]))
        return self._lists(ids, entries, offsets)

    def _lists(
        self, ids: Sequence[int], entries: Sequence[TokenLogprob | None], offsets: list[int]
    ) -> CompletionLogprobs:
        return CompletionLogprobs(
            tokens=[self._name(token) for token in ids],
            token_logprobs=[None if e is None else max(e.logprob, _LOWEST) for e in entries],
            top_logprobs=[None if e is None else self._top(e) for e in entries],
            text_offset=offsets,
        )

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The chosen token is always among them; of two tokens with one spelling the likelier counts."""
        pairs = sorted({**dict(entry.top), entry.token_id: entry.logprob}.items(), key=lambda p: p[1])
        likeliest_last = {self._name(token): max(logprob, _LOWEST) for token, logprob in pairs}
        return dict(reversed(likeliest_last.items()))

    def _name(self, token: int) -> str:
        data = self.tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def joined(parts: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    """The lists of all parts, one after the other."""
    return CompletionLogprobs(
        tokens=[token for part in parts for token in part.tokens],
        token_logprobs=[logprob for part in parts for logprob in part.token_logprobs],
        top_logprobs=[top for part in parts for top in part.top_logprobs],
        text_offset=[offset for part in parts for offset in part.text_offset],
    )
