"""States that a training job goes on from. Tensors are safetensors, everything else is JSON."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenloom.durable import new_folder
from tokenloom.finetune.progress import Snapshot

logger = logging.getLogger("tokenloom.finetune")

_STATE, _TENSORS = "state.json", "state.safetensors"


def save_state(directory: Path, snapshot: Snapshot) -> Path:
    """Write a state below `directory`; once it is on disk, older ones are deleted.

    Raises:
        OSError: the disk is full, or the like; older states are untouched then.
    """
    progress = snapshot.progress
    folder = directory / f"state-{progress['step']:08d}-{progress['passes_done']:05d}"
    tensors = {"flat": snapshot.flat, "grads": snapshot.grads}
    tensors |= {f"optimizer.{name}": tensor for name, tensor in snapshot.optimizer.items()}
    with new_folder(folder) as aside:
        (aside / _STATE).write_text(json.dumps(progress), encoding="utf-8")
        try:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, aside / _TENSORS)
        except SafetensorError as error:
            raise OSError(f"{folder}: cannot be written ({error})") from error
    for older in _states(directory):
        if older != folder:
            shutil.rmtree(older, ignore_errors=True)
    return folder


def latest_state(directory: Path) -> Snapshot | None:
    """The newest state that can be read, or None."""
    for folder in reversed(_states(directory)):
        try:
            progress = json.loads((folder / _STATE).read_text(encoding="utf-8"))
            tensors = load_file(folder / _TENSORS)
            flat, grads = tensors.pop("flat"), tensors.pop("grads")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            logger.warning("%s cannot be read and is passed over (%s)", folder, error)
            continue
        optimizer: dict[str, Tensor] = {
            name.removeprefix("optimizer."): tensor for name, tensor in tensors.items()
        }
        return Snapshot(progress, flat, optimizer, grads)
    return None


def _states(directory: Path) -> list[Path]:
    return sorted(directory.glob("state-*")) if directory.is_dir() else []
