"""One decoder for the Llama family: Llama, SmolLM2, Mistral, Qwen2 and Qwen3, on a packed batch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from tokenloom.batch import Batch
from tokenloom.cache.kv_cache import KVCache
from tokenloom.kernels import Kernels, LayerWeights, Linear, PackedWeight, num_bytes
from tokenloom.models.config import ModelConfig
from tokenloom.models.rope import Rope
from tokenloom.models.weight_loader import WeightLoader


class Decoder:
    """Weights plus the recipe that runs them.

    Args:
        config: the model's shape.
        load: reads its tensors, into the dtype and onto the device that activations have too.
        kernels: the compute backend.

    Raises:
        ModelError: a tensor is missing or has the wrong shape; the message names it.
    """

    def __init__(self, config: ModelConfig, load: WeightLoader, kernels: Kernels) -> None:
        self.config = config
        self.kernels = kernels
        self.dtype = load.dtype
        self.device = load.device
        self.rope = Rope(config.rope, config.head_dim, config.max_position, load.device)
        width, vocab = config.hidden_size, config.vocab_size
        self.embedding = load.matrix("model.embed_tokens.weight", (vocab, width))
        self.layers = [_load_layer(load, config, i) for i in range(config.num_layers)]
        self.norm = load("model.norm.weight", (width,))
        self.head = (
            self.embedding if config.tie_word_embeddings else load.matrix("lm_head.weight", (vocab, width))
        )
        self.fused = kernels.fuse(config, self.layers)

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: KVCache) -> Tensor:
        """Run the layers over the batch, appending its keys and values to `kv`.

        Returns:
            The last hidden states, normalised, `[T, hidden_size]`.
        """
        cos, sin = self.rope.cos_sin(batch.positions)
        x = self.embed(batch.tokens)
        for part in batch.overrides:
            x[part.rows] = part.vectors.to(x.dtype)
        attend = partial(self._attend, batch, kv) if batch.policies else None
        if self.fused is None or not self.fused(batch, kv, x, cos, sin, attend):
            x = self._layers(batch, kv, x, cos, sin)
        self._tap(batch, len(self.layers), "input", x)
        return self.kernels.rms_norm(x, self.norm, self.config.rms_norm_eps)

    def embed(self, tokens: Tensor) -> Tensor:
        """Rows of the embedding: int64 `[n]` -> `[n, hidden_size]`, a copy."""
        if isinstance(self.embedding, PackedWeight):
            return self.embedding.rows(tokens.cpu()).to(self.device, self.dtype)
        return self.embedding[tokens]

    def _layers(self, batch: Batch, kv: KVCache, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        kernels, config, eps = self.kernels, self.config, self.config.rms_norm_eps
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        rotation = kernels.rotation(cos, sin, self.dtype)
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
            attended = self._attend(batch, kv, i, qk[:, :heads])
            x = x + self._project(batch, i, "o", layer.o, attended.flatten(1))
            self._tap(batch, i, "residual", x)
            normed = kernels.rms_norm(x, layer.post_norm, eps)
            gate_up = self._project(batch, i, "gate_up", layer.gate_up, normed)
            self._tap(batch, i, "gate_up", gate_up)
            x = x + self._project(batch, i, "down", layer.down, kernels.silu_mul(gate_up))
        return x

    def _attend(self, batch: Batch, kv: KVCache, index: int, q: Tensor) -> Tensor:
        """Attention of a layer, q `[T, Hq, D]`: policies' rows first, then all that they leave."""
        window = self.layers[index].window
        if not batch.policies and not batch.tapped_spans:
            return self.kernels.attention(q, kv, index, batch.spans, window, batch.shared)
        left, chosen = [], []
        for part in batch.policies:
            rows = q[part.rows]
            attended = part.policy.attend(index, rows, part.cached)
            if attended is None and part.cached.blocks_apart:
                attended = part.cached.attend(index, rows)
            if attended is None:
                left.append(part.segment.span)
            else:
                chosen.append((part.rows, attended))
        spans = batch.plain_spans + left if left else batch.plain_spans
        if batch.tapped_spans:
            out, log_sums = self.kernels.attention_for_backward(q, kv, index, batch.tapped_spans, window)
            self._tap(batch, index, "attended", out)
            self._tap(batch, index, "log_sums", log_sums)
            if spans:
                others = self.kernels.attention(q, kv, index, spans, window, batch.shared)
                chosen += [(span.rows, others[span.rows]) for span in spans]
        elif not spans and len(chosen) == 1:
            return chosen[0][1]
        else:
            out = self.kernels.attention(q, kv, index, spans, window, batch.shared)
        for where, attended in chosen:
            out[where] = attended
        return out

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
        return sum(map(num_bytes, tensors))


def _load_layer(load: WeightLoader, config: ModelConfig, index: int) -> LayerWeights:
    prefix = f"model.layers.{index}"
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    width, ff = config.hidden_size, config.intermediate_size
    q_out, kv_out = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    head_norm = (config.head_dim,)
    return LayerWeights(
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
