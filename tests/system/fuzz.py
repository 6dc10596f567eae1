"""Mutations of valid inputs, each in a limit of time and memory, until the time is up.

python tests/system/fuzz.py --seconds 300 [--seed 1] [--target gguf]

Ends with 1 if something other than our own errors came out, if an input took over `--limit` seconds of
computing, or more memory than there is to spare. What hangs for good, or crashes the interpreter, ends the
process with the traceback of all threads. The file that is named at the start holds the input at hand: at the
end, the smallest that fails; beside it, as `first`, the first one that failed.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import logging
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(path) for path in (TESTS, TESTS / "serve", TESTS / "models", TESTS / "system")]

from fuzz_targets import Target, all_targets  # noqa: E402 (found by the line above)

LIMIT_S = 10.0
SPARE_BYTES = 2 << 30
_ROUND = 100


@contextlib.contextmanager
def little_memory(spare_bytes: int = SPARE_BYTES) -> Iterator[None]:
    """Within, this process can take so many bytes more than it has."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + spare_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def fuzz(
    target: Target,
    examples: int,
    random_seed: int,
    record: Path,
    *,
    limit_s: float = LIMIT_S,
    ends: bool = False,
) -> Counter[str]:
    """How many inputs were taken and refused. Raises what a target raises, on the smallest input found.

    Args:
        record: the file that holds the input at hand.
        limit_s: of one input, in seconds of computing.
        ends: end the process if an input takes ten times as long by the clock, whatever holds it.
    """
    counts: Counter[str] = Counter()
    phases = (Phase.generate, Phase.shrink)

    @seed(random_seed)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def try_all(given_input: object) -> None:
        record.write_text(f"{target.name}: {given_input!r}")
        if ends:
            faulthandler.dump_traceback_later(10 * limit_s, exit=True)
        # Of this process's own time: others on the machine must not make it look slow.
        start = time.process_time()
        try:
            counts["taken" if target.read(given_input) else "refused"] += 1
            took = time.process_time() - start
            assert took < limit_s, f"{target.name} took {took:.1f} s"
        except Exception:
            first = record.with_name("first")
            if not first.exists():
                shutil.copy(record, first)
            raise

    with little_memory():
        try_all()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds of computing for one input")
    parser.add_argument("--target", action="append", help="may be repeated; all of them if left out")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    record = folder / "input"
    targets = [t for t in all_targets(folder) if not options.target or t.name in options.target]
    print(f"the input at hand is in {record}", flush=True)
    totals = {target.name: Counter[str]() for target in targets}
    end, number = time.monotonic() + options.seconds, options.seed
    while time.monotonic() < end:
        for target in targets:
            if time.monotonic() > end:
                break
            try:
                totals[target.name] += fuzz(target, _ROUND, number, record, limit_s=options.limit, ends=True)
            except Exception as error:
                error.__notes__ = []  # Hypothesis prints the input, which may be a whole file
                raise
        number += 1
    print(f"{'target':<14}{'inputs':>8}{'taken':>8}{'refused':>9}")
    for name, counts in totals.items():
        print(f"{name:<14}{counts.total():>8}{counts['taken']:>8}{counts['refused']:>9}")
    print(f"seeds {options.seed} to {number - 1}: no crash, no hang, no other error")


if __name__ == "__main__":
    faulthandler.enable()
    warnings.simplefilter("ignore")  # of numpy, about numbers that are none
    logging.disable()  # of libraries that tell of each malformed input
    main()
