"""Rows of prompt tokens behind a frozen prefix, with gradients: plain torch, for PPD's training alone.

Prompt tokens never feed back into the text, so one pass over a text without gradients serves any number of
cuts: the rows of all cuts are extra queries that read the text's cached keys and values up to their cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenloom.batch import BatchBuilder, SegmentKind
from tokenloom.cache.block_pool import OutOfBlocks
from tokenloom.cache.block_table import BlockTable
from tokenloom.engine.engine import Engine
from tokenloom.errors import RequestError
from tokenloom.kernels import KVSpan, LayerWeights, Linear
from tokenloom.kernels.packed import dense
from tokenloom.kernels.torch_ops import TorchKernels

_ROWS = 512  # of one pass over a text


@dataclass(slots=True)
class Prefix:
    """What the frozen model made of a text of L tokens.

    hidden: `[L, d]`, the last hidden states, normalised. keys, values: of each layer, `[Hk, L, D]`.
    """

    hidden: Tensor
    keys: list[Tensor]
    values: list[Tensor]


def read(engine: Engine, tokens: Sequence[int], dtype: torch.dtype) -> Prefix:
    """Run the model over a text; keys and values in `dtype`.

    Raises:
        RequestError: the pool has too few blocks for it.
    """
    table, kv = BlockTable(engine.pool), engine.kv
    hidden = []
    try:
        table.grow(len(tokens))
        for start in range(0, len(tokens), _ROWS):
            builder = BatchBuilder(engine.device)
            builder.add(
                SegmentKind.PREFILL,
                list(tokens[start : start + _ROWS]),
                table.blocks,
                kv_start=start,
                block_size=engine.pool.block_size,
                contiguous=table.contiguous,
                logits="none",
            )
            batch = builder.build()
            hidden.append(engine.decoder.forward(batch, kv))
        return Prefix(torch.cat(hidden), *cached(engine, batch.spans[0], dtype))
    except OutOfBlocks:
        raise RequestError(f"tokens: the KV pool has no room for {len(tokens)} (cache.kv_bytes)") from None
    finally:
        table.clear()


def cached(engine: Engine, span: KVSpan, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Copies of a span's keys and values, of each layer `[Hk, L, D]`, for `Prefix`."""
    pairs = [span.read(engine.kv, layer) for layer in range(engine.config.num_layers)]
    keys = [k.to(dtype).transpose(0, 1).clone() for k, _ in pairs]
    return keys, [v.to(dtype).transpose(0, 1).clone() for _, v in pairs]


