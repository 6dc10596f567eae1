"""What holds for every codec in the engine, whatever else happens to a sequence."""

from __future__ import annotations

import random
from pathlib import Path

from kv_rig import BLOCK, build_engine, request, text_of, tiny_files

SPECS = [
    "",
    "kivi(bits=2, residual=0)",
    "kivi(bits=8, residual=32, keep_sinks=4, hadamard=True)",
    "snapkv(budget=40, window=8)+kivi(residual=0)",
    "kvsharer(map=[[2,0]])",
    "kvsharer(map=[[1,0],[2,1]])",
]


def test_random_requests_aborts_forks_and_preemptions_lose_no_block(tmp_path: Path) -> None:
    rng = random.Random(3)
    engine = build_engine(
        tiny_files(tmp_path),
        cache__kv_bytes=3 * 2 * 2 * 16 * 8 * BLOCK * 45,
        scheduler__max_batch_tokens=64,
        scheduler__max_running=8,
    )
    added = packed = 0
    while added < 24 or engine.has_work:
        if added < 24 and len(engine.requests) < 7:
            prompt = text_of(rng.randrange(3), 60)[: rng.randint(20, 60)] + text_of(added, rng.randint(1, 40))
            options = {"temperature": 1.0, "n": rng.choice([1, 1, 3]), "max_tokens": rng.randint(1, 60)}
            engine.add(request(prompt, rng.choice(SPECS), str(added), **options))
            added += 1
        if engine.requests and rng.random() < 0.05:
            engine.abort(rng.choice(list(engine.requests)))
        engine.step()
        engine.pool.check()
        running = engine.scheduler.running
        assert engine.pool.num_used == len({block for s in running for block in s.blocks})
        packed += sum(s.cached is not None and s.cached.packed is not None for s in running)
    assert engine.pool.num_used == 0
    assert packed > 40 and engine.scheduler.num_preemptions > 2 and engine.scheduler.prefix_hits > 0
