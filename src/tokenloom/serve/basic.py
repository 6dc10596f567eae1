"""Models, embeddings, tokens, health: the small routes."""

from __future__ import annotations

import asyncio
import base64
import struct

from fastapi import APIRouter, Request, Response

from tokenloom.engine.adapters import LoadedAdapter
from tokenloom.engine.async_engine import AsyncEngine
from tokenloom.errors import RequestError
from tokenloom.serve.chat import render
from tokenloom.serve.chat_protocol import TokenizeRequest
from tokenloom.serve.completions import token_prompts
from tokenloom.serve.errors import DRAIN_RETRY_AFTER_S, ERROR_RESPONSES, ApiError, ModelNotFoundError
from tokenloom.serve.generation import check_total_tokens, encode, prompt_is, until_disconnect
from tokenloom.serve.json_body import JSONRoute, write_json
from tokenloom.serve.key_limits import current_meter
from tokenloom.serve.models import Models
from tokenloom.serve.protocol import (
    DetokenizeRequest,
    DetokenizeResponse,
    Embedding,
    EmbeddingRequest,
    EmbeddingResponse,
    EmbeddingUsage,
    ModelCard,
    ModelDeleted,
    ModelList,
    Status,
    TokenizeResponse,
    Version,
)
from tokenloom.serve.request_record import engine_id
from tokenloom.serve.store_route import Who
from tokenloom.version import __version__


def models_router(models: Models) -> APIRouter:
    """GET /v1/models, GET and DELETE /v1/models/{id}."""
    router = APIRouter(prefix="/v1", tags=["models"], responses=ERROR_RESPONSES)

    @router.get("/models")
    async def list_models() -> ModelList:
        """The models that requests can name."""
        return ModelList(data=await models.cards())

    @router.get("/models/{model_id:path}")
    async def get_model(model_id: str) -> ModelCard:
        """One of them."""
        card = next((card for card in await models.cards() if card.id == model_id), None)
        if card is None:
            raise ModelNotFoundError(model_id)
        return card

    @router.delete("/models/{model_id:path}")
    async def delete_model(model_id: str, who: Who) -> ModelDeleted:
        """Delete a fine-tuned model, or a checkpoint of a job that is over."""
        await models.delete(model_id, who)
        return ModelDeleted(id=model_id)

    return router


def embeddings_router(engine: AsyncEngine, models: Models) -> APIRouter:
    """POST /v1/embeddings."""
    router = APIRouter(prefix="/v1", tags=["embeddings"], responses=ERROR_RESPONSES, route_class=JSONRoute)

    @router.post("/embeddings", response_model=EmbeddingResponse)
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """The mean of each text's last hidden states, `[hidden_size]`, not normalised."""
        adapter = await models.resolve(body.model)
        prompts = await token_prompts(engine, body.input, "input")
        with prompt_is("input"):
            check_total_tokens(engine, prompts)
            meter = current_meter()
            if meter is not None:
                meter.admit_prompts(sum(map(len, prompts)))
            vectors = await until_disconnect(request.receive, _embed_all(engine, prompts, adapter))
        total = sum(len(prompt) for prompt in prompts)
        encode_vector = _base64 if body.encoding_format == "base64" else list[float]
        return await write_json(
            lambda: EmbeddingResponse(
                object="list",
                data=[
                    Embedding(object="embedding", index=i, embedding=encode_vector(vector))
                    for i, vector in enumerate(vectors)
                ],
                model=body.model,
                usage=EmbeddingUsage(prompt_tokens=total, total_tokens=total),
            )
        )

    return router


async def _embed_all(
    engine: AsyncEngine, prompts: list[list[int]], adapter: LoadedAdapter | None
) -> list[list[float]]:
    """All vectors, or the first failure: then the rest is aborted, as it is when this is cancelled."""
    tasks = [
        asyncio.ensure_future(engine.embed(prompt, request_id=engine_id(), adapter=adapter))
        for prompt in prompts
    ]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _base64(vector: list[float]) -> str:
    """Little-endian float32, as OpenAI's client decodes it."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def tokens_router(engine: AsyncEngine, models: Models) -> APIRouter:
    """POST /tokenize and /detokenize."""
    router = APIRouter(tags=["tokens"], responses=ERROR_RESPONSES, route_class=JSONRoute)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> TokenizeResponse:
        """Token ids of a text, or of a conversation under the model's chat template."""
        await models.check(body.model)
        if body.messages is not None:
            tokens = await render(engine, body.messages, None, body.add_generation_prompt)
        else:
            with prompt_is("prompt"):
                [tokens] = await encode(engine, [body.prompt or ""], special=body.add_special_tokens)
        return TokenizeResponse(tokens=tokens, count=len(tokens), max_model_len=engine.max_model_len)

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> DetokenizeResponse:
        """Text of token ids, special tokens included."""
        await models.check(body.model)
        try:
            text = await asyncio.to_thread(engine.tokenizer.decode, body.tokens, skip_special_tokens=False)
        except RequestError as error:
            raise RequestError(f"tokens: {error}", param="tokens") from error
        return DetokenizeResponse(prompt=text)

    return router


def health_router(engine: AsyncEngine) -> APIRouter:
    """GET /health, /ready and /version."""
    router = APIRouter(tags=["health"], responses=ERROR_RESPONSES)

    @router.get("/health")
    async def health() -> Status:
        """200 while the engine's loop runs, also while it drains."""
        if not engine.alive:
            raise ApiError(503, "the engine's loop does not run", code="engine_stopped")
        return Status(status="ok")

    @router.get("/ready")
    async def ready() -> Status:
        """200 while new requests are taken; 503 before the start and while draining."""
        if not engine.ready:
            wait = {"Retry-After": str(DRAIN_RETRY_AFTER_S)}
            raise ApiError(503, "no new requests are taken", code="not_ready", headers=wait)
        return Status(status="ready")

    @router.get("/version")
    async def version() -> Version:
        """The version of this server."""
        return Version(version=__version__)

    return router
