"""The one native call for all layers reads what sequences share once, like the operators do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fused_models import BLOCK, IDS, Runner, batch_of, build_runner
from tokenloom.batch import Batch
from tokenloom.cache.kv_cache import KVCache
from tokenloom.kernels import SharedPrefix, native
from tokenloom.kernels.shared_prefix import shared_prefixes

pytestmark = [
    pytest.mark.skipif(native is None, reason="the native kernels were not built"),
    pytest.mark.usefixtures("usual_machine"),
]


def decodes(model: Runner, dtype: torch.dtype = torch.float32) -> tuple[Batch, KVCache]:
    """Three sequences with 36 tokens in common, each at its next one."""
    kv = model.cache(dtype)
    model.forward(batch_of([(IDS[:36], 0, list(range(3, 12)))]), kv)
    batch = batch_of([([7 * i], 36, [*range(3, 12), 20 + i]) for i in range(3)])
    return batch, kv


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Up to activations that are rounded to the other of two steps of 8 bits, for a last bit."""
    assert (actual - expected).abs().max() < 0.15 * expected.std()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_the_fused_call_gives_the_same_with_and_without(tmp_path: Path, dtype: torch.dtype) -> None:
    model = build_runner(tmp_path)
    batch, kv = decodes(model, dtype)
    separate = model.forward(batch, kv)
    batch.shared = shared_prefixes(batch.spans, BLOCK, 1)
    assert [(p.begin, p.end, len(p.spans)) for p in batch.shared] == [(0, 36, 3)]
    together = model.forward(batch, kv)
    assert_near(together, separate)
    assert_near(model.op_by_op().forward(batch, kv), separate)


def test_the_fused_call_does_read_what_it_is_told_is_shared(tmp_path: Path) -> None:
    model = build_runner(tmp_path)
    batch, kv = decodes(model)
    other = batch_of([(IDS[4:40], 0, list(range(30, 39)))])
    model.forward(other, kv)
    batch.spans[2].blocks[:9] = range(30, 39)  # not what the others begin with
    separate = model.forward(batch, kv)
    batch.shared = [SharedPrefix(0, 36, batch.spans)]  # a lie, which shows
    together = model.forward(batch, kv)
    assert_near(together[:2], separate[:2])
    with pytest.raises(AssertionError):
        assert_near(together[2:], separate[2:])
