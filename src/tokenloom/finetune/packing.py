"""Which samples share a window."""

from __future__ import annotations

from collections.abc import Sequence

from tokenloom.errors import RequestError
from tokenloom.finetune.data import Sample


def pack(samples: Sequence[Sample], max_tokens: int, round_to: int = 1) -> list[list[int]]:
    """Plan which samples share a window of at most `max_tokens` tokens: first-fit decreasing.

    Each sample counts as a multiple of `round_to` tokens (it takes whole KV blocks), and so does the window.

    Segments of a packed batch never attend to one another, so packing needs no mask and changes no gradient.
    The plan depends on the lengths alone; equal lengths keep their order.

    Returns the indices of the samples in each window.

    Raises RequestError if a sample is longer than a window.
    """
    lengths = [-(-len(sample.tokens) // round_to) * round_to for sample in samples]
    limit = -(-max_tokens // round_to) * round_to
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    if order and lengths[order[0]] > limit:
        raise RequestError(
            f"sample {order[0]} has {len(samples[order[0]].tokens)} tokens, a window only {max_tokens}",
            param="max_seq_tokens",
        )
    windows: list[list[int]] = []
    leaves = 1
    while leaves < len(lengths):
        leaves *= 2
    room = [limit] * (2 * leaves)  # a tree of maxima over the windows finds the first fit in log n
    for index in order:
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= lengths[index] else 2 * node + 1
        if node - leaves == len(windows):
            windows.append([])
        windows[node - leaves].append(index)
        room[node] -= lengths[index]
        while node := node // 2:
            room[node] = max(room[2 * node], room[2 * node + 1])
    return windows
