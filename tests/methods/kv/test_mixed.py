"""Many methods in one batch, with prompts in chunks and too little memory, beside plain requests."""

from __future__ import annotations

import random

import pytest

from kv_rig import BLOCK, answer, bits, build_engine, request, run, same, text_of, tiny_files
from tokenloom.models.loader import ModelFiles

SPECS = [
    "",
    "snapkv(budget=24, window=8)",
    "snapkv(budget=0.4, window=8)+pyramid(beta=4)+merge",
    "",
    "streaming(budget=20)",
    "h2o(budget=24, min_prompt=0)",
    "quest(budget=12, page=4, dense_layers=1)",
    "tokenselect(budget=24, n_init=2, chunk=8, theta=1.0)",
]
TOKEN_BYTES = 3 * 2 * 2 * 16 * 8  # of the tiny model in float64


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return tiny_files(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("seed", [1, 2])
def test_chunks_and_preemption_in_a_mixed_batch_change_nobodys_bits(files: ModelFiles, seed: int) -> None:
    source = random.Random(seed)
    chosen = source.sample(SPECS, len(SPECS))
    prompts = [text_of(seed * 10 + i, source.randint(40, 70)) for i in range(len(chosen))]
    roomy = build_engine(files, cache__prefix_caching=False, model__backend="reference")
    alone = [answer(roomy, p, kv, max_tokens=24) for p, kv in zip(prompts, chosen, strict=True)]
    tight = build_engine(
        files,
        model__backend="reference",
        scheduler__max_batch_tokens=21,
        scheduler__max_running=8,
        cache__kv_bytes=TOKEN_BYTES * BLOCK * 30,
    )
    both = zip(prompts, chosen, strict=True)
    outputs = run(tight, *(request(p, kv, str(i), max_tokens=24) for i, (p, kv) in enumerate(both)))
    for kv, got, expected in zip(chosen, outputs, alone, strict=True):
        if kv.startswith("tokenselect"):  # it reads by cells what others read as a span: other last bits
            same(got, expected)
        else:
            assert bits(got) == bits(expected), kv
    assert tight.scheduler.num_preemptions > 0
