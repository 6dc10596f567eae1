"""Adapters and taps in the one native call: what the operators do, and row by row the same in any batch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapter_models import CONFIGS, random_adapter
from fused_models import BLOCK, CPU, FAMILIES, IDS, ISAS, Runner, assert_same, batch_of, build_runner
from tokenloom.batch import Batch, BypassRows
from tokenloom.cache.kv_cache import KVCache
from tokenloom.kernels import native
from tokenloom.models.adapters import Adapter, AdapterConfig, Dims, LoraConfig

pytestmark = [
    pytest.mark.skipif(native is None, reason="the native kernels were not built"),
    pytest.mark.usefixtures("usual_machine"),
]

LORAS = [name for name in CONFIGS if name.startswith("lora")]
SITES = ("input", "query", "residual", "gate_up", "attended", "log_sums")
# (tokens, how many came before, blocks): the second and fourth go through no adapter.
PARTS = [
    (IDS[:21], 0, [9, 1, 30, 4, 50, 7]),
    (IDS[:1], 0, [2]),
    (IDS[5:14], 0, [11, 12, 13]),
    (IDS[20:32], 0, [20, 21, 22]),
    (IDS[30:39], 0, [40, 42, 44]),
]


def adapter_of(model: Runner, config: AdapterConfig, seed: int = 0) -> Adapter:
    dims = Dims.of(model.decoder.config)
    noisy = random_adapter(config, dims, seed)
    return noisy.copy((0.5 * noisy.flat).float())


def sent(batch: Batch, adapters: list[Adapter | None]) -> Batch:
    """Each of the batch's sequences through its own adapter."""
    for span, adapter in zip(batch.spans, adapters, strict=True):
        if adapter is not None:
            rows = slice(span.start, span.start + span.length)
            batch.bypasses.append(BypassRows(rows, adapter.layers))
    return batch


def runs_fused(model: Runner, batch: Batch, kv: KVCache | None = None) -> bool:
    fused, cos_sin = model.decoder.fused, model.decoder.rope.cos_sin(batch.positions)
    assert fused is not None
    return fused(batch, kv or model.cache(), torch.randn(batch.num_rows, 64), *cos_sin)


