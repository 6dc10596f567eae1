"""What a running server makes of each route and field of OpenAI's API: found out by sending it."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
from openai.types import (
    Batch,
    BatchCreateParams,
    Completion,
    CreateEmbeddingResponse,
    EmbeddingCreateParams,
    FileCreateParams,
    FileObject,
    Model,
    batch_list_params,
    completion_create_params,
    file_list_params,
)
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat import completion_create_params as chat_params
from openai.types.fine_tuning import FineTuningJob, job_create_params, job_list_params
from openai.types.responses import Response, input_item_list_params, response_create_params

from conformance_samples import WRONG, fields_of, samples

RESOURCES = (
    *("chat.completions", "chat.completions.messages", "completions", "embeddings", "models", "files"),
    *("batches", "fine_tuning.jobs", "fine_tuning.jobs.checkpoints", "fine_tuning.checkpoints.permissions"),
    *("fine_tuning.alpha.graders", "responses", "responses.input_items", "responses.input_tokens"),
)
# Helpers of the client that send what other methods send, and a WebSocket.
_NO_ROUTES = ("parse", "stream", "connect", "wait_for_processing", "retrieve_content")
_IDS = re.compile(r"\b(file|batch|resp|ftjob|msg)[-_][0-9a-f]{8,}")


@dataclass(frozen=True)
class Operation:
    """A route with the fields that a request to it may have.

    Attributes:
        base: a request that is taken; `fields` are sent one at a time beside it.
        needs: what else must be sent for a field to make sense.
        response: the client's model of the answer.
        where: "json", "form" or "query".
    """

    method: str
    path: str
    fields: dict[str, Any]
    base: dict[str, Any]
    response: Any = None
    needs: dict[str, dict[str, Any]] = field(default_factory=dict)
    where: str = "json"


@dataclass(frozen=True)
class Verdict:
    """`kind` is supported, in part, ignored or refused; `note` tells which values, or why."""

    kind: str
    note: str = ""


def routes(server: httpx.Client) -> Iterator[tuple[str, str, bool]]:
    """(client method, route, whether the server has it), for every method that sends something."""
    sent: list[httpx.Request] = []

    def record(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        raise httpx.ConnectError("only recorded", request=request)

    transport = httpx.Client(transport=httpx.MockTransport(record))
    client = openai.OpenAI(base_url="http://x/v1", api_key="none", max_retries=0, http_client=transport)
    for resource in RESOURCES:
        target: Any = client
        for part in resource.split("."):
            target = getattr(target, part)
        for name, _ in inspect.getmembers(type(target), inspect.isfunction):
            if name.startswith("_") or name in _NO_ROUTES or name.endswith("_poll"):
                continue
            _call(getattr(target, name))
            request = sent.pop()
            path = request.url.path.replace("/v1/x", "/v1/{id}").replace("/x", "/{id}")
            answer = server.request(request.method, request.url.path, json={})
            code = (answer.json().get("error") or {}).get("code") if answer.status_code >= 400 else None
            has = code not in ("route_not_found", "method_not_allowed")
            yield f"{resource}.{name}", f"{request.method} {path}", has


def _call(method: Any) -> None:
    """Call a method with something for whatever it requires."""
    needed: dict[str, Any] = {}
    for name, parameter in inspect.signature(method).parameters.items():
        if parameter.default is inspect.Parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            needed[name] = b"x" if name == "file" else [] if "Iterable" in str(parameter.annotation) else "x"
    with contextlib.suppress(openai.APIConnectionError):
        method(**needed)


def operations(server: httpx.Client, model: str) -> list[Operation]:
    """The operations whose fields are compared. Uploads the files that some of them name."""
    batch_line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}
    batch_file = _upload(server, "batch", [batch_line])
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    rows = _upload(server, "fine-tune", [{"messages": turns}] * 10)
    few = {"max_tokens": 2}
    kept = server.post("/v1/responses", json={"model": model, "input": "hi", "max_output_tokens": 2}).json()
    expiry = {"anchor": "created_at", "seconds": 3600}
    items = f"/v1/responses/{kept['id']}/input_items"
    job = {"model": model, "training_file": rows}
    batch = {"input_file_id": batch_file, "endpoint": "/v1/completions", "completion_window": "24h"}
    for path, body in (("/v1/fine_tuning/jobs", job), ("/v1/batches", batch)):
        server.post(path, json=body)
    stream = {"stream_options": {"stream": True}}
    function = {"name": "a"}
    return [
        Operation(
            *("POST", "/v1/chat/completions"),
            fields_of(chat_params.CompletionCreateParamsNonStreaming),
            {"model": model, "messages": turns[:1], **few},
            ChatCompletion,
            {
                **stream,
                "top_logprobs": {"logprobs": True},
                "tool_choice": {"tools": [{"type": "function", "function": function}]},
            },
        ),
        Operation(
            *("POST", "/v1/completions"),
            fields_of(completion_create_params.CompletionCreateParamsNonStreaming),
            {"model": model, "prompt": "hi", **few},
            Completion,
            {**stream, "best_of": {"n": 2}},
        ),
        Operation(
            *("POST", "/v1/embeddings"),
            fields_of(EmbeddingCreateParams),
            {"model": model, "input": "hi"},
            CreateEmbeddingResponse,
        ),
        Operation(
            *("POST", "/v1/responses"),
            fields_of(response_create_params.ResponseCreateParamsNonStreaming),
            {"model": model, "input": "hi", "max_output_tokens": 2},
            Response,
            {
                **stream,
                "previous_response_id": {"previous_response_id": kept["id"]},
                "tool_choice": {"tools": [{"type": "function", **function}]},
            },
        ),
        Operation(
            *("GET", items),
            fields_of(input_item_list_params.InputItemListParams),
            {},
            needs=_after(server, items),
            where="query",
        ),
        Operation(
            *("POST", "/v1/files"),
            fields_of(FileCreateParams),
            {"purpose": "user_data"},
            FileObject,
            {"expires_after": {"expires_after": expiry}},
            where="form",
        ),
        Operation(
            *("GET", "/v1/files"),
            fields_of(file_list_params.FileListParams),
            {},
            needs=_after(server, "/v1/files"),
            where="query",
        ),
        Operation(
            *("POST", "/v1/batches"),
            fields_of(BatchCreateParams),
            batch,
            Batch,
            {"output_expires_after": {"output_expires_after": expiry}},
        ),
        Operation(
            *("GET", "/v1/batches"),
            fields_of(batch_list_params.BatchListParams),
            {},
            needs=_after(server, "/v1/batches"),
            where="query",
        ),
        Operation(
            *("POST", "/v1/fine_tuning/jobs"),
            fields_of(job_create_params.JobCreateParams),
            job,
            FineTuningJob,
            {"validation_file": {"validation_file": rows}},
        ),
        Operation(
            *("GET", "/v1/fine_tuning/jobs"),
            fields_of(job_list_params.JobListParams),
            {},
            needs=_after(server, "/v1/fine_tuning/jobs"),
            where="query",
        ),
        Operation("GET", f"/v1/models/{model}", {}, {}, Model, where="query"),
    ]


def _after(server: httpx.Client, path: str) -> dict[str, dict[str, Any]]:
    """An id that a listing can go on after."""
    return {"after": {"after": server.get(path).json()["data"][0]["id"]}}


def _upload(server: httpx.Client, purpose: str, lines: list[Any]) -> str:
    content = "\n".join(map(json.dumps, lines)).encode()
    return _post_file(server, {"purpose": purpose}, content).json()["id"]


def _post_file(server: httpx.Client, form: dict[str, Any], content: bytes = b"{}") -> httpx.Response:
    flat: dict[str, str] = {}
    for name, value in form.items():
        if isinstance(value, dict):
            flat |= {f"{name}[{key}]": str(item) for key, item in value.items()}
        else:
            flat[name] = str(value)
    return server.post("/v1/files", data=flat, files={"file": ("a.jsonl", content)})


def send(server: httpx.Client, operation: Operation, extra: dict[str, Any]) -> httpx.Response:
    """One request. A job that it creates is cancelled at once."""
    body = {**operation.base, **extra}
    if operation.where == "form":
        return _post_file(server, body)
    if operation.where == "query":
        return server.request(operation.method, operation.path, params=_query(body))
    answer = server.request(operation.method, operation.path, json=body)
    if operation.path == "/v1/fine_tuning/jobs" and answer.status_code == 200:
        server.post(f"{operation.path}/{answer.json()['id']}/cancel")
    return answer


def _query(body: dict[str, Any]) -> dict[str, Any]:
    """Objects as the client writes them: `metadata[key]=value`; values that are neither, as JSON."""
    flat: dict[str, Any] = {}
    for name, value in body.items():
        if value in WRONG:
            flat[name] = json.dumps(value)
        elif isinstance(value, dict):
            flat |= {f"{name}[{key}]": item for key, item in value.items()}
        else:
            flat[name] = value
    return flat


def judge(server: httpx.Client, operation: Operation, name: str) -> Verdict:
    """What becomes of one field. A value of `base` or `needs` stands in where made-up ones mean nothing."""
    needs = operation.needs.get(name, {})
    known = {**operation.base, **needs}
    values = [known[name]] if name in known else samples(operation.fields[name])
    if operation.where == "form" and name == "file":
        values = [None]
    taken, refused = [], []
    for value in values:
        extra = needs if value is None or name in known else {**needs, name: value}
        answer = send(server, operation, extra)
        if answer.status_code < 400:
            taken.append(value)
        else:
            refused.append((value, answer.json()["error"]["message"]))
    if not taken:
        return Verdict("refused", _reason(refused[0][1]) if refused else "no value to send")
    if refused:
        return Verdict("in part", f"{_listed(taken)}; not {_listed(v for v, _ in refused)}")
    looked_at = name == "file" or any(
        send(server, operation, {**needs, name: wrong}).status_code >= 400 for wrong in WRONG
    )
    if operation.where == "query":  # any text may be right there; does it change the answer?
        plain, asked = (send(server, operation, extra).text for extra in ({}, {**needs, name: taken[0]}))
        looked_at = looked_at or plain != asked
    return Verdict("supported" if looked_at else "ignored")


def _reason(message: str) -> str:
    return _IDS.sub(r"\1…", message).replace("|", "\\|")


def _listed(values: typing.Iterable[Any]) -> str:
    written = (json.dumps(value) for value in values)
    short = (text if len(text) <= 60 else f"{text[:57]}…" for text in written)
    return ", ".join(f"`{text}`" for text in short).replace("|", "\\|")


def answer_fields(server: httpx.Client, operation: Operation) -> Iterator[tuple[str, bool]]:
    """(dotted path, whether it is there) for each field of the client's model of an answer."""
    extra: dict[str, Any] = {"logprobs": True, "top_logprobs": 1} if "chat" in operation.path else {}
    extra |= {"logprobs": 1} if operation.path == "/v1/completions" else {}
    value = send(server, operation, extra).json()
    yield from _present(operation.response, value, "")


