"""Where the first messages of a conversation end in its prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import build_tiny
from tokenloom.errors import RequestError
from tokenloom.models.loader import open_model
from tokenloom.text.chat_context import context_tokens

MESSAGES = [{"role": "user", "content": text} for text in ("a long text", "a question", "another")]


def render(messages: list[Any]) -> str:
    return "".join(f"<{m['role']}>{m['content']}\n" for m in messages)


@pytest.mark.parametrize("upto", [1, 2, 3])
def test_the_context_is_what_its_messages_alone_begin_with(tmp_path: Path, upto: int) -> None:
    tokenizer = open_model(str(build_tiny(tmp_path, "llama", torch.float32)[0])).tokenizer
    prompt = tokenizer.encode(render(MESSAGES) + "<assistant>", add_special_tokens=False)
    n = context_tokens(tokenizer, render, MESSAGES, upto, prompt)
    assert tokenizer.decode(prompt[:n]) == render(MESSAGES[:upto])
    for wrong in (0, 4):
        with pytest.raises(RequestError, match="in a conversation of 3 messages it is from 1 to 3"):
            context_tokens(tokenizer, render, MESSAGES, wrong, prompt)