@pytest.mark.parametrize("quantize", ["q8", "q4"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [*LORAS, "lora 8", "lora 20"])
def test_loras_equal_the_operators(tmp_path: Path, name: str, family: str, quantize: Any) -> None:
    model = build_runner(tmp_path, family, quantize)
    config = LoraConfig(r=int(name[5:])) if name[5:].isdigit() else CONFIGS[name]
    a, b = (adapter_of(model, config, seed) for seed in (1, 2))
    batch = sent(batch_of(PARTS), [a, None, b, None, a])
    assert runs_fused(model, batch)
    fused = model.forward(batch, model.cache())
    assert_same(fused, model.op_by_op().forward(batch, model.cache()))
    plain = model.forward(batch_of(PARTS), model.cache())
    differs = (fused - plain).abs().amax(-1) > 0.01
    assert differs[:21].float().mean() > 0.9 and differs[-9:].float().mean() > 0.9


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_rows_have_the_same_bits_beside_any_adapter(tmp_path: Path, threads: int, isa: str) -> None:
    model = build_runner(tmp_path, "qk norm")
    native.use_isa(isa)
    torch.set_num_threads(threads)
    a = adapter_of(model, LoraConfig(r=10), 1)
    b = adapter_of(model, CONFIGS["lora subset"], 2)
    adapters = [a, None, b, None, a]
    together, first = model.forward(sent(batch_of(PARTS), adapters), model.cache()), 0
    for part, adapter in zip(PARTS, adapters, strict=True):
        rows = slice(first, first + len(part[0]))
        torch.set_num_threads(1)
        alone = model.forward(sent(batch_of([part]), [adapter]), model.cache())
        assert torch.equal(alone, together[rows])
        first = rows.stop


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_gives_the_same_logits(tmp_path: Path, isa: str) -> None:
    model = build_runner(tmp_path)
    batch = sent(batch_of(PARTS), [adapter_of(model, LoraConfig(r=9), i) for i in range(5)])
    native.use_isa("portable")
    expected = model.forward(batch, model.cache())
    native.use_isa(isa)
    assert_same(model.forward(batch, model.cache()), expected)


def test_parameters_that_training_changes_are_those_that_are_read(tmp_path: Path) -> None:
    model = build_runner(tmp_path)
    adapter = adapter_of(model, LoraConfig(r=4))
    batch = sent(batch_of(PARTS[:1]), [adapter])
    model.forward(batch, model.cache())
    adapter.flat.mul_(-2)
    changed = model.forward(batch, model.cache())
    afresh = model.forward(sent(batch_of(PARTS[:1]), [adapter.copy()]), model.cache())
    assert torch.equal(changed, afresh)


@pytest.mark.parametrize("name", ["ia3", "bottleneck"])
def test_other_adapters_run_by_operators(tmp_path: Path, name: str) -> None:
    model = build_runner(tmp_path)
    lora, other = adapter_of(model, LoraConfig(r=4)), adapter_of(model, CONFIGS[name])
    batch = sent(batch_of(PARTS), [lora, other, None, None, None])
    assert not runs_fused(model, batch)
    found = model.forward(batch, model.cache())
    assert torch.equal(found, model.op_by_op().forward(batch, model.cache()))


def test_dropout_runs_by_operators(tmp_path: Path) -> None:
    model = build_runner(tmp_path)
    batch = sent(batch_of(PARTS[:1]), [adapter_of(model, LoraConfig(r=4))])
    batch.bypasses[0].keep = lambda layer, site, width: torch.full((21, width), 0.5)
    assert not runs_fused(model, batch)


# -- taps ---------------------------------------------------------------------------------------------------


@dataclass
class Recorder:
    """Keeps what it is shown; with `units`, sites are written to the cache instead."""

    rows: slice
    sites: frozenset[str]
    kept: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    where: dict[str, Tensor] | None = None

    def save(self, layer: int, site: str, value: Tensor) -> None:
        self.kept[layer, site] = value.clone()

    def units(self) -> dict[str, Tensor] | None:
        return self.where


def places(model: Runner, rows: int, seed: int = 0) -> dict[str, Tensor]:
    """Units of blocks that no sequence has, in no order."""
    config = model.decoder.config
    unit = config.num_kv_heads * config.head_dim
    attended = config.num_heads * config.head_dim
    widths = (64, attended, 64, 2 * config.intermediate_size, attended, config.num_heads)
    free = torch.randperm(2 * 1000 * BLOCK, generator=torch.Generator().manual_seed(seed)).tolist()
    slots = 1064 * BLOCK  # of the cache
    free = [u + 64 * BLOCK if u < 1000 * BLOCK else u - 1000 * BLOCK + slots + 64 * BLOCK for u in free]
    where = {}
    for site, width in zip(SITES, widths, strict=True):
        per_row = -(-width // unit)
        where[site] = torch.tensor([[free.pop() for _ in range(per_row)] for _ in range(rows)])
    return where


def large_cache(model: Runner, dtype: torch.dtype = torch.float32) -> KVCache:
    c = model.decoder.config
    sizes = (c.num_layers, c.num_kv_heads, c.head_dim)
    return KVCache(*sizes, num_blocks=1064, block_size=BLOCK, dtype=dtype, device=CPU)


@pytest.mark.parametrize("sites", [SITES, ("input",), ("input", "residual", "query")])
@pytest.mark.parametrize("family", FAMILIES)
def test_taps_keep_what_the_operators_show(tmp_path: Path, family: str, sites: tuple[str, ...]) -> None:
    model = build_runner(tmp_path, family)
    rows, kv = slice(22, 31), large_cache(model)
    where = {site: units for site, units in places(model, 9).items() if site in sites}
    adapter = adapter_of(model, LoraConfig(r=5))
    shown = Recorder(rows, frozenset(sites))
    batch = sent(batch_of(PARTS), [adapter, None, adapter, None, None])
    batch = replace(batch, taps=[Recorder(rows, frozenset(sites), where=where)])
    assert runs_fused(model, batch, kv)
    model.forward(batch, kv)
    assert batch.taps[0].kept.keys() == {(2, "input")}
    last = batch.taps[0].kept[2, "input"]
    batch = replace(batch, taps=[shown])
    model.op_by_op().forward(batch, large_cache(model))
    assert_same(last, shown.kept.pop((2, "input")))
    assert shown.kept.keys() == {(layer, site) for layer in range(2) for site in sites}
    for (layer, site), expected in shown.kept.items():
        found = kv.rows[layer][where[site]].flatten(1)[:, : expected.shape[1]]
        assert_same(found, expected)


def test_taps_change_nothing(tmp_path: Path) -> None:
    model = build_runner(tmp_path)
    expected, kv = model.forward(batch_of(PARTS), model.cache()), large_cache(model)
    batch = batch_of(PARTS)
    taps = [
        Recorder(slice(0, 21), frozenset(SITES), where=places(model, 21)),
        Recorder(slice(22, 31), frozenset(), where={}),
    ]
    assert torch.equal(model.forward(replace(batch, taps=taps), kv), expected)
    shown = [Recorder(slice(0, 21), frozenset(SITES)), Recorder(slice(22, 31), frozenset())]
    by_operators = model.op_by_op()
    expected = by_operators.forward(batch, model.cache())
    assert torch.equal(by_operators.forward(replace(batch, taps=shown), model.cache()), expected)


def test_a_tap_that_must_see_all_runs_by_operators(tmp_path: Path) -> None:
    model = build_runner(tmp_path)
    batch = batch_of(PARTS)
    batch.taps = [Recorder(slice(0, 3), frozenset({"query"}))]
    assert not runs_fused(model, batch)
    model.forward(batch, model.cache())
    assert (1, "query") in batch.taps[0].kept
    batch.taps[0].where = {"query": places(model, 3)["query"]}
    assert not runs_fused(model, batch, large_cache(model, torch.int8))


# -- what is refused ----------------------------------------------------------------------------------------


def lora_of(width: int = 64, outs: int = 64, first: int = 0) -> Any:
    return native.LowRank(torch.zeros(2, width), [(torch.zeros(outs, 2), first, 1.0)])


def forward(model: Runner, **changed: Any) -> None:
    fused: Any = model.decoder.fused
    batch, kv = batch_of(PARTS[:1]), large_cache(model)
    cos, sin = model.decoder.rope.cos_sin(batch.positions)
    good = {
        "x": torch.zeros(21, 64),
        "kv": native.KV(kv.keys, kv.values, [], []),
        "cos": cos,
        "sin": sin,
        "slots": batch.slots,
        "spans": torch.tensor([[0, 21, 21, 0]], dtype=torch.int32),
        "blocks": torch.tensor(PARTS[0][2], dtype=torch.int32),
        "block_size": BLOCK,
        "bypasses": [(0, 21, [lora_of(), None, None, None] * 2)],
        "taps": [(0, 0, places(model, 21)["input"])],
        "qkv": None,
        "attend": None,
        "threads": 1,
    }
    fused._native.forward(**{**good, **changed})


def one_by_one(model: Runner) -> Any:
    """A cache whose values do not follow its keys."""
    kv = large_cache(model)
    return native.KV([k.clone() for k in kv.keys], [v.clone() for v in kv.values], [], [])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "first row": ({"bypasses": [(-1, 3, [None] * 8)]}, "bypasses: rows outside"),
    "last row": ({"bypasses": [(0, 22, [None] * 8)]}, "bypasses: rows outside"),
    "no rows": ({"bypasses": [(3, 3, [None] * 8)]}, "bypasses: rows outside"),
    "too few sites": ({"bypasses": [(0, 3, [None] * 7)]}, "bypasses: one for each"),
    "a's width": ({"bypasses": [(0, 3, [partial(lora_of, 32)] + [None] * 7)]}, "a: wrong width"),
    "b's columns": ({"bypasses": [(0, 3, [partial(lora_of, 64, 64, 128)] + [None] * 7)]}, "b: wrong shape"),
    "place": ({"taps": [(6, 0, torch.zeros(1, 2, dtype=torch.int64))]}, "taps: place"),
    "tapped rows": ({"taps": [(0, 20, torch.zeros(2, 2, dtype=torch.int64))]}, "taps: rows outside"),
    "tapped from": ({"taps": [(0, -1, torch.zeros(1, 2, dtype=torch.int64))]}, "taps: rows outside"),
    "units of a row": ({"taps": [(0, 0, torch.zeros(1, 3, dtype=torch.int64))]}, "taps: units: wrong shape"),
    "unit too high": ({"taps": [(0, 0, torch.full((1, 2), 2 * 1064 * BLOCK))]}, "taps: unit 8512 is outside"),
    "unit below 0": ({"taps": [(0, 0, torch.full((1, 2), -1))]}, "taps: unit -1 is outside"),
    "a cache in pieces": ({"kv": one_by_one}, "taps: a float32 cache"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_bypasses_and_taps_are_refused_by_name(tmp_path: Path, case: str) -> None:
    model = build_runner(tmp_path)
    forward(model)
    changed, words = REFUSED[case]
    changed = {key: value(model) if callable(value) else value for key, value in changed.items()}
    if "bypasses" in changed:
        first, end, loras = changed["bypasses"][0]
        loras = [lora() if callable(lora) else lora for lora in loras]
        changed = {"bypasses": [(first, end, loras)]}
    with pytest.raises(ValueError, match=words):
        forward(model, **changed)


@pytest.mark.parametrize(
    ("a", "b", "first", "words"),
    [
        ((3, 64), (64, 2), 0, "a: one row for each rank"),
        ((2, 64), (60, 2), 0, "parts: columns: not a multiple"),
        ((2, 64), (64, 2), 4, "parts: columns: not a multiple"),
        ((2, 64), (64, 2), -8, "parts: columns: not a multiple"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(
    a: tuple[int, int], b: tuple[int, int], first: int, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        native.LowRank(torch.zeros(a), [(torch.zeros(b), first, 1.0)])
