"""Kernel tests may choose an instruction set or a thread count."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def as_usual(usual_machine: None) -> None:
    """Each test begins on the usual machine."""
