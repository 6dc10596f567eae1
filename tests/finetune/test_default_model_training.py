"""Training of the real default model beside PEFT, and the memory that it does not need."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from tokenloom.config import load_settings
from tokenloom.engine.engine import Engine
from tokenloom.finetune.data import Sample
from tokenloom.finetune.retained import slots_per_token
from tokenloom.models.adapters import Adapter, Dims, LoraConfig, save_adapter
from tokenloom.models.loader import open_model
from training_rig import gradients, our_name, random_sizes

TEXT = Path(transformers.__file__).read_text(encoding="utf-8")


@pytest.mark.default_model
def test_gradients_of_256_tokens_equal_peft(default_model: Path, tmp_path: Path) -> None:
    flags = {"model.dtype": "float32", "model.quantize": "none", "cache.kv_bytes": 128 * 2**20}
    engine = Engine(load_settings(flags))
    adapter = Adapter(LoraConfig(), Dims.of(engine.config), torch.float32, engine.device)
    noise = torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(0))
    adapter.flat.copy_(0.02 * noise)
    ids = engine.tokenizer.encode(TEXT)[:256]
    sample = Sample(ids, [0.0] + [1.0] * 255)
    loss, found = gradients(engine, adapter, [sample], random_sizes(0))

    save_adapter(adapter, tmp_path / "adapter", "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(
        str(default_model.parent), gguf_file=default_model.name, dtype=torch.float32
    )
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).eval()
    batch = torch.tensor([ids])
    expected = model(input_ids=batch, labels=batch).loss
    expected.backward()
    wanted = {our_name(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert found.keys() == wanted.keys()
    ours = torch.cat([found[name].flatten() for name in wanted]).double()
    theirs = torch.cat([wanted[name].flatten() for name in wanted]).double()
    cosine = float(ours @ theirs / (ours.norm() * theirs.norm()))
    assert cosine >= 0.99999
    assert float((ours - theirs).norm() / theirs.norm()) <= 1e-4


@pytest.mark.default_model
def test_kept_bytes_are_a_quarter_of_autograds(default_model: Path) -> None:
    """Counted at 1024 tokens, on tensors without memory: what autograd saves of the eager model."""
    config = open_model(str(default_model)).config
    hf: Any = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        tie_word_embeddings=True,
    )
    tokens, saved = 1024, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.device("meta"):
        base = transformers.AutoModelForCausalLM.from_config(hf, attn_implementation="eager")
        lora = peft.LoraConfig(r=16, lora_alpha=16, target_modules=sorted(LoraConfig().targets))
        model = peft.get_peft_model(base, lora)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = model(input_ids=ids).logits
        saved.pop(logits.untyped_storage()._cdata, None)
    autograd = sum(size for key, size in saved.items() if key not in weights)
    slot = 2 * config.num_kv_heads * config.head_dim * config.num_layers * 4
    kept = tokens * slots_per_token(config, "lean") * slot
    assert math.isclose(kept, tokens * 2112 * config.num_layers * 4)  # the sheet's count of numbers
    assert kept <= 0.25 * autograd
