"""Values that a field of OpenAI's API may have, made from the types of the installed `openai` client."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union

import typing_extensions

MAX_SAMPLES = 12
WRONG: tuple[Any, ...] = ({"?": [None]}, [[[None]]])
"""Values of which no field has both: whoever takes them all does not look at the field."""

_SCALARS: dict[Any, Any] = {bool: True, int: 2, float: 0.5, str: "a", object: "a", Any: "a"}
_WRAPPERS = (
    typing_extensions.Required,
    typing_extensions.NotRequired,
    typing_extensions.Annotated,
    typing.Annotated,
)
_ARRAYS = (list, typing.Sequence, Iterable, typing.Iterable)


def fields_of(params: type) -> dict[str, Any]:
    """Fields of a TypedDict of parameters with their types, required ones first."""
    hints = typing_extensions.get_type_hints(params, include_extras=True)
    return dict(sorted(hints.items(), key=lambda item: (not _is_required(params, item[1]), item[0])))


def _is_required(params: Any, hint: Any) -> bool:
    # The class's own list of them is empty: its annotations are strings.
    origin = typing.get_origin(hint)
    if origin in (typing_extensions.Required, typing_extensions.NotRequired):
        return origin is typing_extensions.Required
    return bool(params.__total__)


def samples(hint: Any, depth: int = 0) -> list[Any]:
    """Some values of a type: one for each alternative, at most MAX_SAMPLES; none if it nests too deeply."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _SCALARS:
        return [_SCALARS[hint]]
    if depth > 6:
        return []
    if origin in _WRAPPERS or hasattr(hint, "__metadata__"):
        return samples(arguments[0], depth)
    if origin in (Literal, typing_extensions.Literal):
        return list(arguments)
    if origin in (Union, types.UnionType):
        lists = [samples(argument, depth + 1) for argument in arguments if argument is not type(None)]
        return _unique(value for values in lists for value in values)[:MAX_SAMPLES]
    if typing_extensions.is_typeddict(hint):
        return _objects(hint, depth)
    if origin in (dict, Mapping):
        return [{"1": value} for value in samples(arguments[1], depth + 1)[:1]]
    if origin is not None and arguments:
        return [[value] for value in samples(arguments[0], depth + 1)]
    return []


def _objects(hint: type, depth: int) -> list[Any]:
    """The required keys; where there are none, each key alone."""
    hints = fields_of(hint)
    required = [name for name in hints if _is_required(hint, hints[name])]
    values = {name: samples(hints[name], depth + 1) for name in hints}
    if not required:
        return [{name: found[0]} for name, found in values.items() if found][:MAX_SAMPLES]
    if any(not values[name] for name in required):
        return []
    return [{name: values[name][0] for name in required}]


def _unique(values: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if not any(value == other and type(value) is type(other) for other in found):
            found.append(value)
    return found
