"""One decoder for the Llama family: Llama, SmolLM2, Mistral, Qwen2 and Qwen3, on a packed batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenloom.batch import Batch
from tokenloom.cache.kv_cache import KVCache
from tokenloom.errors import ModelError
from tokenloom.kernels import Kernels, Linear
from tokenloom.models.config import ModelConfig
from tokenloom.models.rope import Rope
from tokenloom.models.weights import WeightSource


@dataclass(slots=True)
class Layer:
    """The weights of one decoder layer; q, k and v, and gate and up, are stacked to be read at once."""

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear
    window: int | None


class Decoder:
    """Weights plus the recipe that runs them.

    Args:
        config: the model's shape.
        weights: where its tensors come from.
        kernels: the compute backend.
        dtype, device: what the weights and activations are held in.

    Raises:
        ModelError: a tensor is missing or has the wrong shape; the message names it.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightSource,
        kernels: Kernels,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config = config
        self.kernels = kernels
        self.dtype = dtype
        self.device = device
        self.rope = Rope(config.rope, config.head_dim, config.max_position, device)
        load = _Loader(weights, dtype, device)
        width, vocab = config.hidden_size, config.vocab_size
        self.embedding = load("model.embed_tokens.weight", (vocab, width))
        self.layers = [_load_layer(load, config, i) for i in range(config.num_layers)]
        self.norm = load("model.norm.weight", (width,))
        self.head = self.embedding if config.tie_word_embeddings else load("lm_head.weight", (vocab, width))

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: KVCache) -> Tensor:
        """Run the layers over the batch, appending its keys and values to `kv`.

        Returns:
            The last hidden states, normalised, `[T, hidden_size]`.
        """
        kernels, config, eps = self.kernels, self.config, self.config.rms_norm_eps
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        rotation = kernels.rotation(*self.rope.cos_sin(batch.positions), self.dtype)
        x = self.embedding[batch.tokens]
        for i, layer in enumerate(self.layers):
            self._tap(batch, i, "input", x)
            normed = kernels.rms_norm(x, layer.input_norm, eps)
            qkv = self._project(batch, i, "qkv", layer.qkv, normed)
            qkv = qkv.view(-1, heads + 2 * kv_heads, head_dim)
            qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
            if layer.q_norm is not None and layer.k_norm is not None:
                q = kernels.rms_norm(qk[:, :heads], layer.q_norm, eps)
                k = kernels.rms_norm(qk[:, heads:], layer.k_norm, eps)
                qk = torch.cat((q, k), dim=1)
            qk = kernels.rope(qk, rotation)
            kv.write(i, batch.slots, qk[:, heads:], v)
            self._tap(batch, i, "query", qk[:, :heads])
            attended = kernels.attention(
                qk[:, :heads], kv.keys[i], kv.values[i], batch.spans, kv.block_size, layer.window
            )
            x = x + self._project(batch, i, "o", layer.o, attended.flatten(1))
            self._tap(batch, i, "residual", x)
            normed = kernels.rms_norm(x, layer.post_norm, eps)
            gate_up = self._project(batch, i, "gate_up", layer.gate_up, normed)
            self._tap(batch, i, "gate_up", gate_up)
            x = x + self._project(batch, i, "down", layer.down, kernels.silu_mul(gate_up))
        self._tap(batch, len(self.layers), "input", x)
        return kernels.rms_norm(x, self.norm, eps)

    def _project(self, batch: Batch, index: int, site: str, linear: Linear, x: Tensor) -> Tensor:
        """One frozen projection, and what adapters add to it."""
        y = self.kernels.linear(x, linear.weight, linear.bias)
        for part in batch.bypasses:
            bypass = part.layers[index].get(site)
            if bypass is not None:
                keep = part.keep(index, site, x.shape[1]) if part.keep is not None else None
                bypass.forward(x[part.rows], y[part.rows], linear, self.kernels, keep)
        return y

    @staticmethod
    def _tap(batch: Batch, index: int, site: str, value: Tensor) -> None:
        for tap in batch.taps:
            if site in tap.sites:
                tap.save(index, site, value[tap.rows].flatten(1))

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden `[M, hidden_size]`, as `forward` returns it -> logits `[M, vocab_size]`."""
        return self.kernels.linear(hidden, self.head)

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights, each counted once."""
        tensors = [self.embedding, self.norm] + ([] if self.head is self.embedding else [self.head])
        for layer in self.layers:
            tensors += [layer.input_norm, layer.post_norm]
            tensors += [t for t in (layer.q_norm, layer.k_norm) if t is not None]
            for linear in (layer.qkv, layer.o, layer.gate_up, layer.down):
                tensors += [linear.weight] + ([] if linear.bias is None else [linear.bias])
        return sum(t.numel() * t.element_size() for t in tensors)


class _Loader:
    """Loads tensors of expected shapes from one source."""

    def __init__(self, weights: WeightSource, dtype: torch.dtype, device: torch.device) -> None:
        self.weights, self.dtype, self.device = weights, dtype, device
        self.names = set(weights.names())

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self.names:
            raise ModelError(f"{self.weights.path}: tensor {name!r} is missing")
        found = self.weights.shape(name)
        if found != shape:
            raise ModelError(
                f"{self.weights.path}: tensor {name!r} has shape {list(found)}; the configuration says "
                f"{list(shape)}"
            )
        return self.weights.load(name, self.dtype, self.device)

    def stacked(self, prefix: str, parts: list[tuple[str, int]], width: int, bias: bool) -> Linear:
        """Several projections of one input as one, `[sum of outs, width]`, filled part by part."""
        outs = [out for _, out in parts]
        weight = torch.empty(sum(outs), width, dtype=self.dtype, device=self.device)
        stacked_bias = torch.empty(sum(outs), dtype=self.dtype, device=self.device) if bias else None
        row = 0
        for name, out in parts:
            weight[row : row + out] = self(f"{prefix}.{name}.weight", (out, width))
            if stacked_bias is not None:
                stacked_bias[row : row + out] = self(f"{prefix}.{name}.bias", (out,))
            row += out
        return Linear(weight, stacked_bias)


def _load_layer(load: _Loader, config: ModelConfig, index: int) -> Layer:
    prefix = f"model.layers.{index}"
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    width, ff = config.hidden_size, config.intermediate_size
    q_out, kv_out = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    head_norm = (config.head_dim,)
    return Layer(
        input_norm=load(f"{prefix}.input_layernorm.weight", (width,)),
        qkv=load.stacked(
            attention, [("q_proj", q_out), ("k_proj", kv_out), ("v_proj", kv_out)], width, config.qkv_bias
        ),
        q_norm=load(f"{attention}.q_norm.weight", head_norm) if config.qk_norm else None,
        k_norm=load(f"{attention}.k_norm.weight", head_norm) if config.qk_norm else None,
        o=load.stacked(attention, [("o_proj", width)], q_out, config.o_bias),
        post_norm=load(f"{prefix}.post_attention_layernorm.weight", (width,)),
        gate_up=load.stacked(mlp, [("gate_proj", ff), ("up_proj", ff)], width, config.mlp_bias),
        down=load.stacked(mlp, [("down_proj", width)], ff, config.mlp_bias),
        window=config.sliding_windows[index],
    )
