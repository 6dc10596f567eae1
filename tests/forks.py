"""Processes to be killed. They fork from one server, which has loaded what is slow to load before."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext


def context() -> ForkServerContext:
    """The server is one per test run, so whoever starts it must name everything; loading torch anew in each
    process would take longer than what is tested. It knows the path of installed packages only: workers
    themselves, which lie beside their tests, it would leave out without a word."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(
        [
            "tokenloom.serve.batches",
            "tokenloom.serve.jobs",
            "tokenloom.finetune.local",
            "tokenloom.finetune.trainer",
        ]
    )
    return found
