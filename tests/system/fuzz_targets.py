"""What strangers can hand to tokenloom, and what it may say to it: it works, or it is refused by name.

A target has valid inputs, mutations of them, and a function that reads one. That returns whether the input
was taken, False if it was refused by one of our own errors, and raises on anything else.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from hypothesis import strategies as st

from adapter_models import CONFIGS, random_adapter
from fake_engine import FakeEngine
from mutations import bent_json, torn
from running import settings
from tiny_models import CHAT_TEMPLATE, build_tiny, tiny_tokenizer, write_gguf
from tokenloom.errors import ModelError, RequestError
from tokenloom.finetune.data import validate
from tokenloom.kernels import get_kernels
from tokenloom.models.adapters import AdapterError, Dims, load_adapter, save_adapter
from tokenloom.models.decoder import Decoder
from tokenloom.models.loader import open_model, read_config
from tokenloom.models.weight_loader import WeightLoader
from tokenloom.serve.app import create_app
from tokenloom.serve.errors import ApiError
from tokenloom.serve.multipart import read_form
from tokenloom.text import chat_template
from tokenloom.text.chat_template import ChatTemplate
from tokenloom.text.tokenizer import Tokenizer

CPU = torch.device("cpu")
MODEL_JSON = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
LEAKS = ("Traceback", 'File "', "site-packages", "/home/", "/tmp/", " object at 0x")
TEMPLATES = (
    CHAT_TEMPLATE,
    "{% set ns = namespace(x='a') %}{% for i in range(9) %}{% set ns.x = ns.x ~ ns.x * i %}{% endfor %}"
    "{{ ns.x }}",
    "{% macro f(n) %}{% if n > 0 %}{{ f(n - 1) }}{{ n | tojson }}{% endif %}{% endmacro %}{{ f(4) }}",
    "{{ messages | map(attribute='content') | join(', ') | replace('a', 'bb') | upper | center(80) }}"
    "{{ '%05d' | format(2 ** 8) }}{{ messages[0]['content'][::-1] }}"
    "{{ messages | selectattr('role') | list }}",
)
ROWS = (
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo", "weight": 1}]},
    {"prompt": "one", "completion": " two"},
    {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "f?", "name": "bo"},
            {"role": "assistant", "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": "7"},
            {"role": "assistant", "content": "7"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    },
)  # fmt: skip
CHAT: dict[str, Any] = {
    "model": "fake",
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": "a"},
    ],
    **{"max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "n": 2, "stop": ["a"], "seed": 1, "logprobs": True},
    **{"top_logprobs": 2, "logit_bias": {"5": 1}, "metadata": {"a": "b"}, "user": "u", "cache_salt": "s"},
    **{"stream": False, "tools": [], "priority": 1, "kv": "", "draft": "off", "stop_token_ids": [1]},
    **{"response_format": {"type": "text"}, "tool_choice": "auto", "frequency_penalty": 0.5, "min_tokens": 0},
}  # fmt: skip
REQUESTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/chat/completions", CHAT),
    (
        "/v1/completions",
        {"model": "fake", "prompt": ["a", "b"], "max_tokens": 2, "echo": True, "logprobs": 1},
    ),
    ("/v1/completions", {"model": "fake", "prompt": [[1, 2], [3]], "max_tokens": 2, "best_of": 1, "n": 1}),
    ("/v1/embeddings", {"model": "fake", "input": "a", "encoding_format": "base64"}),
    ("/tokenize", {"messages": CHAT["messages"], "add_generation_prompt": True}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
    ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "a", "load_inplace": True}),
)
FORM = (
    b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    b'--b\r\nContent-Disposition: form-data; name="expires_after[anchor]"\r\n\r\ncreated_at\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n'
    b"Content-Type: application/octet-stream\r\n\r\n" + b"{}\n" * 50 + b"\r\n--b--\r\n"
)


@dataclass
class Target:
    name: str
    inputs: st.SearchStrategy[Any]
    read: Callable[[Any], bool]


def all_targets(folder: Path) -> list[Target]:
    """Every target; valid files are written below `folder`, and mutated ones beside them."""
    model, whole = build_tiny(folder, dtype=torch.float32)
    gguf = write_gguf(folder / "tiny.gguf", whole, "Q4_1")
    loop = asyncio.new_event_loop()
    return [
        Target("gguf", torn(gguf.read_bytes()), _reads_model(folder / "mutated.gguf")),
        _model_files("safetensors", model, ("model.safetensors",)),
        _model_files("model_json", model, MODEL_JSON),
        _adapter(folder, model),
        Target("jsonl", _training_files(), _reads_rows(folder / "mutated.jsonl")),
        Target("template", st.sampled_from(TEMPLATES).flatmap(lambda t: torn(t.encode())), _template),
        Target("multipart", torn(FORM), lambda form: loop.run_until_complete(_form(form))),
        _requests(loop),
    ]


def _mutated(valid: bytes, is_json: bool) -> st.SearchStrategy[bytes]:
    return torn(valid) | bent_json(json.loads(valid)) if is_json else torn(valid)


def _reads_model(path: Path, file: str = "") -> Callable[[Any], bool]:
    def read(data: bytes) -> bool:
        (path / file).write_bytes(data)
        try:
            files = open_model(str(path))
            Decoder(files.config, WeightLoader(files.weights, torch.float32, CPU), get_kernels("torch"))
            files.tokenizer.encode("a b")
            files.tokenizer.decode([1, 2, 3])
        except (ModelError, RequestError) as error:
            assert len(str(error)) < 2100
            return False
        return True

    return read


def _model_files(name: str, valid: Path, files: tuple[str, ...]) -> Target:
    folder = valid.with_name(f"mutated-{name}")
    shutil.copytree(valid, folder)
    originals = {file: (valid / file).read_bytes() for file in files}

    def read(change: tuple[str, bytes]) -> bool:
        file, data = change
        try:
            return _reads_model(folder, file)(data)
        finally:
            (folder / file).write_bytes(originals[file])

    inputs = st.sampled_from(files).flatmap(
        lambda file: _mutated(originals[file], file.endswith("json")).map(lambda data: (file, data))
    )
    return Target(name, inputs, read)


def _adapter(folder: Path, model: Path) -> Target:
    shape = read_config(model)
    adapter = folder / "adapter"
    save_adapter(random_adapter(CONFIGS["lora"], Dims.of(shape)), adapter, "base")
    originals = {path.name: path.read_bytes() for path in adapter.iterdir()}

    def read(change: tuple[str, bytes]) -> bool:
        file, data = change
        (adapter / file).write_bytes(data)
        try:
            load_adapter(adapter, shape, torch.float32, CPU)
        except AdapterError as error:
            assert len(str(error)) < 2100
            return False
        finally:
            (adapter / file).write_bytes(originals[file])
        return True

    inputs = st.sampled_from(sorted(originals)).flatmap(
        lambda file: _mutated(originals[file], file.endswith("json")).map(lambda data: (file, data))
    )
    return Target("adapter", inputs, read)


def _training_files() -> st.SearchStrategy[bytes]:
    whole = b"\n".join(json.dumps(row).encode() for row in ROWS)
    lines = st.lists(st.sampled_from(ROWS).flatmap(bent_json), min_size=1, max_size=4)
    return torn(whole) | lines.map(b"\n".join)


def _reads_rows(path: Path) -> Callable[[bytes], bool]:
    tokenizer = Tokenizer(tiny_tokenizer(), {}, {"default": CHAT_TEMPLATE}, "fuzz")

    def read(data: bytes) -> bool:
        path.write_bytes(data)
        return validate(path, tokenizer, 64).ok

    return read


def _template(data: bytes) -> bool:
    kept, chat_template.MAX_SECONDS = chat_template.MAX_SECONDS, 0.5
    try:
        ChatTemplate(data.decode("utf-8", "replace")).render(messages=CHAT["messages"], tools=None)
    except RequestError:
        return False
    finally:
        chat_template.MAX_SECONDS = kept
    return True


async def _form(data: bytes) -> bool:
    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(data), 100):
            yield data[start : start + 100]

    written: list[bytes] = []
    try:
        form = await read_form("multipart/form-data; boundary=b", chunks(), "file", written.append)
    except ApiError as error:
        assert error.status_code == 400
        return False
    assert len(b"".join(written)) <= len(data)
    return form.filename is not None


def _requests(loop: asyncio.AbstractEventLoop) -> Target:
    engine = FakeEngine(settings(limits__max_tokens=16))  # it knows no end of its context
    engine.start()
    transport = httpx.ASGITransport(create_app(engine, engine.settings))
    client = httpx.AsyncClient(transport=transport, base_url="http://localhost")

    def read(request: tuple[str, bytes]) -> bool:
        path, body = request
        headers = {"content-type": "application/json"}
        answer = loop.run_until_complete(client.post(path, content=body, headers=headers))
        assert answer.status_code < 500, answer.text
        if answer.status_code < 400:
            return True
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert len(error["message"]) < 2100
        assert not [leak for leak in LEAKS if leak in error["message"]], error["message"]
        return False

    inputs = st.sampled_from(REQUESTS).flatmap(
        lambda request: _mutated(json.dumps(request[1]).encode(), True).map(lambda body: (request[0], body))
    )
    return Target("request", inputs, read)
