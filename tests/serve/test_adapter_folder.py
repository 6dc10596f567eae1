"""The watched folder: what lies in it is served, and changes are followed once they are complete."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tokenloom.serve.adapter_folder
from running import Running, wait_for
from tokenloom.serve.adapter_folder import AdapterFolder
from tokenloom.serve.adapters import AdapterLoader
from tuning_server import say, start, write_adapter


@pytest.fixture(scope="module")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that watches nothing; its engine is lent to the folders of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENLOOM_HOME", str(tmp_path_factory.mktemp("home")))
        running = start(tiny_folder, coserve__mode="off")
        yield running
        running.stop()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def write(tiny_folder: Path, root: Path) -> Callable[..., Path]:
    return lambda name, seed=0: write_adapter(tiny_folder, root / name, seed)


@pytest.fixture
def folder(server: Running, root: Path) -> Iterator[AdapterFolder]:
    """A folder that is looked at by hand."""
    for adapter in server.engine.engine.adapters.list():
        server.engine.engine.adapters.remove(adapter.name)
    chosen = server.engine.settings.model_copy(deep=True)
    chosen.adapters.folder = str(root)
    yield AdapterFolder(AdapterLoader(server.engine, chosen))


def versions(folder: AdapterFolder) -> dict[str, int]:
    return {a.name: a.version for a in folder.loader._registry.list()}


def look_twice(folder: AdapterFolder) -> None:
    folder.poll()
    folder.poll()


def test_a_server_follows_its_folder(tiny_folder, root, write, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tokenloom.serve.adapter_folder, "POLL_S", 0.05)
    write("red")
    server = start(tiny_folder, adapters__folder=str(root), coserve__mode="off")

    def listed() -> set[str]:
        return {card["id"] for card in server.http.get("/v1/models").json()["data"]}

    try:
        assert listed() == {"tiny", "red"}
        text = say(server, "red")
        write("blue", 1)
        wait_for(lambda: listed() == {"tiny", "red", "blue"})
        write("red", 2)
        wait_for(lambda: server.engine.engine.adapters.get("red").version == 3)
        assert say(server, "red") != text
        shutil.rmtree(root / "red")
        wait_for(lambda: listed() == {"tiny", "blue"})
    finally:
        server.stop()


def test_nothing_is_loaded_with_watch_off(tiny_folder, root, write, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path / "home"))
    write("red")
    server = start(tiny_folder, adapters__folder=str(root), adapters__watch=False, coserve__mode="off")
    try:
        assert len(server.http.get("/v1/models").json()["data"]) == 1
    finally:
        server.stop()


def test_a_folder_is_taken_when_two_looks_saw_the_same(folder, write, root):
    write("red")
    folder.poll()
    assert versions(folder) == {}
    with (root / "red" / "adapter_model.safetensors").open("ab") as file:
        file.write(b" ")
    folder.poll()
    assert versions(folder) == {}
    write("red")
    look_twice(folder)
    assert set(versions(folder)) == {"red"}
    before = versions(folder)
    look_twice(folder)
    assert versions(folder) == before


def test_a_change_makes_a_new_version_and_requests_see_it(folder, write, server):
    write("red")
    look_twice(folder)
    before, text = versions(folder), say(server, "red")
    write("red", 1)
    look_twice(folder)
    assert versions(folder)["red"] > before["red"]
    assert say(server, "red") != text


def test_a_broken_folder_is_told_of_once_and_tried_again_when_it_changes(folder, write, root, caplog):
    write("red")
    write("sound")
    (root / "red" / "adapter_model.safetensors").write_bytes(b"")
    with caplog.at_level(logging.WARNING, "tokenloom"):
        for _ in range(4):
            folder.poll()
    assert [record.getMessage() for record in caplog.records if "red" in record.getMessage()] == [
        record.getMessage() for record in caplog.records
    ]
    assert len(caplog.records) == 1
    assert set(versions(folder)) == {"sound"}
    write("red")
    look_twice(folder)
    assert set(versions(folder)) == {"red", "sound"}


def test_a_version_that_broke_leaves_the_last_sound_one(folder, write, root):
    write("red")
    look_twice(folder)
    before = versions(folder)
    (root / "red" / "adapter_config.json").write_text("{")
    look_twice(folder)
    assert versions(folder) == before


def test_hidden_folders_files_and_folders_of_other_things_are_ignored(folder, write, root, caplog):
    write(".hidden")
    (root / "readme.txt").write_text("hello")
    (root / "other").mkdir()
    look_twice(folder)
    assert versions(folder) == {} and caplog.records == []


def test_names_that_requests_may_not_have_are_passed_over(folder, write, caplog):
    for name in ("tiny", "ft:tiny:a:1", "a b"):
        write(name)
    look_twice(folder)
    assert versions(folder) == {} and len(caplog.records) == 3


def test_an_adapter_loaded_from_elsewhere_under_that_name_stays(folder, write, root):
    write("red")
    write("other")
    folder.loader.load("red", "other", replace=False)
    look_twice(folder)
    assert folder.loader.find("red").path == root / "other"
    shutil.rmtree(root / "red")
    folder.poll()
    assert folder.loader.find("red") is not None


def test_what_was_unloaded_by_request_comes_back_only_when_it_changes(folder, write):
    write("red")
    look_twice(folder)
    folder.loader.unload("red")
    look_twice(folder)
    assert versions(folder) == {}
    write("red", 1)
    look_twice(folder)
    assert set(versions(folder)) == {"red"}


def test_a_link_can_be_turned_to_another_version(folder, write, root):
    write(".v1", 0)
    write(".v2", 1)
    (root / "red").symlink_to(".v1")
    look_twice(folder)
    assert folder.loader.find("red").path == root / ".v1"
    (root / "next").symlink_to(".v2")
    (root / "next").replace(root / "red")
    look_twice(folder)
    assert folder.loader.find("red").path == root / ".v2"
    (root / "red").unlink()
    folder.poll()
    assert versions(folder) == {}


def test_a_root_that_is_missing_is_empty(folder, write, root):
    write("red")
    look_twice(folder)
    shutil.rmtree(root)
    folder.poll()
    assert versions(folder) == {}


def test_more_folders_than_fit_are_passed_over(folder, write, monkeypatch, caplog):
    monkeypatch.setattr(folder.loader._registry, "max_loaded", 1)
    write("a")
    write("b", 1)
    look_twice(folder)
    look_twice(folder)
    assert set(versions(folder)) == {"a"} and len(caplog.records) == 1
