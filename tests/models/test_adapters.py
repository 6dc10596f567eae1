"""Every bypass equals its formula and, backwards, what autograd makes of it; rows stay apart."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from adapter_models import CONFIGS, CPU, Runner, Sequence, random_adapter, random_ids
from tiny_models import build_tiny
from tokenloom.batch import BatchBuilder, SegmentKind
from tokenloom.kernels import Linear, get_kernels
from tokenloom.models.adapters import (
    LINEARS,
    SITES,
    Adapter,
    AdapterError,
    BottleneckConfig,
    Dims,
    Ia3Config,
    LoraConfig,
)

WIDTHS = dict(zip(LINEARS, (12, 6, 6, 10, 14, 14, 10), strict=True))
STARTS = dict(zip(LINEARS, (0, 12, 18, 0, 0, 14, 0), strict=True))
DIMS = Dims(
    num_layers=2,
    width_in={linear: {"o_proj": 12, "down_proj": 14}.get(linear, 10) for linear in LINEARS},
    rows={linear: slice(STARTS[linear], STARTS[linear] + WIDTHS[linear]) for linear in LINEARS},
)
PLACES = [
    (name, layer, site)
    for name, config in CONFIGS.items()
    for layer in range(2)
    for site in SITES
    if config.shapes(layer, site, DIMS)
]
# Scales of the LoRA configurations, worked out by hand: alpha / r, or alpha / sqrt(r).
SCALES = {
    "lora": lambda layer, linear: 5 / 3,
    "lora ranks": lambda layer, linear: {
        (0, "q_proj"): 6 / math.sqrt(2),
        (1, "q_proj"): 6 / math.sqrt(5),
        (0, "down_proj"): 6.0,
        (0, "v_proj"): 3 / 2,
        (1, "v_proj"): 7.5 / 2,
        (0, "up_proj"): 1 / 2,
        (1, "up_proj"): 1 / 2,
    }.get((layer, linear), 3.0),
    "lora subset": lambda layer, linear: 1.0,
    "lora by layer": lambda layer, linear: 1.5,
}


def formula(
    name: str, layer: int, site: str, named: dict[str, Tensor], x: Tensor, linear: Linear, keep: Tensor | None
) -> Tensor:
    """The site's output with the adapter, one linear at a time, from the papers."""
    outs = []
    for target in SITES[site]:
        weight, bias = linear.weight[DIMS.rows[target]], linear.bias[DIMS.rows[target]]
        mine = {key.split(f"{target}.", 1)[1]: value for key, value in named.items() if f"{target}." in key}
        y = x @ weight.T + bias
        if "lora_A.weight" in mine:
            dropped = x if keep is None else x * keep
            change = mine["lora_B.weight"] @ mine["lora_A.weight"]
            y = y + SCALES[name](layer, target) * dropped @ change.T
        elif "ia3_l" in mine and mine["ia3_l"].shape == (1, x.shape[1]):
            y = (x * mine["ia3_l"]) @ weight.T + bias
        elif "ia3_l" in mine:
            y = y * mine["ia3_l"].T
        elif mine:
            config = CONFIGS[name]
            act = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}[config.activation]
            inner = act(F.linear(y, mine["adapter_down.weight"], mine["adapter_down.bias"]))
            y = y + config.scale * F.linear(inner, mine["adapter_up.weight"], mine["adapter_up.bias"])
        outs.append(y)
    return torch.cat(outs, dim=1)


def strided(tensor: Tensor) -> Tensor:
    """The same values as a slice of something wider."""
    return F.pad(tensor, (3, 2))[:, 3:-2]


def at_site(site: str) -> tuple[Tensor, Linear, Tensor]:
    """Inputs, a biased stacked linear and a gradient of its output."""
    torch.manual_seed(3)
    width, out = DIMS.width_in[SITES[site][0]], DIMS.rows[SITES[site][-1]].stop
    linear = Linear(torch.randn(out, width).double(), torch.randn(out).double())
    return torch.randn(9, width).double(), linear, torch.randn(9, out).double()


