"""Watches the adapters' folder: what lies in it is served, under the names of its subfolders."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from tokenloom.engine.adapters import LoadedAdapter
from tokenloom.errors import TokenloomError
from tokenloom.models.adapters.peft_config import CONFIG_FILE
from tokenloom.models.adapters.peft_format import TENSORS_FILE
from tokenloom.serve.adapters import AdapterLoader

logger = logging.getLogger("tokenloom.serve")

POLL_S = 2.0

State = tuple[tuple[int, int, int] | None, ...]
"""Inode, time and size of each of an adapter's files; None for one that is missing."""


class AdapterFolder:
    """Loads, reloads and unloads adapters as their folders come, change and go.

    A folder that changes is taken once two looks in a row saw the same, so that one which is still being
    written is left alone. A broken one is told of once, and tried again when it has changed.
    """

    def __init__(self, loader: AdapterLoader) -> None:
        self.loader = loader
        self._seen: dict[str, State] = {}  # at the last look
        self._taken: dict[str, State] = {}  # loaded so, or found broken
        self._loaded: dict[str, LoadedAdapter] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="tokenloom-adapters", daemon=True)

    def start(self) -> None:
        """Load all that is there now, then follow the changes in a thread."""
        self._seen = self._look() or {}
        self.poll()
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def poll(self) -> None:
        """Look once, and take what was so at the last look, too."""
        now = self._look()
        if now is None:
            return
        for name in self._taken.keys() - now.keys():
            del self._taken[name]
            self._drop(name)
        for name, state in now.items():
            if state != self._taken.get(name) and state == self._seen.get(name):
                self._taken[name] = state
                self._take(name)
        self._seen = now

    def _loop(self) -> None:
        while not self._ended.wait(POLL_S):
            try:
                self.poll()
            except Exception:  # one bad look must not be the last
                logger.exception("the adapters' folder could not be read")

    def _look(self) -> dict[str, State] | None:
        """The state of every adapter's folder; None if the root cannot be read for now."""
        try:
            names = [path.name for path in self.loader.root.iterdir() if not path.name.startswith(".")]
        except FileNotFoundError:
            return {}
        except OSError as error:
            logger.warning("the adapters' folder cannot be read (%s)", error.strerror)
            return None
        states = {name: _state(self.loader.root / name) for name in sorted(names)}
        return {name: state for name, state in states.items() if state[0] is not None}

    def _take(self, name: str) -> None:
        current = self.loader.find(name)
        if current is not None and not self._is_ours(name, current):
            logger.warning("adapter folder %s is passed over: that name was loaded from elsewhere", name)
            return
        try:
            self._loaded[name] = self.loader.load(name, name, replace=True)
        except TokenloomError as error:
            logger.warning("adapter folder %s is passed over: %s", name, error)
        except Exception:
            logger.exception("adapter folder %s is passed over", name)

    def _drop(self, name: str) -> None:
        current = self.loader.find(name)
        if current is not None and self._is_ours(name, current):
            self.loader.unload(name)
        self._loaded.pop(name, None)

    def _is_ours(self, name: str, current: LoadedAdapter) -> bool:
        return current is self._loaded.get(name) or current.path == (self.loader.root / name).resolve()


def _state(folder: Path) -> State:
    return tuple(_file_state(folder / name) for name in (CONFIG_FILE, TENSORS_FILE))


def _file_state(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
