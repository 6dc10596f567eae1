"""Settings: flags over environment over TOML over defaults, and errors that name the key."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest

from tokenloom.config import ConfigError, home, load_settings


def test_flags_over_environment_over_file_over_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "loom.toml"
    file.write_text('[server]\nport = 1\nhost = "file"\ndrain_timeout_s = 7.0\n[cache]\nblock_size = 8\n')
    monkeypatch.setenv("TOKENLOOM_SERVER__PORT", "2")
    monkeypatch.setenv("TOKENLOOM_SERVER__HOST", "environment")
    settings = load_settings({"server.port": 3, "server.host": None}, file)
    assert settings.server.port == 3
    assert settings.server.host == "environment"
    assert settings.server.drain_timeout_s == 7.0
    assert settings.cache.block_size == 8
    assert settings.scheduler.max_running == 64


@pytest.mark.parametrize(
    ("flags", "toml", "words"),
    [
        ({"server.port": 70000}, "", r"server\.port"),
        ({"server.port": "x"}, "", r"server\.port"),
        ({"server.prot": 1}, "", "server.prot"),
        ({"nonsense": 1}, "", "nonsense"),
        ({"model.dtype": "float8"}, "", r"model\.dtype"),
        ({}, "[server]\nport = 70000\n", r"server\.port"),
        ({}, "[server]\nprot = 1\n", r"server\.prot"),
        ({}, "[sever]\nport = 1\n", "sever"),
        ({}, "port = [\n", "not valid TOML"),
    ],
)
def test_errors_name_the_key(tmp_path: Path, flags: dict[str, object], toml: str, words: str) -> None:
    file = tmp_path / "loom.toml"
    file.write_text(toml)
    with pytest.raises(ConfigError, match=words):
        load_settings(flags, file)


def test_environment_errors_name_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENLOOM_CACHE__BLOCK_SIZE", "0")
    with pytest.raises(ConfigError, match=r"cache\.block_size"):
        load_settings()


def test_a_branch_given_as_a_value_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENLOOM_CACHE", "/somewhere")
    with pytest.raises(ConfigError, match=r"TOKENLOOM_CACHE: .*TOKENLOOM_CACHE__KEY"):
        load_settings()


def test_folders_are_no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TOKENLOOM_MODEL_CACHE", str(tmp_path))
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path))
    assert load_settings().model.name == "smollm2-135m-instruct"


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        load_settings(config_file=tmp_path / "nowhere.toml")


def test_keys_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings({"server.api_keys": ["very-secret"]})
    assert "very-secret" not in repr(settings)
    assert settings.server.api_keys[0].get_secret_value() == "very-secret"


def test_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path))
    assert home() == tmp_path


@pytest.mark.parametrize("key", ["server.api_keys", "server.admin_keys"])
@pytest.mark.parametrize("value", ["sesame", [["sesame"]], {"sesame": 1}, ["", "sesame"]])
def test_a_key_in_the_wrong_form_is_not_repeated(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"setting {key}") as error:
        load_settings({key: value})
    assert "sesame" not in "".join(traceback.format_exception(error.value))
