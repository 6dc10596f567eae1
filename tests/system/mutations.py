"""Mutations of valid files, as Hypothesis draws and shrinks them: bytes that are torn, JSON that is bent."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]

_NUMBERS = (
    0,
    1,
    2,
    7,
    8,
    127,
    128,
    255,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**63 - 1,
    2**64 - 1,
)
_MANY = 1 << 14
_VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "\0", "\ud800", "é", " ", "x" * 5000),
    *("../../etc/passwd", "/dev/zero", "%s%n", "{{ 7 * 7 }}"),
    *(0, -1, 1, 0.5, -0.0, 2**31, 2**63, 2**64, 10**400, 1e308, -1e308, float("inf"), float("nan"), 1e-320),
    *([], {}, [[]], [{}], {"": ""}, [None] * 300, {str(i): i for i in range(300)}),
)  # fmt: skip


@st.composite
def torn(draw: Draw, valid: bytes) -> bytes:
    """A file of which some bytes are changed, lost, doubled, moved, or read as other numbers."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        if draw(st.booleans()):
            at %= 4096  # where headers are
        length = draw(st.sampled_from((1, 2, 4, 8, 16, 100, 1000, _MANY)))
        match draw(st.integers(0, 7)):
            case 0:
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case 1:
                number = draw(st.sampled_from(_NUMBERS))
                width = draw(st.sampled_from((4, 8)))
                data[at : at + width] = (number % 256**width).to_bytes(width, "little")
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = data[at : at + length]
            case 4:
                data[at:at] = draw(st.binary(max_size=64))
            case 5:
                del data[at:]
            case 6:
                other = draw(st.integers(0, max(0, len(data) - 1)))
                data[at : at + length] = data[other : other + length]
            case 7:
                data[at:at] = (
                    draw(st.sampled_from((b"\0", b"\xff", b"\n", b"{", b"[", b'"', b"\\u"))) * length
                )
    return bytes(data)


@st.composite
def bent(draw: Draw, valid: Any) -> Any:
    """A JSON value in which some values are others, lost, doubled, or nested deeper."""
    root = [copy.deepcopy(valid)]
    for _ in range(draw(st.integers(1, 3))):
        holder: Any = root
        key: Any = 0
        while isinstance(holder[key], dict | list) and holder[key] and draw(st.integers(0, 3)):
            holder, key = holder[key], draw(st.sampled_from(_keys(holder[key])))
        match draw(st.integers(0, 5)):
            case 0 | 1:
                holder[key] = copy.deepcopy(draw(st.sampled_from(_VALUES)))
            case 2:
                holder[key] = draw(st.integers() | st.floats() | st.text(max_size=20))
            case 3 if holder is not root:
                del holder[key]
            case 4:
                depth = draw(st.sampled_from((1, 70, 250)))
                for _ in range(depth):
                    holder[key] = [holder[key]]
            case 5 if isinstance(holder[key], str):
                holder[key] *= draw(st.sampled_from((2, 100)))
    return root[0]


def bent_json(valid: Any) -> st.SearchStrategy[bytes]:
    """The text of one; NaN and infinities as Python writes them."""
    return bent(valid).map(lambda value: json.dumps(value).encode())


def _keys(value: Any) -> list[Any]:
    return list(value) if isinstance(value, dict) else list(range(len(value)))
