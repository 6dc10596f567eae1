"""Adapters: bypass networks beside the frozen projections (LoRA, IA³, bottleneck), and PEFT's file format."""

from __future__ import annotations

from tokenloom.models.adapters.adapter import Adapter, AdapterConfig, AdapterError
from tokenloom.models.adapters.lora import LoraConfig
from tokenloom.models.adapters.sites import LINEARS, SITES, Dims

__all__ = ["LINEARS", "SITES", "Adapter", "AdapterConfig", "AdapterError", "Dims", "LoraConfig"]
