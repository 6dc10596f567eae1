"""What both sides of `kv_vs_kvpress.py` have in common."""

from __future__ import annotations

from pathlib import Path


class Memory:
    """Peak resident bytes of this process above what it held when this was made. Linux only."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is the present again
        self.before = _status("VmRSS")

    def peak(self) -> int:
        return _status("VmHWM") - self.before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")
