"""The model of these tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny_models import build_tiny


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("llama"), "llama")[0]
