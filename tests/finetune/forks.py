"""Processes to be killed. They fork from one server, which has loaded all workers before."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext


def context() -> ForkServerContext:
    """The server is one per test run, so whoever starts it must name every worker; loading torch anew in each
    process would take longer than what is tested."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["crash_worker", "training_crash_worker"])
    return found
