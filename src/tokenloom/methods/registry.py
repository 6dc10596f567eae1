"""Methods by name, and the specs that ask for them: `snapkv(budget=1024)+pyramid(beta=20)`."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from tokenloom.errors import RequestError

T = TypeVar("T", bound=type)

MAX_SPEC_CHARACTERS = 1000

# What a knob may be.
_KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a word", tuple: "a list"}


@dataclass(frozen=True, slots=True)
class Entry:
    """What the registry knows of a method.

    `make` is a dataclass whose fields are the method's knobs; their defaults are the paper's if it has any.
    """

    name: str
    hook: str
    title: str
    arxiv: str
    claim: str
    make: Any

    @property
    def knobs(self) -> dict[str, Any]:
        """Names of the knobs, and their defaults."""
        return {
            f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            for f in dataclasses.fields(self.make)
        }


_entries: dict[tuple[str, str], Entry] = {}


def method(name: str, *, hook: str, title: str, claim: str, arxiv: str = "") -> Callable[[T], T]:
    """Register the dataclass that this decorates.

    Args:
        name: in specs; hook: the request field in which it may be named.
        title: of the paper, or what the method is called; claim: in one line, what it promises.
        arxiv: the paper's id, where it has one.

    Raises:
        ValueError: the hook has a method of that name.
    """

    def register(cls: T) -> T:
        if (hook, name) in _entries:
            raise ValueError(f"{hook} has a method {name!r} already")
        _entries[hook, name] = Entry(name, hook, title, arxiv, claim, cls)
        return cls

    return register


def entries(hook: str | None = None) -> list[Entry]:
    """All methods, or those of one hook, by name."""
    found = [entry for entry in _entries.values() if hook in (None, entry.hook)]
    return sorted(found, key=lambda entry: (entry.hook, entry.name))


def parse(spec: str, hook: str) -> list[tuple[Entry, Any]]:
    """The methods that a spec names, in its order, made with its knobs. An empty spec, or `off`, names none.

    Raises:
        RequestError: (param: the hook) the spec cannot be read, or names what does not exist, or a knob's
            value is refused.
    """
    if spec.strip() in ("", "off"):
        return []
    if len(spec) > MAX_SPEC_CHARACTERS:
        raise RequestError(f"{hook}: longer than {MAX_SPEC_CHARACTERS} characters", param=hook)
    try:
        tree = ast.parse(spec.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise RequestError(
            f"{hook}: {spec!r} cannot be read; write it like name(knob=1, other=0.5)+name", param=hook
        ) from None
    return [_make(part, hook) for part in parts_of(tree)]


def parts_of(tree: ast.expr) -> list[ast.expr]:
    """What stands between the plus signs."""
    parts = []
    while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        parts.append(tree.right)
        tree = tree.left
    return [tree, *reversed(parts)]


def _make(part: ast.expr, hook: str) -> tuple[Entry, Any]:
    name = part.func if isinstance(part, ast.Call) else part
    if not isinstance(name, ast.Name) or (isinstance(part, ast.Call) and part.args):
        raise RequestError(
            f"{hook}: {ast.unparse(part)!r} is not a method; write it like name(knob=1, other=0.5)",
            param=hook,
        )
    entry = _entries.get((hook, name.id))
    if entry is None:
        known = ", ".join(e.name for e in entries(hook))
        raise RequestError(f"{hook}: no method {name.id!r}; there are {known}", param=hook)
    knobs: dict[str, Any] = {}
    for keyword in part.keywords if isinstance(part, ast.Call) else ():
        if keyword.arg not in entry.knobs:
            known = ", ".join(entry.knobs) or "none"
            raise RequestError(f"{hook}: {name.id} has no knob {keyword.arg!r}; it has {known}", param=hook)
        knobs[keyword.arg] = _value(keyword.value, entry, keyword.arg)
    try:
        return entry, entry.make(**knobs)
    except ValueError as error:
        raise RequestError(f"{hook}: {name.id}: {error}", param=hook) from error


def _value(node: ast.expr, entry: Entry, knob: str) -> Any:
    """A literal, or a bare word, which is a string; it must be of the same kind as the knob's default."""
    try:
        value = node.id if isinstance(node, ast.Name) else ast.literal_eval(node)
    except (ValueError, TypeError):
        value = None
    value = tuple(value) if isinstance(value, list) else value
    default = entry.knobs[knob]
    kind = float if knob == "budget" else type(default)
    if type(value) not in ((int, float) if kind is float else (kind,)):
        expected = _KINDS[kind]
        raise RequestError(
            f"{entry.hook}: {entry.name}: {knob} must be {expected}, not {ast.unparse(node)}",
            param=entry.hook,
        )
    return value


def spec_of(entry: Entry, made: Any) -> str:
    """The spec of one method with every knob written out: equal methods have equal ones."""
    knobs = ", ".join(f"{f.name}={getattr(made, f.name)!r}" for f in dataclasses.fields(made))
    return f"{entry.name}({knobs})"
