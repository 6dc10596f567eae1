"""GET /v1/methods: the published methods that requests can name in `kv` and `draft`."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel

import tokenloom.methods.drafting
import tokenloom.methods.kv  # noqa: F401  # both register their methods
from tokenloom.methods.registry import entries
from tokenloom.serve.errors import ERROR_RESPONSES


class MethodCard(BaseModel):
    """A method: the request field that names it (`hook`), and its knobs with their defaults."""

    hook: str
    name: str
    title: str
    arxiv: str
    claim: str
    knobs: dict[str, Any]


class MethodList(BaseModel):
    object: Literal["list"] = "list"
    data: list[MethodCard]


def methods_router() -> APIRouter:
    """GET /v1/methods."""
    router = APIRouter(prefix="/v1", tags=["models"], responses=ERROR_RESPONSES)

    @router.get("/methods")
    async def list_methods() -> MethodList:
        """The methods of this server by hook and name, those of the operator included."""
        cards = [
            MethodCard(
                hook=entry.hook,
                name=entry.name,
                title=entry.title,
                arxiv=entry.arxiv,
                claim=entry.claim,
                knobs=entry.knobs,
            )
            for entry in entries()
        ]
        return MethodList(data=cards)

    return router
