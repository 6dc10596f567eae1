"""The one native call for all layers reads what sequences share once, like the operators do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fused_models import BLOCK, Runner, batch_of, build_runner
from tokenloom.batch import Batch
from tokenloom.cache.kv_cache import KVCache
from tokenloom.kernels import SharedPrefix, native
from tokenloom.kernels.shared_prefix import shared_prefixes

pytestmark = [
    pytest.mark.skipif(native is None, reason="the native kernels were not built"),
    pytest.mark.usefixtures("usual_machine"),
]


PREFIX = torch.randint(0, 200, (256,), generator=torch.Generator().manual_seed(1)).tolist()
"""Four blocks of keys (`native.KEY_BLOCK`), which are what the native kernels share."""
FIRST, BEHIND, ELSEWHERE = list(range(3, 67)), 70, list(range(80, 144))


def decodes(model: Runner, dtype: torch.dtype = torch.float32) -> tuple[Batch, KVCache]:
    """Three sequences that begin with PREFIX, each at its next token."""
    kv = model.cache(dtype, num_blocks=144)
    model.forward(batch_of([(PREFIX, 0, FIRST)]), kv)
    batch = batch_of([([7 * i], len(PREFIX), [*FIRST, BEHIND + i]) for i in range(3)])
    return batch, kv


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_the_fused_call_gives_the_same_bits_with_and_without(tmp_path: Path, dtype: torch.dtype) -> None:
    model = build_runner(tmp_path)
    batch, kv = decodes(model, dtype)
    separate = model.forward(batch, kv)
    batch.shared = shared_prefixes(batch.spans, BLOCK, 1)
    assert [(p.begin, p.end, len(p.spans)) for p in batch.shared] == [(0, len(PREFIX), 3)]
    assert torch.equal(model.forward(batch, kv), separate)
    near(model.op_by_op().forward(batch, kv), separate)


def test_the_fused_call_does_read_what_it_is_told_is_shared(tmp_path: Path) -> None:
    model = build_runner(tmp_path)
    batch, kv = decodes(model)
    model.forward(batch_of([(PREFIX[4:] + PREFIX[:4], 0, ELSEWHERE)]), kv)
    batch.spans[2].blocks[: len(ELSEWHERE)] = ELSEWHERE  # not what the others begin with
    separate = model.forward(batch, kv)
    batch.shared = [SharedPrefix(0, len(PREFIX), batch.spans)]  # a lie, which shows
    together = model.forward(batch, kv)
    assert torch.equal(together[:2], separate[:2])
    assert not torch.equal(together[2:], separate[2:])


def near(actual: Tensor, expected: Tensor) -> None:
    """Up to activations that are rounded to the other of two steps of 8 bits, for a last bit."""
    assert (actual - expected).abs().max() < 0.15 * expected.std()
