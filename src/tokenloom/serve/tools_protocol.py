"""Tools as requests bring them, and calls as answers hold them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Strict, Tag

MAX_TOOLS = 128
FunctionName = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class FunctionDefinition(BaseModel):
    """`parameters` is the JSON schema of the arguments, by default of none. `strict`: calls always fit it."""

    model_config = ConfigDict(extra="allow")

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Annotated[bool, Strict()] | None = None


class Tool(BaseModel):
    """A function that the model may call. Other fields are shown to the model's chat template."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(BaseModel):
    name: FunctionName


class NamedTool(BaseModel):
    """The function that must be called."""

    type: Literal["function"]
    function: NamedFunction


def _kind_of_choice(value: Any) -> str | None:
    return "<word>" if isinstance(value, str) else "<tool>" if isinstance(value, dict | NamedTool) else None


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")] | Annotated[NamedTool, Tag("<tool>")],
    Discriminator(
        _kind_of_choice,
        custom_error_type="tool_choice",
        custom_error_message="must be none, auto, required or an object that names a function",
    ),
]
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]


class FunctionCall(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call of a function; `arguments` is JSON as the model wrote it."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class FunctionDelta(BaseModel):
    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(BaseModel):
    """What a call gained: the first one of each `index` has the id and the name."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta
