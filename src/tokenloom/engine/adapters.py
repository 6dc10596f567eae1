"""The adapters that requests can name, and their versions."""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tokenloom.errors import RequestError
from tokenloom.models.adapters import Adapter


@dataclass(eq=False)
class LoadedAdapter:
    """An adapter under a name. `version` is never used twice, so that cached keys and values of an earlier
    adapter of that name are never read; requests keep the version with which they began."""

    name: str
    version: int
    adapter: Adapter
    path: Path
    pinned: bool
    """Loaded because somebody asked for it, so never dropped to make room."""
    loaded_at: int = field(default_factory=lambda: int(time.time()))
    last_used: int = 0

    @property
    def sha256(self) -> str:
        """Hash of the parameters: which weights answer, for the log."""
        flat = self.adapter.flat.detach().cpu().contiguous()
        return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


class AdapterRegistry:
    """Names to adapters, from any thread. Replacing or removing one never touches running requests."""

    def __init__(self, max_loaded: int) -> None:
        self.max_loaded = max_loaded
        self._adapters: dict[str, LoadedAdapter] = {}
        self._clock = 0
        self._version = 0
        self._lock = threading.Lock()

    def put(self, name: str, adapter: Adapter, path: Path, *, pinned: bool = True) -> LoadedAdapter:
        """Serve an adapter under a name, instead of what had that name before.

        Raises:
            RequestError: the registry is full of pinned adapters.
        """
        with self._lock:
            if name not in self._adapters and len(self._adapters) >= self.max_loaded:
                idle = [a for a in self._adapters.values() if not a.pinned]
                if not idle:
                    raise RequestError(
                        f"{len(self._adapters)} adapters are loaded, and adapters.max_loaded is "
                        f"{self.max_loaded}: unload one first",
                        param="lora_name",
                        code="too_many_adapters",
                    )
                del self._adapters[min(idle, key=lambda a: a.last_used).name]
            self._version += 1
            self._clock += 1
            loaded = LoadedAdapter(name, self._version, adapter, path, pinned, last_used=self._clock)
            self._adapters[name] = loaded
            return loaded

    def remove(self, name: str) -> LoadedAdapter | None:
        """Serve a name no longer; None if it was not loaded."""
        with self._lock:
            return self._adapters.pop(name, None)

    def get(self, name: str) -> LoadedAdapter | None:
        """What is served under a name now."""
        with self._lock:
            loaded = self._adapters.get(name)
            if loaded is not None:
                self._clock += 1
                loaded.last_used = self._clock
            return loaded

    def list(self) -> list[LoadedAdapter]:
        with self._lock:
            return list(self._adapters.values())
