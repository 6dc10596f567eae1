"""Chat templates: the Jinja programs that models bring along to lay out a conversation.

They come with the model, not from clients, and still run in Jinja's immutable sandbox, in a process of their
own that has little memory and little time, because a model file is a stranger's file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenloom.errors import RequestError
from tokenloom.text.template_worker import WORKER, TemplateFailure

MAX_SECONDS = 2.0


class ChatTemplate:
    """One template. It is compiled when first used: a broken one does not keep a model from loading."""

    def __init__(self, source: str) -> None:
        self.source = source

    def render(self, **variables: Any) -> str:
        """The laid-out conversation. `variables` are such as JSON can hold.

        Raises RequestError (param "messages") if the template fails, or takes over `MAX_SECONDS`.
        """
        try:
            return WORKER.render(self.source, variables, MAX_SECONDS)
        except TemplateFailure as error:
            raise RequestError(str(error), param="messages", code="chat_template_error") from None


def plain_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages without the keys whose value is None, which templates print as "None" or fail on.

    Raises RequestError if `messages` is not a list of objects.
    """
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise RequestError("messages must be a list of objects", param="messages")
    return [{key: value for key, value in message.items() if value is not None} for message in messages]
