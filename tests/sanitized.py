"""A pytest plugin for `make sanitize`: tests run on the extension in build/sanitize, not the usual one."""

import importlib.util
import sys
from pathlib import Path

import torch  # noqa: F401 (first: the kernels run on the thread pool that comes with it)

FOLDER = Path(__file__).parents[1] / "build" / "sanitize"

found = list(FOLDER.glob("_native*.so"))
if len(found) != 1:
    raise SystemExit(f"{FOLDER}: one compiled extension expected, {len(found)} found; see what cmake said")
spec = importlib.util.spec_from_file_location("tokenloom._native", found[0])
assert spec is not None and spec.loader is not None
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module  # `tokenloom.kernels.native` imports it by this name
spec.loader.exec_module(module)
