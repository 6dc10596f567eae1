"""Adapters of the operator: loaded from below one folder and nowhere else, by request or by the folder."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Response
from fastapi.responses import PlainTextResponse
from pydantic import Field

from tokenloom.config import Settings, home
from tokenloom.engine.adapters import LoadedAdapter
from tokenloom.engine.async_engine import AsyncEngine
from tokenloom.errors import RequestError
from tokenloom.models.adapters import AdapterError, load_adapter
from tokenloom.models.adapters.peft_config import CONFIG_FILE
from tokenloom.models.adapters.peft_format import TENSORS_FILE
from tokenloom.serve.errors import ERROR_RESPONSES, ApiError
from tokenloom.serve.json_body import JSONRoute
from tokenloom.serve.protocol import Flag, RequestBody
from tokenloom.serve.security import AdminCheck

logger = logging.getLogger("tokenloom.serve")

TUNED = "ft:"
"""Names of fine-tuned models begin so, and no others."""
_NAME = re.compile(r"[A-Za-z0-9._:/-]{1,128}")


class AdapterLoader:
    """Loads adapters into the engine; from any thread, one at a time.

    Args:
        settings: `adapters.folder` is the only place that adapters are read from.
    """

    def __init__(self, engine: AsyncEngine, settings: Settings) -> None:
        folder = settings.adapters.folder
        self.root = (Path(folder) if folder else home() / "adapters").absolute().resolve()
        self._engine = engine
        self._registry = engine.engine.adapters
        self._lock = threading.Lock()

    def load(self, name: str, path: str, *, replace: bool) -> LoadedAdapter:
        """Serve the adapter of a folder under a name. With `replace`, instead of what has that name;
        requests that run keep the version with which they began.

        Args:
            path: below the adapters' folder, relative to it or absolute.

        Raises:
            RequestError: the name or the path is not allowed, the name is taken, or the adapter is broken or
                does not fit the model. No path of this machine is told.
        """
        self._check_name(name)
        folder = self._inside(path)
        with self._lock:
            if not replace and self.find(name) is not None:
                raise RequestError(
                    f"lora_name: {name!r} is loaded already; set load_inplace to replace it",
                    param="lora_name",
                    code="adapter_exists",
                )
            engine = self._engine.engine
            try:
                adapter = load_adapter(folder, engine.config, engine.dtype, engine.device)
            except AdapterError as error:
                raise RequestError(
                    f"lora_path: {self.without_root(str(error))}", param="lora_path", code="invalid_adapter"
                ) from error
            loaded = self._registry.put(name, adapter, folder)
        log_loaded(loaded, self.shown(folder))
        return loaded

    def unload(self, name: str) -> LoadedAdapter | None:
        """Serve a name no longer; None if it was not loaded. Requests that run keep their adapter."""
        removed = self._registry.remove(name)
        if removed is not None:
            logger.info("adapter %r version %d unloaded", name, removed.version)
        return removed

    def find(self, name: str) -> LoadedAdapter | None:
        """What is loaded under a name; does not count as a use of it."""
        return next((loaded for loaded in self._registry.list() if loaded.name == name), None)

    def shown(self, folder: Path) -> str:
        """A folder as clients may see it: relative to the root."""
        return folder.relative_to(self.root).as_posix() if folder.is_relative_to(self.root) else folder.name

    def without_root(self, message: str) -> str:
        return message.replace(f"{self.root}/", "")

    def _check_name(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            problem = "must be 1 to 128 letters, digits and . _ : / -"
        elif name == self._engine.model_name:
            problem = f"{name!r} is the base model's name"
        elif name.startswith(TUNED):
            problem = f"names that begin with {TUNED} are those of fine-tuned models"
        else:
            return
        raise RequestError(f"lora_name: {problem}", param="lora_name", code="invalid_name")

    def _inside(self, path: str) -> Path:
        """The folder that a path means, with every link followed: itself and its files below the root."""
        try:
            folder = (self.root / path).resolve()
            places = (folder, *((folder / name).resolve() for name in (CONFIG_FILE, TENSORS_FILE)))
            inside = folder != self.root and all(place.is_relative_to(self.root) for place in places)
            exists = inside and folder.is_dir()
        except (OSError, RuntimeError, ValueError):  # too long, a loop of links, a zero byte
            inside = exists = False
        if not inside:
            raise RequestError(
                "lora_path: must be a folder below the adapters' folder of this server, links included",
                param="lora_path",
                code="path_not_allowed",
            )
        if not exists:
            raise RequestError(
                f"lora_path: there is no folder {self.shown(folder)!r} in the adapters' folder",
                param="lora_path",
                code="adapter_not_found",
            )
        return folder


def log_loaded(loaded: LoadedAdapter, source: str) -> None:
    logger.info(
        "adapter %r version %d loaded from %s, sha256 %s",
        loaded.name,
        loaded.version,
        source,
        loaded.sha256,
    )


class LoadRequest(RequestBody):
    """POST /v1/load_lora_adapter."""

    lora_name: str = Field(max_length=512)
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: Flag | None = None


class UnloadRequest(RequestBody):
    """POST /v1/unload_lora_adapter."""

    lora_name: str = Field(max_length=512)


def adapters_router(loader: AdapterLoader, settings: Settings) -> APIRouter:
    """vLLM's routes that load and unload adapters; for holders of an admin key where there is one."""
    router = APIRouter(
        prefix="/v1",
        tags=["adapters"],
        responses=ERROR_RESPONSES,
        route_class=JSONRoute,
        dependencies=[Depends(AdminCheck(settings))],
    )
    text: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}}

    @router.post("/load_lora_adapter", response_class=Response, responses=text)
    async def load(body: LoadRequest) -> Response:
        """Load an adapter (a PEFT folder) under a name that requests can give as `model`."""
        replace = bool(body.load_inplace)
        await asyncio.to_thread(loader.load, body.lora_name, body.lora_path, replace=replace)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/unload_lora_adapter", response_class=Response, responses=text)
    async def unload(body: UnloadRequest) -> Response:
        """Take an adapter's name away; requests that run end with it."""
        if loader.unload(body.lora_name) is None:
            raise ApiError(
                404,
                f"lora_name: no adapter {body.lora_name[:128]!r} is loaded",
                param="lora_name",
                code="adapter_not_found",
            )
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router
