"""Training through frozen weights in 8 and 4 bits: the gradient is that of the numbers they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tokenloom.engine.engine import Engine
from tokenloom.kernels import PackedWeight, dense, native
from tokenloom.models.adapters import Adapter, AdapterConfig, BottleneckConfig, Dims, Ia3Config, LoraConfig
from training_rig import Rig, gradients, random_samples, random_sizes

SAMPLES = random_samples([23, 9])
CONFIGS: dict[str, AdapterConfig] = {
    "lora": LoraConfig(r=3, alpha=6.0),
    "ia3": Ia3Config(),
    "bottleneck": BottleneckConfig(size=4),
}


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    return Rig(tmp_path_factory.mktemp("tiny"), hidden_size=64, intermediate_size=96)


def replace_packed(engine: Engine) -> int:
    """Put the numbers in the packed weights' place; how many there were."""
    decoder, count = engine.decoder, 0
    for layer in decoder.layers:
        for linear in (layer.qkv, layer.o, layer.gate_up, layer.down):
            count += isinstance(linear.weight, PackedWeight)
            linear.weight = dense(linear.weight).to(engine.dtype)
    decoder.embedding, decoder.head = (dense(w).to(engine.dtype) for w in (decoder.embedding, decoder.head))
    return count


def flat(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([grads[name].flatten().double() for name in sorted(grads)])


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("quantize", ["q8", "q4"])
def test_gradients_are_those_of_the_numbers(rig: Rig, kind: str, quantize: str) -> None:
    packed, plain = (rig.engine(model__quantize=quantize, model__backend="torch") for _ in range(2))
    assert replace_packed(plain) == 12
    adapter = rig.adapter(CONFIGS[kind])
    found, wanted = (gradients(engine, adapter, SAMPLES, random_sizes(3)) for engine in (packed, plain))
    assert found[0] == pytest.approx(wanted[0], rel=1e-12)
    torch.testing.assert_close(flat(found[1]), flat(wanted[1]), rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(native is None, reason="the native kernels were not built")
def test_native_kernels_give_that_gradient_up_to_rounded_activations(rig: Rig) -> None:
    engine = rig.engine(model__quantize="q8", model__backend="cpu", model__dtype="float32")
    exact = rig.engine(model__quantize="q8", model__backend="torch")
    adapter = Adapter(LoraConfig(r=3, alpha=6.0), Dims.of(engine.config), torch.float32, torch.device("cpu"))
    adapter.flat.copy_(rig.adapter().flat)
    found = flat(gradients(engine, adapter, SAMPLES, random_sizes(4))[1])
    wanted = flat(gradients(exact, rig.adapter(), SAMPLES, random_sizes(4))[1])
    assert float(found @ wanted / (found.norm() * wanted.norm())) > 0.98


@pytest.mark.skipif(native is None, reason="the native kernels were not built")
@pytest.mark.parametrize("retain", ["lean", "fast", "ckpt"])
def test_a_forward_in_one_call_gives_the_operators_gradient(rig: Rig, retain: str) -> None:
    """Up to an activation here and there that the two round differently."""
    adapter = Adapter(
        LoraConfig(r=3, alpha=6.0), Dims.of(rig.files.config), torch.float32, torch.device("cpu")
    )
    adapter.flat.copy_(rig.adapter().flat)
    grads = []
    for is_fused in (True, False):
        engine = rig.engine(model__quantize="q8", model__backend="cpu", model__dtype="float32")
        assert engine.decoder.fused is not None
        if not is_fused:
            engine.decoder.fused = None
        grads.append(flat(gradients(engine, adapter, SAMPLES, random_sizes(4), retain=retain)[1]))
    found, wanted = grads
    assert float(found @ wanted / (found.norm() * wanted.norm())) > 0.999


def test_a_cache_of_8_bits_is_refused(rig: Rig, tmp_path: Path) -> None:
    from test_trainer import Listener, trainer

    from tokenloom.errors import RequestError

    engine = rig.engine(cache__dtype="int8")
    with pytest.raises(RequestError, match=r"cache\.dtype"):
        trainer(engine, rig.adapter(), Listener())
