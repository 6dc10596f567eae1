"""A tiny engine to train on, and what transformers, PEFT and autograd make of the same samples."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from torch.nn import functional as F

from tiny_models import build_tiny
from tokenloom.batch import BatchBuilder
from tokenloom.config import load_settings
from tokenloom.engine.engine import Engine
from tokenloom.finetune.data import Sample
from tokenloom.finetune.objective import SupervisedFinetuning
from tokenloom.finetune.training_pass import Phase, TrainingPass
from tokenloom.models.adapters import Adapter, AdapterConfig, Dims, LoraConfig, save_adapter
from tokenloom.models.loader import ModelFiles, open_model

Size = Callable[[str, int], int]
"""(phase, rows left) -> how many of them the next window takes."""


class Rig:
    """One tiny model, in our engine and in transformers, both in float64."""

    def __init__(self, folder: Path, architecture: str = "llama", **overrides: Any) -> None:
        self.tmp = folder
        self.folder, self.hf = build_tiny(folder, architecture, num_hidden_layers=3, **overrides)
        for module in self.hf.modules():  # norms that do not round to float32
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = _norm.__get__(module)
        self.hf.set_attn_implementation("sdpa")
        self.files: ModelFiles = open_model(str(self.folder))

    def engine(self, **flags: Any) -> Engine:
        defaults = {"model.dtype": "float64", "cache.block_size": 4, "cache.kv_bytes": 8 * 2**20}
        keys = {key.replace("__", "."): value for key, value in flags.items()}
        return Engine(load_settings({**defaults, **keys}), self.files)

    def adapter(self, config: AdapterConfig | None = None, seed: int = 0) -> Adapter:
        """Random parameters, B included: with B = 0 the gradient of A would be zero."""
        dims = Dims.of(self.files.config)
        adapter = Adapter(config or LoraConfig(r=3, alpha=6.0), dims, torch.float64, torch.device("cpu"))
        noise = torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(seed)).double()
        adapter.flat.copy_(0.2 * noise + (adapter.config.kind == "ia3"))
        return adapter

    def peft(self, adapter: Adapter) -> Any:
        """The transformers model with the same adapter, to be trained."""
        save_adapter(adapter, self.tmp / "for-peft", "tiny")
        model = peft.PeftModel.from_pretrained(self.hf, self.tmp / "for-peft", is_trainable=True)
        return model.double().eval()

    def autograd(self, adapter: Adapter, samples: Sequence[Sample]) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients by our names."""
        model = self.peft(adapter)
        loss = reference_loss(model, samples)
        loss.backward()
        grads = {our_name(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.unload()
        return float(loss.detach()), grads


def reference_loss(model: Any, samples: Sequence[Sample]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        ids = torch.tensor(sample.tokens)[None]
        losses = F.cross_entropy(model(ids).logits[0, :-1].double(), ids[0, 1:], reduction="none")
        total = total + (losses * torch.tensor(sample.weights[1:], dtype=torch.float64)).sum()
    return total / total_weight(samples)


def our_name(name: str) -> str:
    return name.removeprefix("base_model.model.model.").replace(".default", "")


def total_weight(samples: Sequence[Sample]) -> float:
    return sum(sum(sample.weights) for sample in samples)


def random_samples(lengths: Sequence[int], seed: int = 0) -> list[Sample]:
    """Weights of 0, 0.5 and 1; the last token of each has one, so that every row counts."""
    source = random.Random(seed)
    return [
        Sample(
            [source.randrange(256) for _ in range(n)],
            [0.0, *(source.choice((0.0, 0.5, 1.0)) for _ in range(n - 2)), 1.0],
        )
        for n in lengths
    ]


def random_sizes(seed: int) -> Size:
    """One row, all that is left, or something in between."""
    source = random.Random(seed)
    return lambda phase, left: source.choice((1, left, source.randint(1, left)))


def whole(phase: str, left: int) -> int:
    return left


def run_pass(engine: Engine, training: TrainingPass, size: Size = whole) -> None:
    while training.phase is Phase.FORWARD:
        rows = size("forward", training.forward_left())
        builder = BatchBuilder(engine.device)
        training.add_rows(builder, rows)
        engine.decoder.forward(builder.build(), engine.kv)
        training.forward_done(rows)
    while training.phase is Phase.LOSS:
        training.run_loss(size("loss", training.losses_left()))
    while training.phase is Phase.BACKWARD:
        training.run_backward(size("backward", training.backward_left()))


def gradients(
    engine: Engine, adapter: Adapter, samples: Sequence[Sample], size: Size = whole, **options: Any
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one pass, by name; every block is given back."""
    flat, used = torch.zeros_like(adapter.flat), engine.pool.num_used
    options.setdefault("scale", 1 / total_weight(samples))
    training = TrainingPass(
        engine,
        adapter,
        samples,
        SupervisedFinetuning(),
        grads=flat,
        **options,
    )
    run_pass(engine, training, size)
    training.release()
    engine.pool.check()
    assert engine.pool.num_used == used
    return float(training.loss) / total_weight(samples), adapter.copy(flat).tensors()


def relative_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest difference over the largest value, of all tensors together."""
    assert found.keys() == wanted.keys()
    scale = max(float(tensor.abs().max()) for tensor in wanted.values())
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted) / scale


def _norm(self: Any, x: Tensor) -> Tensor:
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))
