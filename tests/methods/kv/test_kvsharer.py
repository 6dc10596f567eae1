"""KVSharer: shared layers read others' cache and hold no memory; the map is found as the paper says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from kv_rig import BLOCK, answer, bits, build_engine, request, same, text_of, tokens
from tiny_models import build_tiny
from tokenloom.cache.kv_cache import KVCache
from tokenloom.cache.policy import SequenceShape
from tokenloom.calibrate_cli import calibrate_app
from tokenloom.errors import RequestError
from tokenloom.methods.calibration import load
from tokenloom.methods.kv import combine
from tokenloom.methods.kv.kvsharer import roots
from tokenloom.methods.kv.kvsharer_calibration import by_distance, calibrate
from tokenloom.models.loader import ModelFiles, open_model

PROMPT = text_of(1, 90)
TEXT = Path(__file__)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """A model of 4 layers."""
    path, _ = build_tiny(tmp_path_factory.mktemp("llama"), "llama", torch.float32, num_hidden_layers=4)
    return open_model(str(path))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path))


def test_chains_end_at_the_first_layer_of_them() -> None:
    assert roots([(3, 2), (2, 0), (5, 3)], 6) == [0, 1, 0, 0, 4, 0]
    assert roots([], 3) == [0, 1, 2]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_nobody_reads_what_shared_layers_compute(
    files: ModelFiles, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_engine(files, model__backend=backend, cache__prefix_caching=False)
    specs = ("kvsharer(map=[[3,1],[2,0]])", "kvsharer(map=[[3,1]])")
    both, one = (bits(answer(engine, PROMPT, spec, max_tokens=20)) for spec in specs)
    write = KVCache.write

    def poisoned(kv: KVCache, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        write(kv, layer, slots, *((3 - k, 3 - v) if layer >= 2 else (k, v)))

    monkeypatch.setattr(KVCache, "write", poisoned)
    assert bits(answer(engine, PROMPT, specs[0], max_tokens=20)) == both
    assert bits(answer(engine, PROMPT, specs[1], max_tokens=20)) != one  # there, layer 2 reads its own


def test_it_is_as_if_the_layer_had_stored_the_others_keys_and_values(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_engine(files, model__backend="torch", cache__prefix_caching=False)
    shared = answer(engine, PROMPT, "kvsharer(map=[[3,2],[2,0]])", max_tokens=30)
    write, first = KVCache.write, []

    def copying(kv: KVCache, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        if layer == 0:
            first[:] = [k.clone(), v.clone()]
        write(kv, layer, slots, *(first if layer >= 2 else (k, v)))

    monkeypatch.setattr(KVCache, "write", copying)
    same(answer(engine, PROMPT, max_tokens=30), shared)


def test_half_of_the_layers_are_half_of_the_blocks(files: ModelFiles) -> None:
    engine = build_engine(files, cache__prefix_caching=False)
    for spec, blocks in (("kvsharer(layers=0)", 20), ("kvsharer(map=[[1,0],[3,2]])", 10)):
        engine.add(request(text_of(2, 20 * BLOCK), spec))
        engine.step()
        assert engine.pool.num_used == blocks
        engine.abort("r")
        assert engine.pool.num_used == 0


def test_blocks_of_a_shared_prompt_are_its_own_namespaces(files: ModelFiles) -> None:
    engine = build_engine(files, model__backend="reference")
    dense = bits(answer(engine, PROMPT))
    shared = bits(answer(engine, PROMPT, "kvsharer(map=[[3,0]])"))
    assert engine.scheduler.prefix_hits == 0
    assert bits(answer(engine, PROMPT, "kvsharer(map=[[3,0]])")) == shared != dense
    assert engine.scheduler.prefix_hits == 88
    assert bits(answer(engine, PROMPT)) == dense


def test_the_farthest_pair_is_tried_first() -> None:
    distances = torch.tensor([[0.0, 1, 5], [1, 0, 3], [5, 3, 0]])
    assert by_distance(distances) == [(2, 0), (2, 1), (1, 0)]


def test_pairs_are_accepted_while_the_output_stays_similar(files: ModelFiles) -> None:
    engine = build_engine(files)
    found = calibrate(engine, TEXT, layers=2, num_passages=2, tokens=32, cosine=-1.0)
    assert len(found.pairs) == found.tried == 2
    assert all(-1 < cosine < 1 for cosine in found.cosines)
    assert load("kvsharer", request(PROMPT).shape(engine.config, engine.name))["pairs"].shape == (2, 2)
    (layer, root), _ = found.pairs
    named = tokens(answer(engine, PROMPT, f"kvsharer(map=[[{layer},{root}]])"))
    assert tokens(answer(engine, PROMPT, "kvsharer(layers=1)")) == named
    none = calibrate(engine, TEXT, layers=2, num_passages=2, tokens=32, cosine=1.0)
    assert none.pairs == [] and none.tried == 6
    assert engine.pool.num_used == 0


def test_the_default_model_comes_calibrated() -> None:
    shape = SequenceShape(100, 10, 30, 9, 3, 64, "smollm2-135m-instruct")
    pairs = load("kvsharer", shape)["pairs"].tolist()
    assert len(pairs) == 12 and all(root < layer for layer, root in pairs)
    assert combine("kvsharer(layers=12)").policy(shape).roots == roots(pairs, 30)  # type: ignore[union-attr]


def test_the_command_calibrates_a_model(files: ModelFiles) -> None:
    command = ["kvsharer", "--model", str(files.path), "--text", str(TEXT), "--layers", "1"]
    result = CliRunner().invoke(calibrate_app, [*command, "--passages", "2", "--cosine", "-1"])
    assert result.exit_code == 0, result.output
    assert "1 pairs tried" in result.output
    assert len(tokens(answer(build_engine(files), PROMPT, "kvsharer(layers=1)"))[0]) == 12


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("kvsharer(layers=-1)", "layers must be at least 0"),
        ("kvsharer(map=[3])", r"map must be pairs like \[\[5,2\],\[7,3\]\]"),
        ("kvsharer(map=[[3,1.5]])", "map must be pairs"),
        ("kvsharer(map=[[1,3]])", r"\[1, 3\]: a layer reads an earlier one"),
        ("kvsharer(map=[[3,1],[3,2]])", "named twice"),
        ("snapkv+kvsharer", "shared layers have none"),
        ("kvsharer+tokenselect", "decoded all together"),
    ],
)
def test_what_it_cannot_do_is_said(spec: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        combine(spec)


def test_maps_that_a_model_does_not_have_are_refused(files: ModelFiles) -> None:
    engine = build_engine(files)
    with pytest.raises(RequestError, match="this model has 4 layers"):
        engine.add(request(PROMPT, "kvsharer(map=[[4,1]])"))
    with pytest.raises(RequestError, match="run tokenloom calibrate kvsharer"):
        engine.add(request(PROMPT, "kvsharer"))
    calibrate(engine, TEXT, layers=1, num_passages=1, tokens=16, cosine=-1.0)
    with pytest.raises(RequestError, match="calibration found 1 to share"):
        engine.add(request(PROMPT, "kvsharer(layers=2)"))