def keep_for(name: str, x: Tensor) -> Tensor | None:
    return (torch.rand(x.shape) > 0.4).double() / 0.6 if name.startswith("lora") else None


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("name", "layer", "site"), PLACES)
def test_forward_equals_the_formula(name: str, layer: int, site: str, backend: str) -> None:
    adapter, kernels = random_adapter(CONFIGS[name], DIMS), get_kernels(backend)
    x, linear, _ = at_site(site)
    keep, bypass = keep_for(name, x), adapter.layers[layer][site]
    y = strided(x @ linear.weight.T + linear.bias)
    before = y.clone()
    bypass.forward(strided(x), y, linear, kernels, keep)
    named = adapter.config.tensors(layer, site, bypass.params)
    assert (y - formula(name, layer, site, named, x, linear, keep)).abs().max() <= 1e-12
    assert (y - before).abs().max() > 0.1


@pytest.mark.parametrize(("name", "layer", "site"), PLACES)
def test_backward_equals_autograd_and_adds_to_what_is_there(name: str, layer: int, site: str) -> None:
    adapter = random_adapter(CONFIGS[name], DIMS)
    bypass = adapter.layers[layer][site]
    x, linear, dy = at_site(site)
    keep = keep_for(name, x)
    names = list(adapter.config.tensors(layer, site, bypass.params))
    leaves = [t.clone() for t in adapter.config.tensors(layer, site, bypass.params).values()]
    leaves = [leaf.requires_grad_() for leaf in (*leaves, x.clone())]
    y = formula(name, layer, site, dict(zip(names, leaves, strict=False)), leaves[-1], linear, keep)
    *expected, expected_dx = torch.autograd.grad(y, leaves, dy)

    flat = torch.randn(adapter.flat.shape).double()
    already = flat.clone()
    dlinear, dx = bypass.backward(
        strided(dy), strided(x), linear, get_kernels("torch"), keep, adapter.views(flat)[layer][site]
    )
    total = dlinear @ linear.weight + (0 if dx is None else dx)
    assert (total - expected_dx).abs().max() <= 1e-10
    actual = adapter.config.tensors(layer, site, adapter.views(flat - already)[layer][site])
    for key, gradient in zip(names, expected, strict=True):
        assert gradient.abs().max() > 1e-3
        assert (actual[key] - gradient).abs().max() <= 1e-10, key


@pytest.mark.parametrize("name", list(CONFIGS))
def test_backward_leaves_its_inputs_alone(name: str) -> None:
    adapter = random_adapter(CONFIGS[name], DIMS)
    for site, bypass in adapter.layers[1].items():
        x, linear, dy = at_site(site)
        given = [t.clone() for t in (x, dy, linear.weight, linear.bias, adapter.flat)]
        grads = adapter.views(torch.zeros_like(adapter.flat))[1][site]
        bypass.backward(dy, x, linear, get_kernels("torch"), None, grads)
        assert all(
            torch.equal(t, was)
            for t, was in zip((x, dy, linear.weight, linear.bias, adapter.flat), given, strict=True)
        )


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_new_adapter_changes_nothing_but_can_learn(name: str) -> None:
    adapter = Adapter(CONFIGS[name], DIMS, torch.float64, CPU)
    adapter.init(seed=1)
    gradient = torch.zeros_like(adapter.flat)
    for layer, sites in enumerate(adapter.layers):
        for site, bypass in sites.items():
            x, linear, dy = at_site(site)
            y = x @ linear.weight.T + linear.bias
            before = y.clone()
            bypass.forward(x, y, linear, get_kernels("torch"), None)
            assert torch.equal(y, before)
            bypass.backward(dy, x, linear, get_kernels("torch"), None, adapter.views(gradient)[layer][site])
            assert any(view.abs().max() > 0 for view in adapter.views(gradient)[layer][site])


