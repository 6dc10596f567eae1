"""What an answer must look like, as a user says it, checked before anything is compiled."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from tokenloom.config import LimitSettings
from tokenloom.errors import RequestError

# JSON may be laid out as the model likes, but a model that is lost must not write spaces for ever.
WHITESPACE = r"[ \t\n\r]{0,32}"

JSONSchema = Mapping[str, Any] | bool


@dataclass(frozen=True)
class Source:
    """A grammar in llguidance's notation, and the request's field that it comes from."""

    text: str
    param: str


@dataclass(frozen=True)
class Structured:
    """What an answer must look like: exactly one of the first five.

    Attributes:
        json: a JSON schema (an object, its text, or a pydantic model class).
        json_object: any JSON object.
        regex: a regular expression that the whole answer matches; Rust's syntax, no look-around.
        choice: the answer is one of these strings.
        grammar: a Lark grammar as llguidance has it, or a GBNF grammar as llama.cpp has it (with `::=`).
            Lark's `&` and `~` are refused, even inside strings: these can take for ever to compile.
        strict: keywords of a schema that cannot be enforced are an error; otherwise they are ignored.
    """

    json: JSONSchema | str | type[BaseModel] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    strict: bool = True

    def source(self, limits: LimitSettings, params: Mapping[str, str] | None = None) -> Source:
        """The grammar to compile.

        Args:
            params: what a request calls these attributes, where it is not by their names.

        Raises:
            RequestError: none or several are given, or one is too large, too deep or not well-formed.
        """
        given = [
            name for name in ("json", "regex", "choice", "grammar") if getattr(self, name) is not None
        ] + (["json_object"] if self.json_object else [])
        names = {name: (params or {}).get(name, name) for name in given}
        if len(given) != 1:
            what = " and ".join(names.values()) or "nothing"
            param = next(iter(names.values()), (params or {}).get("structured", "structured"))
            raise RequestError(
                f"{param}: give exactly one of json, json_object, regex, choice and grammar, not {what}",
                param=param,
            )
        [(name, param)] = names.items()
        return Source(getattr(self, f"_{name}")(limits, param), param)

    def _json(self, limits: LimitSettings, param: str) -> str:
        schema: Any = self.json
        if isinstance(schema, type) and issubclass(schema, BaseModel):
            schema = schema.model_json_schema()
        elif isinstance(schema, str):
            _check_size(schema, limits, param)
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError):
                raise RequestError(f"{param}: is not valid JSON", param=param) from None
        return json_source(schema, limits, param, strict=self.strict)

    def _json_object(self, limits: LimitSettings, param: str) -> str:
        return json_source({"type": "object"}, limits, param)

    def _regex(self, limits: LimitSettings, param: str) -> str:
        _check_size(self.regex or "", limits, param)
        from llguidance import LLMatcher

        return LLMatcher.grammar_from_regex(self.regex or "")

    def _choice(self, limits: LimitSettings, param: str) -> str:
        choices = list(self.choice or ())
        if not choices or not all(isinstance(choice, str) for choice in choices):
            raise RequestError(f"{param}: must be a list of at least one string", param=param)
        lark = "start: " + " | ".join(quoted(choice) for choice in choices)
        _check_size(lark, limits, param)
        return lark

    def _grammar(self, limits: LimitSettings, param: str) -> str:
        grammar = self.grammar or ""
        _check_size(grammar, limits, param)
        if "::=" in grammar:
            from llguidance.gbnf_to_lark import any_to_lark

            try:
                grammar = any_to_lark(grammar)
            except Exception as error:  # a parser of its own, with whatever Python raises
                raise RequestError(f"{param}: is not valid GBNF: {str(error)[:200]}", param=param) from None
        for operator in "&~":
            if operator in grammar:
                raise RequestError(
                    f"{param}: {operator!r} is not allowed; in a string write it as \\x{ord(operator):02x}",
                    param=param,
                )
        return grammar


def json_source(schema: Any, limits: LimitSettings, param: str, *, strict: bool = True) -> str:
    """The grammar of a JSON schema. Raises RequestError if it is no schema, too large or too deep."""
    if not isinstance(schema, Mapping | bool):
        raise RequestError(f"{param}: must be a JSON schema: an object", param=param)
    return json.dumps({"grammars": [{"json_schema": checked_schema(schema, limits, param, strict=strict)}]})


def checked_schema(schema: JSONSchema, limits: LimitSettings, param: str, *, strict: bool) -> dict[str, Any]:
    """A schema that is neither too large nor too deep, with the options of its compilation in it."""
    if _is_deeper(schema, limits.max_grammar_depth):
        raise RequestError(
            f"{param}: is nested more than {limits.max_grammar_depth} levels deep", param=param
        )
    plain: Mapping[str, Any] = ({} if schema else {"enum": []}) if isinstance(schema, bool) else schema
    try:
        _check_size(json.dumps(plain, allow_nan=False), limits, param)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{param}: is not valid JSON ({error})", param=param) from None
    return {**plain, "x-guidance": {"whitespace_pattern": WHITESPACE, "lenient": not strict}}


def quoted(text: str) -> str:
    """A string of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def _check_size(text: str, limits: LimitSettings, param: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise RequestError(f"{param}: holds a lone surrogate, which is not text", param=param) from None
    if size > limits.max_grammar_bytes:
        raise RequestError(
            f"{param}: has {size} bytes; at most {limits.max_grammar_bytes} are allowed", param=param
        )


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether arrays and objects are nested deeper than this, without recursion."""
    inside = [value]
    for _ in range(levels + 1):
        nested = [item for item in inside if isinstance(item, Mapping | list | tuple)]
        if not nested:
            return False
        inside = [x for item in nested for x in (item.values() if isinstance(item, Mapping) else item)]
    return True
