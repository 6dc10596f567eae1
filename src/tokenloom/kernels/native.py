"""The compiled kernels of `csrc/`, or None where the package was built without a C++ compiler."""

from __future__ import annotations

import importlib
from typing import Any

import torch  # first: the kernels run on the thread pool that comes with it

__all__ = ["native", "torch"]

native: Any
try:
    native = importlib.import_module("tokenloom._native")
except ImportError:
    native = None
