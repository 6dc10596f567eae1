"""Adapters over HTTP: loading, replacing and unloading them, and what is refused."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from running import Running, assert_error, wait_for
from tuning_server import PROMPT, say, start, write_adapter


@pytest.fixture(scope="module")
def adapters(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of the tiny model, `red` and `blue`; tests work on copies."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("red", "blue")):
        write_adapter(tiny_folder, root / name, seed)
    return root


@pytest.fixture
def root(adapters: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapters, tmp_path / "root"))


@pytest.fixture
def begin(
    tiny_folder: Path, root: Path, tmp_path: Path, monkeypatch: Any
) -> Iterator[Callable[..., Running]]:
    """Start a server on the adapters' folder, which it does not watch."""
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path / "home"))
    started: list[Running] = []

    def again(**flags: Any) -> Running:
        where = {"adapters__folder": str(root), "adapters__watch": False, "coserve__mode": "off"}
        started.append(start(tiny_folder, **(where | flags)))
        return started[-1]

    yield again
    for server in started:
        server.stop()


def load(server: Running, name: str, path: str, **fields: Any) -> httpx.Response:
    body = {"lora_name": name, "lora_path": path, **fields}
    return server.http.post("/v1/load_lora_adapter", json=body)


def unload(server: Running, name: str) -> httpx.Response:
    return server.http.post("/v1/unload_lora_adapter", json={"lora_name": name})


def listed(server: Running) -> list[str]:
    return [card["id"] for card in server.http.get("/v1/models").json()["data"]]


def test_an_adapter_is_loaded_used_and_unloaded(begin, root, caplog):
    server = begin()
    caplog.set_level(logging.INFO, "tokenloom")
    base = say(server, "tiny")
    response = load(server, "team/red-1", "red")
    assert (response.status_code, response.headers["content-type"]) == (200, "text/plain; charset=utf-8")
    assert "'team/red-1' added" in response.text
    assert say(server, "team/red-1") != base
    [_, card] = server.http.get("/v1/models").json()["data"]
    assert (card["id"], card["root"], card["parent"]) == ("team/red-1", "red", "tiny")
    assert server.http.get("/v1/models/team/red-1").json() == card
    adapter = server.engine.engine.adapters.get("team/red-1")
    assert f"version {adapter.version} " in caplog.text and adapter.sha256 in caplog.text
    assert unload(server, "team/red-1").status_code == 200
    assert listed(server) == ["tiny"]
    body = {"model": "team/red-1", "prompt": "a"}
    assert_error(server.http.post("/v1/completions", json=body), 404, "model", "model_not_found")
    assert_error(unload(server, "team/red-1"), 404, "lora_name", "adapter_not_found")
    assert say(server, "tiny") == base


def test_an_absolute_path_below_the_root_is_taken(begin, root):
    server = begin()
    assert load(server, "red", str(root / "red")).status_code == 200


def test_every_route_answers_through_the_adapter(begin):
    server = begin()
    load(server, "red", "red")

    def post(path: str, model: str, **fields: Any) -> Any:
        body = {"model": model, "max_tokens": 12, "temperature": 0, **fields}
        return server.http.post(path, json=body).json()

    messages = [{"role": "user", "content": "the sea"}]
    texts = [post("/v1/chat/completions", m, messages=messages)["choices"] for m in ("tiny", "red")]
    assert texts[0] != texts[1]
    vectors = [post("/v1/embeddings", m, input="the sea")["data"] for m in ("tiny", "red")]
    assert vectors[0] != vectors[1]


def test_requests_keep_the_version_with_which_they_began(begin, root, tiny_folder):
    """Text over a prompt that is in the prefix cache of the version before."""
    server = begin()
    cold = begin()
    load(server, "coat", "red")
    red = say(server, "coat", max_tokens=300)
    load(cold, "coat", "blue")
    blue = say(cold, "coat", max_tokens=24)
    body = {"model": "coat", "prompt": PROMPT, "max_tokens": 300, "temperature": 0, "ignore_eos": True}
    text = ""
    with server.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        lines = response.iter_lines()
        first = json.loads(next(lines).removeprefix("data: "))
        assert load(server, "coat", "blue", load_inplace=True).status_code == 200
        fresh = say(server, "coat", max_tokens=24)
        assert server.engine.stats().running == 1  # the stream still runs
        text += first["choices"][0]["text"]
        for line in lines:
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    assert text == red
    assert fresh == blue != red[: len(blue)]


def test_a_stream_outlives_the_unloading_of_its_adapter(begin):
    server = begin()
    load(server, "red", "red")
    whole = say(server, "red", max_tokens=200)
    texts: list[str] = []
    salted = {"max_tokens": 200, "cache_salt": "again"}
    thread = threading.Thread(target=lambda: texts.append(say(server, "red", **salted)))
    thread.start()
    wait_for(lambda: server.engine.stats().running == 1)
    assert unload(server, "red").status_code == 200
    thread.join()
    assert texts == [whole]


