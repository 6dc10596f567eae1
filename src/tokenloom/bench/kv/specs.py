"""Which methods are compared: specs, and the budgets put into them."""

from __future__ import annotations

import ast
import contextlib
from dataclasses import dataclass

from tokenloom.config import Settings
from tokenloom.errors import RequestError
from tokenloom.methods.kv import Combination, combine
from tokenloom.methods.registry import entries, parts_of

DENSE = "off"
GRID = (0.75, 0.5, 0.25, 0.125)


@dataclass(frozen=True)
class Candidate:
    """A spec to measure; `family` is the spec as it was given, `budget` what was put into it."""

    spec: str
    family: str
    budget: int | float | None = None

    def method(self) -> Combination | None:
        """Raises RequestError where the spec is wrong."""
        return combine(self.spec)


def candidates(specs: list[str], budgets: list[int | float]) -> list[Candidate]:
    """Dense attention, then every spec with every budget; a spec that names its budget, or has none, once.

    Raises:
        RequestError: a spec is wrong.
    """
    found = [Candidate(DENSE, DENSE)]
    for spec in specs:
        with_budgets = [Candidate(_with_budget(spec, b), spec, b) for b in budgets]
        takes_one = with_budgets and with_budgets[0].spec != spec
        found += with_budgets if takes_one else [Candidate(spec, spec)]
    for candidate in found:
        candidate.method()
    return list({candidate.spec: candidate for candidate in found}.values())


def default_specs() -> list[str]:
    """Every method that works alone."""
    names = []
    for entry in entries("kv"):
        with contextlib.suppress(RequestError):
            combine(entry.name)
            names.append(entry.name)
    return names


def parse_budgets(text: str) -> list[int | float]:
    """`64,0.25,12.5%` -> tokens, and parts of a prompt; `grid` -> those at which papers remove 25 to 87.5 %.

    Raises:
        RequestError: one is not a number.
    """
    if text.strip() == "grid":
        return list(GRID)
    try:
        return [_budget(item.strip()) for item in text.split(",") if item.strip()]
    except ValueError:
        raise RequestError(f"budget: {text!r} is not a list of numbers such as 64,0.25,12.5%") from None


def _budget(item: str) -> int | float:
    if item.endswith("%"):
        return float(item[:-1]) / 100
    return float(item) if "." in item else int(item)


def _with_budget(spec: str, budget: int | float) -> str:
    """`snapkv+adakv` -> `snapkv(budget=64)+adakv`: into the first method that has a budget."""
    try:
        tree = ast.parse(spec, mode="eval").body
    except SyntaxError:
        return spec  # whoever parses it says what is wrong
    if any(isinstance(node, ast.keyword) and node.arg == "budget" for node in ast.walk(tree)):
        return spec
    takers = {entry.name for entry in entries("kv") if "budget" in entry.knobs}
    for part in parts_of(tree):
        name = part.func if isinstance(part, ast.Call) else part
        if isinstance(name, ast.Name) and name.id in takers and part.end_col_offset is not None:
            end = part.end_col_offset
            if not isinstance(part, ast.Call):
                return f"{spec[:end]}(budget={budget}){spec[end:]}"
            comma = ", " if part.keywords else ""
            return f"{spec[: end - 1]}{comma}budget={budget}{spec[end - 1 :]}"
    return spec


def settings_for(candidate: Candidate, settings: Settings) -> Settings:
    """What an engine needs to run it: how keys and values are stored is a setting of the whole pool."""
    method = candidate.method()
    if method is None or not method.quantizes:
        return settings
    return settings.model_copy(update={"cache": settings.cache.model_copy(update={"dtype": "int8"})})
