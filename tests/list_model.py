"""A Llama that is computed a row at a time, with attention left to a function: what KV methods are tested on.

Nothing here is shared with the engine: a method's paper can be written down again over plain Python lists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Attend = Callable[[int, int, Tensor, Tensor, Tensor], Tensor]
"""(layer, position, q `[Hq, D]`, k and v `[Hk, D]`) -> attention of the row, `[Hq, D]`."""


class ListModel:
    """Runs the weights of a transformers Llama in their own dtype."""

    def __init__(self, model: Any) -> None:
        self.config = model.config
        self.weights = model.state_dict()

    def logits(self, token: int, position: int, attend: Attend) -> Tensor:
        """Of the token after this one, `[V]`."""
        config, weights = self.config, self.weights
        head_dim = config.head_dim
        x = weights["model.embed_tokens.weight"][token]
        for layer in range(config.num_hidden_layers):
            name = f"model.layers.{layer}"
            normed = self._norm(x, f"{name}.input_layernorm.weight")
            q, k, v = (
                (weights[f"{name}.self_attn.{part}_proj.weight"] @ normed).view(-1, head_dim)
                for part in "qkv"
            )
            attended = attend(layer, position, self._rotate(q, position), self._rotate(k, position), v)
            x = x + weights[f"{name}.self_attn.o_proj.weight"] @ attended.flatten()
            normed = self._norm(x, f"{name}.post_attention_layernorm.weight")
            gate, up = (weights[f"{name}.mlp.{part}_proj.weight"] @ normed for part in ("gate", "up"))
            x = x + weights[f"{name}.mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)
        return weights["lm_head.weight"] @ self._norm(x, "model.norm.weight")

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean() + self.config.rms_norm_eps).sqrt() * self.weights[name]

    def _rotate(self, x: Tensor, position: int) -> Tensor:
        half = x.shape[-1] // 2
        theta = self.config.rope_parameters["rope_theta"]
        # Angles in float32, as the engine and transformers have them.
        angles = position * theta ** (-torch.arange(half, dtype=torch.float32) / half)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        low, high = x[:, :half], x[:, half:]
        return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)
