"""Where a bypass can sit: the four projections of a layer, two of which are several linears stacked."""

from __future__ import annotations

from dataclasses import dataclass

from tokenloom.models.config import ModelConfig

SITES: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""Each site's linears, in the order in which they are stacked."""

LINEARS = tuple(linear for linears in SITES.values() for linear in linears)
MODULE = {
    linear: f"{'self_attn' if site in ('qkv', 'o') else 'mlp'}.{linear}"
    for site, linears in SITES.items()
    for linear in linears
}
"""Each linear's path below its layer, as in Hugging Face's models."""


@dataclass(frozen=True)
class Dims:
    """Widths of a model's linears.

    `width_in[linear]` and `rows[linear]` (its rows of the stacked output) for all seven.
    """

    num_layers: int
    width_in: dict[str, int]
    rows: dict[str, slice]

    @classmethod
    def of(cls, config: ModelConfig) -> Dims:
        d, ff = config.hidden_size, config.intermediate_size
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        outs = {"q_proj": q, "k_proj": kv, "v_proj": kv, "o_proj": d}
        outs |= {"gate_proj": ff, "up_proj": ff, "down_proj": d}
        width_in = {linear: {"o_proj": q, "down_proj": ff}.get(linear, d) for linear in LINEARS}
        rows: dict[str, slice] = {}
        for linears in SITES.values():
            start = 0
            for linear in linears:
                rows[linear] = slice(start, start + outs[linear])
                start += outs[linear]
        return cls(config.num_layers, width_in, rows)

    def width_out(self, linear: str) -> int:
        rows = self.rows[linear]
        return rows.stop - rows.start


def module_suffix(target: str) -> str:
    """`q_proj` and `3.q_proj` as the endings of module names by which PEFT finds them."""
    layer, _, linear = target.rpartition(".")
    return f"layers.{layer}.{MODULE[linear]}" if layer else linear