def test_a_name_is_replaced_only_if_asked_to(begin):
    server = begin()
    load(server, "coat", "red")
    text = say(server, "coat")
    message = assert_error(load(server, "coat", "blue"), 400, "lora_name", "adapter_exists")
    assert "load_inplace" in message
    assert say(server, "coat") == text
    assert load(server, "coat", "blue", load_inplace=True).status_code == 200
    assert say(server, "coat") != text


@pytest.mark.parametrize(
    "path",
    [
        "..",
        "../secret",
        "red/../../secret",
        ".",
        "",
        "/etc",
        "/",
        "red\0",
        "link",
        "x" * 4000,
        "red/../../root",
    ],
)
def test_only_folders_below_the_root_are_read(begin, root, tiny_folder, path):
    secret = write_adapter(tiny_folder, root.parent / "secret", 3)
    (root / "link").symlink_to(secret)
    server = begin()
    message = assert_error(load(server, "a", path), 400, "lora_path")
    assert str(root) not in message and str(secret) not in message
    assert listed(server) == ["tiny"]


def test_a_sibling_whose_name_begins_like_the_root_is_outside(begin, root, adapters):
    shutil.copytree(adapters / "red", root.parent / "root-private" / "red")
    response = load(begin(), "a", str(root.parent / "root-private" / "red"))
    assert_error(response, 400, "lora_path", "path_not_allowed")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_links_of_files_do_not_lead_out_either(begin, root, name):
    outside = root.parent / name
    (root / "red" / name).rename(outside)
    (root / "red" / name).symlink_to(outside)
    assert_error(load(begin(), "a", "red"), 400, "lora_path", "path_not_allowed")


def test_links_within_the_root_are_followed(begin, root):
    (root / "current").symlink_to(root / "red")
    assert load(begin(), "a", "current").status_code == 200


@pytest.mark.parametrize("name", ["", "a b", "a" * 129, "tiny", "ft:tiny:x:1", "é", "a\n", "a?b"])
def test_names_are_checked(begin, name):
    assert_error(load(begin(), name, "red"), 400, "lora_name", "invalid_name")


@pytest.mark.parametrize("fault", ["shape", "tensors", "config", "pickle", "nothing", "empty"])
def test_what_does_not_fit_is_refused_and_never_served(begin, root, tmp_path, fault):
    folder = root / "red"
    if fault == "shape":
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))
    elif fault == "tensors":
        (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
    elif fault == "config":
        (folder / "adapter_config.json").write_text("{")
    elif fault == "pickle":
        os.rename(folder / "adapter_model.safetensors", folder / "adapter_model.bin")
    else:
        shutil.rmtree(folder)
        if fault == "empty":
            folder.mkdir()
    server = begin()
    code = "adapter_not_found" if fault == "nothing" else "invalid_adapter"
    message = assert_error(load(server, "a", "red"), 400, "lora_path", code)
    assert "red" in message and str(tmp_path) not in message
    assert listed(server) == ["tiny"]


def test_a_broken_replacement_leaves_the_old_one(begin, root):
    server = begin()
    load(server, "coat", "red")
    text = say(server, "coat")
    (root / "blue" / "adapter_model.safetensors").write_bytes(b"")
    assert_error(load(server, "coat", "blue", load_inplace=True), 400, "lora_path", "invalid_adapter")
    assert say(server, "coat") == text


def test_there_is_a_most_of_adapters(begin):
    server = begin(adapters__max_loaded=1)
    load(server, "a", "red")
    assert_error(load(server, "b", "blue"), 400, "lora_name", "too_many_adapters")
    assert load(server, "a", "blue", load_inplace=True).status_code == 200


@pytest.mark.parametrize("field", ["lora_name", "lora_path"])
def test_both_fields_are_required(begin, field):
    body = {"lora_name": "a", "lora_path": "red"}
    del body[field]
    assert_error(begin().http.post("/v1/load_lora_adapter", json=body), 400, field)


def test_an_adapter_of_the_operator_is_not_deleted_as_a_model(begin, root):
    server = begin()
    load(server, "red", "red")
    assert_error(server.http.delete("/v1/models/red"), 400, "model")
    assert listed(server) == ["tiny", "red"] and (root / "red").is_dir()


def test_unloading_drops_the_metrics_label(begin):
    server = begin()
    load(server, "red", "red")
    say(server, "red")
    assert 'tokenloom:adapter_info{model_name="red",version="1"} 1.0' in server.http.get("/metrics").text
    unload(server, "red")
    text = server.http.get("/metrics").text
    assert "adapter_info{" not in text and 'tokenloom:model_requests_total{model_name="red"} 1.0' in text
