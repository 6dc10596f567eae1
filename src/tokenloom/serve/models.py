"""The names that requests can give as `model`: the base model, loaded adapters, fine-tuned models."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from tokenloom.engine.adapters import LoadedAdapter
from tokenloom.engine.async_engine import AsyncEngine
from tokenloom.errors import RequestError
from tokenloom.finetune.errors import NotFoundError
from tokenloom.finetune.principal import Principal
from tokenloom.finetune.records import TunedModel
from tokenloom.finetune.service import JobService
from tokenloom.models.adapters import AdapterError, load_adapter
from tokenloom.serve.adapters import TUNED, AdapterLoader, log_loaded
from tokenloom.serve.errors import ApiError, ModelNotFoundError
from tokenloom.serve.protocol import ModelCard

logger = logging.getLogger("tokenloom.serve")


class Models:
    """Finds what a request names, and loads fine-tuned models when they are first asked for.

    Loading goes on in a thread, once for all requests that wait for it; to make room, the fine-tuned model
    that has not been used for the longest time is dropped. Methods are called on one event loop.

    Args:
        service: knows the fine-tuned models; None if this server has none.
        count: told the name of each request's model, once it is known to be served.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        loader: AdapterLoader,
        service: JobService | None = None,
        count: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.engine, self.loader, self.service = engine, loader, service
        self._count = count
        self._registry = engine.engine.adapters
        self._loading: dict[str, asyncio.Task[LoadedAdapter]] = {}
        self._created = int(time.time())

    async def resolve(self, name: str) -> LoadedAdapter | None:
        """The adapter that a request names; None for the base model.

        Raises:
            ModelNotFoundError: nothing of that name is served here (404).
            ApiError: a fine-tuned model cannot be loaded.
        """
        adapter = None
        if name != self.engine.model_name:
            adapter = self._registry.get(name) or await self._load(name)
        self._count(name)
        return adapter

    async def check(self, name: str | None) -> None:
        """Raises ModelNotFoundError for a name that is not served; None asks for no model in particular."""
        if name not in (None, self.engine.model_name) and self.loader.find(name or "") is None:
            await self._tuned(name or "")

    async def _load(self, name: str) -> LoadedAdapter:
        task = self._loading.get(name)
        if task is None:
            tuned = await self._tuned(name)
            # Another request may have begun, or done it, meanwhile.
            loaded = self._registry.get(name)
            if loaded is not None:
                return loaded
            task = self._loading.get(name)
        if task is None:
            task = asyncio.create_task(asyncio.to_thread(self._load_tuned, tuned))
            self._loading[name] = task
            task.add_done_callback(lambda done: self._loaded(name, done))
        return await asyncio.shield(task)  # a client that goes away takes nothing from the others

    def _loaded(self, name: str, task: asyncio.Task[LoadedAdapter]) -> None:
        del self._loading[name]
        if not task.cancelled():
            task.exception()  # whoever still waits gets it, too

    def _load_tuned(self, tuned: TunedModel) -> LoadedAdapter:
        engine = self.engine.engine
        try:
            adapter = load_adapter(tuned.adapter_path, engine.config, engine.dtype, engine.device)
        except AdapterError as error:
            if not tuned.adapter_path.is_dir():
                raise ModelNotFoundError(tuned.name) from None  # deleted meanwhile
            logger.error("fine-tuned model %s cannot be loaded: %s", tuned.name, error)
            raise ApiError(
                500,
                f"model: {tuned.name} cannot be loaded; the server's log tells why",
                param="model",
                code="model_broken",
            ) from error
        try:
            loaded = self._registry.put(tuned.name, adapter, tuned.adapter_path, pinned=False)
        except RequestError as error:
            raise ApiError(503, f"model: {error}", param="model", code=error.code) from error
        log_loaded(loaded, f"job {tuned.job_id}")
        return loaded

    async def _tuned(self, name: str) -> TunedModel:
        found = next((tuned for tuned in await self._all_tuned() if tuned.name == name), None)
        if found is None:
            raise ModelNotFoundError(name)
        return found

    async def _all_tuned(self) -> list[TunedModel]:
        if self.service is None:
            return []
        base = self.engine.model_name
        return [tuned for tuned in await asyncio.to_thread(self.service.models) if tuned.base == base]

    async def cards(self) -> list[ModelCard]:
        """All names that are served: the base model, adapters, fine-tuned models and their checkpoints."""
        base = self.engine.model_name
        tuned = await self._all_tuned()
        adapters = [loaded for loaded in self._registry.list() if not loaded.name.startswith(TUNED)]
        named: list[tuple[str, int, str, str | None]] = [(base, self._created, base, None)]
        named += [(a.name, a.loaded_at, self.loader.shown(a.path), base) for a in adapters]
        named += [(t.name, t.created_at, t.name, base) for t in tuned]
        return [
            ModelCard(
                id=name,
                created=created,
                root=root,
                parent=parent,
                max_model_len=self.engine.max_model_len,
            )
            for name, created, root, parent in named
        ]

    async def delete(self, name: str, who: Principal) -> None:
        """Delete a fine-tuned model or a checkpoint for good; requests that run end with it.

        Raises:
            ModelNotFoundError: there is none of that name, or it is of a job that `who` may not see.
            RequestError: it is the base model, an adapter of the operator, or its job still needs it.
        """
        if name == self.engine.model_name:
            raise RequestError("model: the base model cannot be deleted", param="model")
        if self.service is None or not name.startswith(TUNED):
            if self.loader.find(name) is None:
                raise ModelNotFoundError(name)
            raise RequestError(
                f"model: {name!r} is no fine-tuned model; POST /v1/unload_lora_adapter unloads it",
                param="model",
            )
        try:
            await asyncio.to_thread(self.service.delete_model, name, who)
        except NotFoundError:
            raise ModelNotFoundError(name) from None
        # It cannot be looked up any more; what still loads must not stay.
        if name in self._loading:
            await asyncio.wait([self._loading[name]])
        self._registry.remove(name)
