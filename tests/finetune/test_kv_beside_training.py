"""KV methods beside finetuning jobs and adapters: neither knows of the other."""

from __future__ import annotations

import random
from typing import Any

import pytest
from test_trainer import STEPS, Listener, difference, fast_latency, hyper, serve, trainer

from tokenloom.engine.engine import Engine
from tokenloom.engine.request import Request
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.methods.kv import combine
from training_rig import Rig

SPECS = [
    "snapkv(budget=24, window=8)",
    "snapkv(budget=24, window=8)+adakv",
    "streaming(budget=16)",
    "h2o(budget=24, min_prompt=0)",
    "quest(budget=12, page=4, dense_layers=1)",
    "tokenselect(budget=24, n_init=2, chunk=8, theta=1.0)",
]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    return Rig(tmp_path_factory.mktemp("llama"))


def requests(specs: list[str], seed: int = 3, **options: Any) -> list[Request]:
    """One for each spec, with prompts of their own, some way beyond the budgets."""
    source = random.Random(seed)
    return [
        Request(
            f"{i}",
            [source.randrange(256) for _ in range(source.randint(50, 80))],
            SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True),
            kv=combine(spec),
            **options,
        )
        for i, spec in enumerate(specs)
    ]


def train(engine: Engine, rig: Rig) -> tuple[Any, Listener]:
    """A job on this engine, from the same start each time."""
    adapter, listener = rig.adapter(), Listener()
    engine.coserver.latency = fast_latency()
    engine.coserver.add(trainer(engine, adapter, listener, wanted=hyper(epochs=STEPS)))
    return adapter, listener


def test_a_job_in_the_same_iterations_changes_no_answer_and_is_not_changed(rig: Rig) -> None:
    flags = {"model__backend": "reference"}
    alone = serve(rig.engine(coserve__mode="off", **flags), requests(SPECS), random.Random(2))
    undisturbed = rig.engine(**flags)
    expected, _ = train(undisturbed, rig)
    serve(undisturbed, [], random.Random(2))
    engine = rig.engine(**flags)
    adapter, listener = train(engine, rig)
    assert serve(engine, requests(SPECS), random.Random(2)) == alone
    assert listener.done and listener.error is None
    assert difference(adapter.flat, expected.flat) <= 1e-8
    mixed = [i for i in engine.coserver.iterations if i.inference_rows and (i.train_rows or i.piece_rows)]
    assert mixed, "training and inference never shared an iteration"


def test_requests_of_adapters_keep_their_answers_in_a_mixed_batch(rig: Rig) -> None:
    engine = rig.engine(model__backend="reference", cache__prefix_caching=False)
    red = engine.adapters.put("red", rig.adapter(seed=1), rig.tmp)
    blue = engine.adapters.put("blue", rig.adapter(seed=2), rig.tmp)
    loaded = [red, blue, None]

    def made() -> list[Request]:
        found = requests(SPECS)
        for i, request in enumerate(found):
            request.adapter = loaded[i % 3]
        return found

    alone = [serve(engine, [request], random.Random(1)) for request in made()]
    together = serve(engine, made(), random.Random(1))
    assert together == {key: tokens for answer in alone for key, tokens in answer.items()}
    plain = serve(engine, requests(SPECS), random.Random(1))
    assert [together[key] == plain[key] for key in plain] == [False, False, True] * 2


@pytest.mark.parametrize("spec", ["streaming(budget=16)", "tokenselect(budget=24, n_init=2, chunk=8)"])
def test_prefixes_are_shared_inside_one_adapter_and_one_way_to_compute_the_prompt(
    rig: Rig, spec: str
) -> None:
    """`streaming` leaves a prompt's blocks as dense attention computes them, `tokenselect` does not."""
    engine = rig.engine()
    red = engine.adapters.put("red", rig.adapter(seed=1), rig.tmp)

    def hits(kv: str, adapter: Any) -> int:
        before = engine.scheduler.prefix_hits
        serve(engine, requests([kv], adapter=adapter), random.Random(1))
        return engine.scheduler.prefix_hits - before

    assert hits("off", None) == 0
    assert (hits(spec, None) > 0) == ("streaming" in spec)
    assert hits(spec, red) == 0
    assert hits(spec, red) > 0
    assert (hits("off", red) > 0) == ("streaming" in spec)
