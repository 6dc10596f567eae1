"""Fields that say what an answer must look like: OpenAI's `response_format`, vLLM's `guided_*` and
`structured_outputs`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Strict, Tag

from tokenloom.config import LimitSettings
from tokenloom.errors import RequestError
from tokenloom.structured import Source, Structured

MAX_CHOICES = 4096


class TextFormat(BaseModel):
    type: Literal["text"]


class JSONObjectFormat(BaseModel):
    """Any JSON object."""

    type: Literal["json_object"]


class JSONSchema(BaseModel):
    """`strict`: keywords that cannot be enforced are refused; otherwise they are ignored."""

    name: str = Field(pattern="^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: Annotated[bool, Strict()] | None = None


class JSONSchemaFormat(BaseModel):
    type: Literal["json_schema"]
    json_schema: JSONSchema


def kind_of_format(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if isinstance(kind, str) else None


# Tags in angle brackets are left out of `error.param`.
ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JSONObjectFormat, Tag("<json_object>")]
    | Annotated[JSONSchemaFormat, Tag("<json_schema>")],
    Discriminator(
        kind_of_format,
        custom_error_type="response_format",
        custom_error_message="must be an object whose type is text, json_object or json_schema",
    ),
]


def _kind_of_schema(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<object>" if isinstance(value, dict) else None


AnySchema = Annotated[
    Annotated[dict[str, Any], Tag("<object>")] | Annotated[str, Tag("<text>")],
    Discriminator(
        _kind_of_schema,
        custom_error_type="schema_type",
        custom_error_message="must be a JSON schema, or its text",
    ),
]
Choices = Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]


class StructuredOutputs(BaseModel):
    """vLLM's object: exactly one of these."""

    model_config = ConfigDict(extra="forbid")

    json_: AnySchema | None = Field(None, alias="json")
    json_object: Annotated[bool, Strict()] | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None


class StructuredFields(BaseModel):
    """What chat and text completions say about the form of the answer; at most one of these."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: AnySchema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None

    @property
    def structured(self) -> tuple[Structured, dict[str, str]] | None:
        """What is asked for, with the field that asks for each part of it; None if any answer will do.

        Raises RequestError if more than one field does.
        """
        wanted = list(self._wanted())
        if len(wanted) > 1:
            fields = [next(iter(names.values())) for _, names in wanted]
            raise RequestError(f"{fields[1]}: cannot be combined with {fields[0]}", param=fields[1])
        return wanted[0] if wanted else None

    def structured_source(self, limits: LimitSettings) -> Source | None:
        """The grammar to compile for it. Raises RequestError naming the field that is at fault."""
        wanted = self.structured
        return None if wanted is None else wanted[0].source(limits, wanted[1])

    def _wanted(self) -> Iterator[tuple[Structured, dict[str, str]]]:
        form = self.response_format
        if isinstance(form, JSONObjectFormat):
            yield Structured(json_object=True), {"json_object": "response_format"}
        elif isinstance(form, JSONSchemaFormat):
            schema = form.json_schema
            yield (
                Structured(json=schema.schema_, strict=bool(schema.strict)),
                {"json": "response_format.json_schema.schema"},
            )
        outputs = self.structured_outputs
        if outputs is not None:
            kinds = ("json", "json_object", "regex", "choice", "grammar")
            names = {name: f"structured_outputs.{name}" for name in kinds}
            wanted = Structured(
                json=outputs.json_,
                json_object=bool(outputs.json_object),
                regex=outputs.regex,
                choice=outputs.choice,
                grammar=outputs.grammar,
            )
            yield wanted, {**names, "structured": "structured_outputs"}
        for name in ("json", "regex", "choice", "grammar"):
            value = getattr(self, f"guided_{name}")
            if value is not None:
                yield Structured(**{name: value}), {name: f"guided_{name}"}
