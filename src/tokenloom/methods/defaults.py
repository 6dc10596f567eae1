"""The methods that a server has on by its settings."""

from __future__ import annotations

from tokenloom.config import ConfigError, Settings
from tokenloom.errors import RequestError
from tokenloom.methods.kv import combine


def with_methods(settings: Settings) -> Settings:
    """Settings whose methods have been read and checked; `int8` among them makes the KV pool one of 8 bits.

    Raises:
        ConfigError: a spec is wrong, or does not fit the other settings.
    """
    try:
        method = combine(settings.methods.kv)
        if method is None:
            return settings
        if method.quantizes:
            cache = settings.cache.model_copy(update={"dtype": "int8"})
            settings = settings.model_copy(update={"cache": cache})
        scheduler = settings.scheduler
        method.check(scheduler.max_batch_tokens, scheduler.max_running, settings.cache.dtype == "int8")
    except RequestError as error:
        raise ConfigError(f"setting methods.{error}") from error
    return settings
