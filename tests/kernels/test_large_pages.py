"""Memory in large pages: what is taken is empty, aligned and nobody else's."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from tokenloom.kernels.large_pages import ARENA, LINE, room


def test_what_is_taken_is_zero_and_begins_a_cache_line() -> None:
    for size in (1, 63, 64, 1000, ARENA + 1):
        taken = room(size)
        assert taken.shape == (size,) and taken.dtype == torch.uint8
        assert taken.data_ptr() % LINE == 0 and not taken.any()


def test_nothing_is_given_twice() -> None:
    taken = [room(size) for size in (1, 100, ARENA // 2, ARENA // 2, ARENA, 7)]
    for i, one in enumerate(taken):
        one.fill_(i + 1)
    assert all(bool((one == i + 1).all()) for i, one in enumerate(taken))


def test_threads_do_not_get_the_same() -> None:
    taken: list[Tensor] = []

    def take() -> None:
        taken.extend(room(4096) for _ in range(200))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({one.data_ptr() for one in taken}) == len(taken) == 800


def test_nothing_takes_no_room() -> None:
    assert room(0).shape == (0,)
