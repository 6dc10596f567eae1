"""Adapters: bypass networks beside the frozen projections (LoRA, IA³, bottleneck), and PEFT's file format."""

from __future__ import annotations

from tokenloom.models.adapters.adapter import Adapter, AdapterConfig, AdapterError
from tokenloom.models.adapters.bottleneck import BottleneckConfig
from tokenloom.models.adapters.ia3 import Ia3Config
from tokenloom.models.adapters.lora import LoraConfig
from tokenloom.models.adapters.peft_config import read_config
from tokenloom.models.adapters.peft_format import load_adapter, save_adapter
from tokenloom.models.adapters.sites import LINEARS, SITES, Dims

__all__ = [
    "LINEARS",
    "SITES",
    "Adapter",
    "AdapterConfig",
    "AdapterError",
    "BottleneckConfig",
    "Dims",
    "Ia3Config",
    "LoraConfig",
    "load_adapter",
    "read_config",
    "save_adapter",
]
