"""tokenloom: one engine in which the token is the unit of work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenloom.version import __version__

if TYPE_CHECKING:
    from tokenloom.engine.sampling_params import SamplingParams
    from tokenloom.llm import LLM
    from tokenloom.structured import Structured

__all__ = ["LLM", "SamplingParams", "Structured", "__version__"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `tokenloom --version` should not.
    if name == "LLM":
        from tokenloom.llm import LLM

        return LLM
    if name == "SamplingParams":
        from tokenloom.engine.sampling_params import SamplingParams

        return SamplingParams
    if name == "Structured":
        from tokenloom.structured import Structured

        return Structured
    raise AttributeError(f"module 'tokenloom' has no attribute {name!r}")
