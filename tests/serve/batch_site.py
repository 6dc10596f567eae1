"""Batches of a server, driven by OpenAI's client."""

from __future__ import annotations

import io
import json
from typing import Any

import openai

from running import Running, wait_for

CHAT = "/v1/chat/completions"
OVER = ("completed", "failed", "expired", "cancelled")


class Site:
    """A server with a client and the batches of a home folder."""

    def __init__(self, server: Running, key: str = "none") -> None:
        self.server = server
        self.engine = server.engine
        self.client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)

    def upload(self, lines: list[Any], purpose: str = "batch") -> str:
        content = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        file = ("input.jsonl", io.BytesIO(content.encode()))
        return self.client.files.create(file=file, purpose=purpose).id  # type: ignore[arg-type]

    def start(self, lines: list[Any], endpoint: str = CHAT, **fields: Any) -> Any:
        return self.client.batches.create(
            input_file_id=self.upload(lines), endpoint=endpoint, completion_window="24h", **fields
        )

    def until_over(self, batch: Any) -> Any:
        wait_for(lambda: self.client.batches.retrieve(batch.id).status in OVER)
        return self.client.batches.retrieve(batch.id)

    def run(self, lines: list[Any], endpoint: str = CHAT, **fields: Any) -> Any:
        return self.until_over(self.start(lines, endpoint, **fields))

    def read(self, file_id: str) -> list[Any]:
        return [json.loads(line) for line in self.client.files.content(file_id).text.splitlines()]


def chat(custom_id: str, tokens: int = 3, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": custom_id}]
    body = {"model": "fake", "messages": messages, "max_completion_tokens": tokens, **fields}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}


def request(url: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": url, "body": {"model": "fake", **body}}
