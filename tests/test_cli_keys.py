"""`tokenloom keys`: make, list, revoke, and what a running server makes of it."""

import json

import pytest
from typer.testing import CliRunner

from tokenloom.cli import app
from tokenloom.config import Settings
from tokenloom.errors import RequestError
from tokenloom.finetune.store import Store
from tokenloom.serve.key_ring import open_key_store

run = CliRunner()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def keys(*arguments):
    result = run.invoke(app, ["keys", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_key_is_printed_alone_and_kept(home):
    key = keys("create", "--name", "laptop", "--rpm", "5").strip()
    [listed] = json.loads(keys("list", "--json"))
    assert key.startswith("tl-" + listed["id"].removeprefix("key-"))
    assert (listed["name"], listed["admin"], listed["rpm"], listed["tpm"]) == ("laptop", False, 5, None)
    assert key.rpartition("-")[2] not in keys("list")
    assert listed["id"] in keys("list")


def test_a_revoked_key_stays_in_the_list():
    keys("create", "--admin")
    key_id = json.loads(keys("list", "--json"))[0]["id"]
    assert keys("revoke", key_id) == f"{key_id} is revoked\n"
    assert json.loads(keys("list", "--json"))[0]["revoked_at"] is not None


def test_an_unknown_key_is_named():
    result = run.invoke(app, ["keys", "revoke", "key-1"])
    assert isinstance(result.exception, RequestError)
    assert "no key has the id 'key-1'" in str(result.exception)


def test_keys_are_made_while_a_server_has_the_home_folder(home):
    store = Store(home)  # locks the folder
    keys("create")
    store.close()
    assert open_key_store(Settings()).state() == (1, 0)


def test_a_server_takes_the_home_folder_after_keys_were_made(home):
    keys("create")
    store = Store(home)
    store.close()
    assert open_key_store(Settings()).state() == (1, 0)
