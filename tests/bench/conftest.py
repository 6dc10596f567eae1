"""The scripts of benchmarks, and the servers of the tests of `serve`, can be imported here."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "serve")]