def chunk_fields(server: httpx.Client, operation: Operation) -> Iterator[tuple[str, bool]]:
    """The same for the events of a streamed chat completion, all of them together."""
    extra = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 1}
    lines = send(server, operation, extra).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    seen: dict[str, bool] = {}
    for chunk in chunks:
        for path, there in _present(ChatCompletionChunk, chunk, ""):
            seen[path] = seen.get(path, False) or there
    yield from sorted(seen.items())


def _present(model: Any, value: Any, prefix: str) -> Iterator[tuple[str, bool]]:
    for name, info in model.model_fields.items():
        there = name in value
        path = f"{prefix}{name}"
        yield path, there
        inner = value.get(name)
        if isinstance(inner, list) and inner and isinstance(inner[0], dict):
            inner, path = inner[0], f"{path}[]"
        nested = _model_in(info.annotation, inner) if isinstance(inner, dict) else None
        if nested is not None:
            yield from _present(nested, inner, f"{path}.")


def _model_in(hint: Any, value: dict[str, Any]) -> Any:
    """The model in a type that fits an object best: the one with most of its keys."""
    found = list(_models(hint))
    return max(found, key=lambda model: len(model.model_fields.keys() & value.keys()), default=None)


def _models(hint: Any) -> Iterator[Any]:
    if isinstance(hint, type) and not isinstance(hint, types.GenericAlias) and hasattr(hint, "model_fields"):
        yield hint
    for argument in typing.get_args(hint):
        yield from _models(argument)
