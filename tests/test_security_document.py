"""SECURITY.md names tests that exist, at least one for each of the fifteen threats."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "SECURITY.md").read_text()
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
ROWS = re.findall(r"^\| (\d+) \|.*$", TEXT, re.MULTILINE)


def test_every_threat_has_a_defence_and_a_test() -> None:
    assert [int(number) for number in ROWS] == list(range(1, 16))
    for line in re.findall(r"^\| \d+ \|.*$", TEXT, re.MULTILINE):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert len(cells) == 4 and all(cells)
        assert TEST.search(cells[3]), f"threat {cells[0]} has no test"


def test_every_test_that_is_named_exists() -> None:
    named = TEST.findall(TEXT)
    assert len(named) > 40
    for path in {path for path, _ in named}:
        tree = ast.parse((ROOT / path).read_text())
        defined = {
            node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        missing = {name for other, name in named if other == path} - defined
        assert not missing, f"{path} has no {missing}"
