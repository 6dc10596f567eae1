"""Kernel tests may choose an instruction set or a thread count; the next test has the usual ones again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tokenloom.kernels import native


@pytest.fixture(autouse=True)
def usual_machine() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if native is not None:
        native.use_isa(native.isas()[0])
