"""The methods that a server has on by its settings."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import zlib
from pathlib import Path

from tokenloom.cache.policy import KVMethod
from tokenloom.config import ConfigError, Settings
from tokenloom.engine.draft import DraftMethod
from tokenloom.engine.engine import Engine
from tokenloom.errors import RequestError
from tokenloom.methods.drafting import draft_method
from tokenloom.methods.kv import combine


def with_methods(settings: Settings) -> Settings:
    """Settings whose methods have been read and checked; `int8` among them makes the KV pool one of 8 bits.

    Raises:
        ConfigError: a module cannot be imported; a spec is wrong, or does not fit the other settings.
    """
    for name in settings.methods.modules:
        _import(name)
    try:
        draft = draft_method(settings.methods.draft)
        method = combine(settings.methods.kv)
        if method is None:
            return settings
        if method.quantizes:
            cache = settings.cache.model_copy(update={"dtype": "int8"})
            settings = settings.model_copy(update={"cache": cache})
        scheduler = settings.scheduler
        method.check(scheduler.max_batch_tokens, scheduler.max_running, settings.cache.dtype == "int8")
        if draft is not None and not method.keeps_all:
            raise RequestError("draft: does not go together with methods.kv yet; drop one of them")
    except RequestError as error:
        raise ConfigError(f"setting methods.{error}") from error
    return settings


def with_drafter(engine: Engine) -> Engine:
    """The engine, once its settings' own drafting method has been checked and has what it needs in memory.

    Raises:
        ConfigError: this engine cannot run it.
    """
    method = draft_method(engine.settings.methods.draft)
    if method is not None:
        try:
            method.check(engine)
        except RequestError as error:
            raise ConfigError(f"setting methods.{error}") from error
    return engine


def methods_of(
    settings: Settings, kv: str | None, draft: str | None
) -> tuple[KVMethod | None, DraftMethod | None]:
    """What a request is served with: the methods that it names, else the settings' own.

    A request that names a KV method and no drafting is not drafted for where the two do not go together.

    Raises:
        RequestError: (param "kv" or "draft") a spec is wrong.
    """
    method = combine(settings.methods.kv if kv is None else kv)
    guesses = draft_method(settings.methods.draft if draft is None else draft)
    if draft is None and method is not None and not method.keeps_all:
        guesses = None
    return method, guesses


def _import(name: str) -> None:
    """Import a module, or run a file as one, unless that was done before."""
    try:
        if not name.endswith(".py"):
            importlib.import_module(name)
            return
        path = Path(name).resolve()
        module = f"tokenloom_methods_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
        spec = importlib.util.spec_from_file_location(module, path)
        if module in sys.modules or spec is None or spec.loader is None:
            return
        sys.modules[module] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[module])
        except BaseException:
            del sys.modules[module]
            raise
    except Exception as error:
        raise ConfigError(f"setting methods.modules: {name}: {type(error).__name__}: {error}") from error
