"""A short run of `fuzz.py`, the same inputs each time: so that it works on the day that it is needed."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import strategies as st

from fuzz import fuzz, little_memory
from fuzz_targets import Target, all_targets

INPUTS = 12


def test_no_target_fails_on_a_few_mutations(tmp_path: Path) -> None:
    targets = all_targets(tmp_path)
    names = {target.name for target in targets}
    assert names == {
        *("gguf", "safetensors", "model_json", "adapter"),
        *("jsonl", "template", "multipart", "request"),
    }
    counts: Counter[str] = Counter()
    for target in targets:
        counts += fuzz(target, INPUTS, 0, tmp_path / "input")
    assert counts["refused"] > counts["taken"] > 0


@pytest.mark.parametrize("fault", [ValueError, MemoryError, RecursionError])
def test_an_error_that_is_not_ours_is_found_and_its_input_kept(
    tmp_path: Path, fault: type[Exception]
) -> None:
    def read(number: int) -> bool:
        if number > 10:
            raise fault
        return True

    with pytest.raises(fault):
        fuzz(Target("faulty", st.integers(0, 1000), read), 100, 0, tmp_path / "input")
    assert (tmp_path / "input").read_text() == "faulty: 11"
    assert (tmp_path / "first").is_file()


def test_an_input_that_takes_too_long_is_found(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="slow took"):
        fuzz(Target("slow", st.just(0), lambda _: True), 1, 0, tmp_path / "input", limit_s=0.0)


def test_memory_is_limited_within_and_not_after() -> None:
    with little_memory(2**28), pytest.raises(MemoryError):
        bytearray(2**30)
    assert len(bytearray(2**30)) == 2**30