def test_the_same_seed_gives_the_same_new_adapter() -> None:
    first, again, other = (random_adapter(CONFIGS["lora"], DIMS) for _ in range(3))
    for adapter, seed in ((first, 1), (again, 1), (other, 2)):
        adapter.init(seed)
    assert torch.equal(first.flat, again.flat)
    assert not torch.equal(first.flat, other.flat)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_activations_in_half_precision_are_rounded_once(activation: str) -> None:
    config = BottleneckConfig(size=4, targets=("down_proj",), activation=activation)
    adapter = Adapter(config, DIMS, torch.bfloat16, CPU)
    down, _, up, _ = adapter.layers[0]["down"].params
    down[:, :4], up[:4] = torch.eye(4), torch.eye(4)
    y = torch.randn(50, 10, generator=torch.Generator().manual_seed(1)).bfloat16()
    act = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}[activation]
    expected = y[:, :4] + act(y[:, :4].float()).bfloat16()
    linear = Linear(torch.zeros(10, 14).bfloat16())
    adapter.layers[0]["down"].forward(torch.zeros(50, 14).bfloat16(), y, linear, get_kernels("torch"), None)
    assert torch.equal(y[:, :4], expected)


def four_sequences(dims: Dims) -> list[Sequence]:
    """One of the base model, and one of each kind."""
    return [
        Sequence(random_ids(11, seed=1)),
        Sequence(random_ids(6, seed=2), random_adapter(CONFIGS["lora ranks"], dims, seed=1)),
        Sequence(random_ids(9, seed=3), random_adapter(CONFIGS["ia3 inputs"], dims, seed=2)),
        Sequence(random_ids(4, seed=4), random_adapter(CONFIGS["bottleneck"], dims, seed=3)),
    ]


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_rows_of_different_adapters_share_a_batch(tmp_path: Path, backend: str) -> None:
    folder, _ = build_tiny(tmp_path, "qwen2")
    runner = Runner(folder, backend)
    sequences = four_sequences(Dims.of(runner.config))
    together = runner.logits(sequences, chunks=2)
    for sequence, mixed in zip(sequences, together, strict=True):
        alone = runner.logits([sequence])[0]
        assert (mixed - alone).abs().max() <= 1e-9
        base = runner.logits([Sequence(sequence.ids)])[0]
        assert sequence.adapter is None or (alone - base).abs().max() > 0.1


def test_on_the_reference_backend_rows_are_the_same_bits_whatever_shares_the_batch(tmp_path: Path) -> None:
    folder, _ = build_tiny(tmp_path, "llama")
    runner = Runner(folder, "reference")
    sequences = four_sequences(Dims.of(runner.config))
    for chunks in (1, 3):
        for order in (sequences, sequences[::-1]):
            for sequence, mixed in zip(order, runner.logits(order, chunks), strict=True):
                assert torch.equal(mixed, runner.logits([sequence])[0])


def test_neighbouring_segments_of_one_adapter_are_one_run_of_rows() -> None:
    first, second = (random_adapter(CONFIGS["ia3"], DIMS, seed=seed) for seed in (1, 2))
    builder = BatchBuilder(CPU)
    for adapter in (first, first, second, first):
        start = builder.add(
            SegmentKind.PREFILL, [1, 2], [0], kv_start=0, block_size=4, contiguous=True, logits="last"
        )
        builder.through(adapter.layers, start)
    runs = [(part.rows, part.layers) for part in builder.build().bypasses]
    assert runs == [(slice(0, 4), first.layers), (slice(4, 6), second.layers), (slice(6, 8), first.layers)]


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (LoraConfig, {"targets": ("qproj",)}, "targets: 'qproj'"),
        (LoraConfig, {"targets": ("x.q_proj",)}, "targets: 'x.q_proj'"),
        (Ia3Config, {"targets": ("lm_head",)}, "targets: 'lm_head'"),
        (Ia3Config, {"feedforward": ("q_proj",)}, "feedforward: 'q_proj' is not one of the targets"),
        (BottleneckConfig, {"targets": ("q_proj",)}, "targets: 'q_proj'"),
        (BottleneckConfig, {"size": 0}, "size: 0"),
        (BottleneckConfig, {"activation": "tanh"}, "activation: 'tanh'"),
    ],
)
def test_a_wrong_option_is_named(config: type, options: dict[str, object], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        config(**options)