class Student:
    """The frozen model as a function of the prompt tokens' embeddings.

    Args:
        engine: whose weights these are; quantised ones are unpacked.
        dtype: of the products; norms, the residual stream and softmaxes are at least float32.
    """

    def __init__(self, engine: Engine, dtype: torch.dtype) -> None:
        decoder, self.dtype = engine.decoder, dtype
        self.config, self.rope = decoder.config, decoder.rope
        like = torch.empty(0, dtype=dtype, device=engine.device)
        self.layers = [_dense_layer(layer, like) for layer in decoder.layers]
        self.norm, self.head = decoder.norm, dense(decoder.head, like=like).to(dtype)
        self.wide = torch.promote_types(dtype, torch.float32)
        self._ops = TorchKernels()

    def logits(self, prompts: Tensor, cuts: Sequence[int], prefix: Prefix) -> Tensor:
        """What each prompt token of each cut says, in at least float32.

        Args:
            prompts: `[S, d]`.
            cuts: M of them: tokens of the text that the rows of a cut read.

        Returns:
            `[M, S, vocab_size]`.
        """
        count, (size, width) = len(cuts), prompts.shape
        ends = torch.tensor(cuts, device=prompts.device)
        positions = ends[:, None] + torch.arange(size, device=prompts.device)
        cos, sin = self.rope.cos_sin(positions.flatten())
        rotation = self._ops.rotation(cos, sin, self.wide)
        x = prompts.to(self.wide).expand(count, size, width).reshape(count * size, width)
        for layer, keys, values in zip(self.layers, prefix.keys, prefix.values, strict=True):
            x = self._layer(layer, x, rotation, positions, ends, keys, values)
        normed = F.rms_norm(x, (width,), self.norm.to(self.wide), self.config.rms_norm_eps)
        return F.linear(normed.to(self.dtype), self.head).to(self.wide).view(count, size, -1)

    def _layer(
        self,
        layer: LayerWeights,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        positions: Tensor,
        ends: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor:
        config = self.config
        heads, kv_heads, width, eps = (
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.rms_norm_eps,
        )
        qkv = self._linear(self._norm(x, layer.input_norm), layer.qkv)
        qkv = qkv.view(len(x), heads + 2 * kv_heads, width)
        q, k, v = qkv.to(self.wide).split((heads, kv_heads, kv_heads), dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = F.rms_norm(q, (width,), layer.q_norm.to(self.wide), eps)
            k = F.rms_norm(k, (width,), layer.k_norm.to(self.wide), eps)
        q, k = self._ops.rope(q, rotation), self._ops.rope(k, rotation)
        q, k, v = q.to(self.dtype), k.to(self.dtype), v.to(self.dtype)
        attended = _attend(q, k, v, keys, values, positions, ends, layer.window)
        x = x + self._linear(attended, layer.o)
        gate, up = self._linear(self._norm(x, layer.post_norm), layer.gate_up).chunk(2, dim=-1)
        return x + self._linear(F.silu(gate) * up, layer.down)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        normed = F.rms_norm(x, x.shape[-1:], weight.to(self.wide), self.config.rms_norm_eps)
        return normed.to(self.dtype)

    @staticmethod
    def _linear(x: Tensor, linear: Linear) -> Tensor:
        assert isinstance(linear.weight, Tensor)
        return F.linear(x, linear.weight, linear.bias)


def distances(
    engine: Engine, student: Student, vectors: Tensor, cuts: Sequence[int], prefix: Prefix
) -> tuple[Tensor, Tensor]:
    """KL divergence of each cut's prompt tokens from the model, `[M, S]`, and their own log-probabilities,
    `[M, S, vocab]`."""
    size, device = len(vectors), vectors.device
    rows = torch.tensor(cuts, device=device)[:, None] + torch.arange(size, device=device)
    needed, back = rows.unique(return_inverse=True)
    teacher = engine.decoder.logits(prefix.hidden[needed]).to(student.wide).log_softmax(-1).clone()
    said = student.logits(vectors, cuts, prefix).log_softmax(-1)
    return F.kl_div(said, teacher[back], log_target=True, reduction="none").sum(-1), said


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    ends: Tensor,
    window: int | None,
) -> Tensor:
    """Attention of M chains of S rows: each row reads its prefix, and its chain up to itself.

    Args:
        q: `[M * S, Hq, D]`; k, v: `[M * S, Hk, D]`. keys, values: `[Hk, L, D]`.
        positions: `[M, S]`, of the rows. ends: `[M]`, tokens of the prefix that a chain reads.

    Returns:
        `[M * S, Hq * D]`.
    """
    (count, size), (kv_heads, length, width) = positions.shape, keys.shape
    chains = q.view(count, size, kv_heads, -1, width)
    group = chains.shape[3]
    apart = chains.permute(2, 0, 1, 3, 4).reshape(kv_heads, -1, width)  # [Hk, M * S * G, D]
    far = torch.matmul(apart, keys.transpose(1, 2)).view(kv_heads, count, size, group, length)
    by_chain = chains.permute(2, 0, 1, 3, 4).reshape(kv_heads, count, size * group, width)
    own_k, own_v = (part.view(count, size, kv_heads, width).permute(2, 0, 1, 3) for part in (k, v))
    near = torch.matmul(by_chain, own_k.transpose(2, 3)).view(kv_heads, count, size, group, size)

    places = torch.arange(length, device=q.device)
    hidden = places >= ends[:, None, None]
    later = torch.arange(size, device=q.device)
    ahead = (later[None] > later[:, None])[None]
    if window is not None:
        hidden = hidden | (places <= positions[:, :, None] - window)
        ahead = ahead | (later[None] <= later[:, None] - window)[None]
    far = far.float() if q.dtype != torch.float64 else far
    scores = torch.cat((far, near.to(far.dtype)), dim=-1) * width**-0.5
    blind = torch.cat((hidden.expand(count, size, length), ahead.expand(count, size, size)), dim=-1)
    weights = scores.masked_fill(blind[None, :, :, None], -torch.inf).softmax(-1).to(q.dtype)
    from_far = torch.matmul(weights[..., :length].reshape(kv_heads, -1, length), values)
    from_near = torch.matmul(weights[..., length:].reshape(kv_heads, count, size * group, size), own_v)
    out = from_far.view(kv_heads, count, size, group, width) + from_near.view(
        kv_heads, count, size, group, width
    )
    return out.permute(1, 2, 0, 3, 4).reshape(count * size, -1)


def _dense_layer(layer: LayerWeights, like: Tensor) -> LayerWeights:
    def unpacked(linear: Linear) -> Linear:
        bias = None if linear.bias is None else linear.bias.to(like.dtype)
        return Linear(dense(linear.weight, like=like).to(like.dtype), bias)

    return LayerWeights(
        input_norm=layer.input_norm,
        qkv=unpacked(layer.qkv),
        q_norm=layer.q_norm,
        k_norm=layer.k_norm,
        o=unpacked(layer.o),
        post_norm=layer.post_norm,
        gate_up=unpacked(layer.gate_up),
        down=unpacked(layer.down),
        window=layer.window,
    )
