"""Bodies of requests and answers that routes share.

Unknown fields are ignored, as OpenAI's clients expect. Fields that would change the answer but are not
supported are refused by name. Numbers and booleans are not coerced from strings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    AllowInfNan,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    FailFast,
    Field,
    Strict,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticKnownError

from tokenloom.engine.sampling_params import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_N, MAX_STOP_STRINGS
from tokenloom.errors import RequestError
from tokenloom.methods.registry import MAX_SPEC_CHARACTERS
from tokenloom.serve.response_format import StructuredFields

MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 256
MAX_PROMPT_TOKENS = 2**20


class StopAtFirst(FailFast):
    """Report the first bad item of an array, not all; hashable, so that the array can be in a union."""

    __hash__ = object.__hash__


def at_most(entries: int) -> BeforeValidator:
    """Refuse an object with more entries before any of them is looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > entries:
            context = {"field_type": "Object", "max_length": entries, "actual_length": len(value)}
            raise PydanticKnownError("too_long", context)
        return value

    return BeforeValidator(check)


Integer = Annotated[int, Strict()]
Number = Annotated[float, Strict(), AllowInfNan(False)]
Flag = Annotated[bool, Strict()]
TokenId = Annotated[int, Strict(), Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], StopAtFirst(), Field(max_length=MAX_PROMPT_TOKENS)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
    at_most(16),
]
ModelName = Annotated[str, Field(min_length=1, max_length=256)]


# Alternatives are told apart by a look at the first item: trying each of them on a long array would be slow
# and answer with an error for every item. The tags in angle brackets are left out of `error.param`.
def _kind_of_prompt(value: Any) -> str | None:
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    return "<texts>" if isinstance(first, str) else "<lists>" if isinstance(first, list) else "<tokens>"


Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], StopAtFirst(), Field(min_length=1), Tag("<texts>")]
    | Annotated[TokenIds, Tag("<tokens>")]
    | Annotated[list[TokenIds], StopAtFirst(), Tag("<lists>")],
    Discriminator(
        _kind_of_prompt,
        custom_error_type="prompt_type",
        custom_error_message="must be a string, an array of strings, an array of token ids, or an array "
        "of such arrays",
    ),
]


def _kind_of_stop(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<texts>" if isinstance(value, list) else None


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stop = Annotated[
    Annotated[StopString, Tag("<text>")]
    | Annotated[list[StopString], StopAtFirst(), Field(max_length=MAX_STOP_STRINGS), Tag("<texts>")],
    Discriminator(
        _kind_of_stop,
        custom_error_type="stop_type",
        custom_error_message="must be a string or an array of strings",
    ),
]


def _token_key(key: str) -> str:
    if not (key.isascii() and key.isdecimal() and len(key) < 10):
        raise RequestError(f"logit_bias: keys must be token ids, not {key[:32]!r}", param="logit_bias")
    return key


BiasKey = Annotated[
    str, AfterValidator(_token_key), WithJsonSchema({"type": "string", "pattern": "^[0-9]{1,9}$"})
]
Bias = Annotated[float, Strict(), AllowInfNan(False), Field(ge=-100, le=100)]


class RequestBody(BaseModel):
    """A request that refuses what it cannot do rather than ignoring it."""

    model_config = ConfigDict(extra="ignore")

    # Field names to the values, besides null, that ask for nothing.
    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, body: Any) -> Any:
        if isinstance(body, dict):
            for name, neutral in cls.refused.items():
                value = body.get(name)
                if value is not None and value not in neutral:
                    raise RequestError(
                        f"{name}: is not supported by this server", param=name, code="unsupported_parameter"
                    )
        return body


class StreamOptions(BaseModel):
    """`include_usage` adds a last chunk with the usage of the whole request."""

    include_usage: Flag | None = None


class SamplingFields(StructuredFields, RequestBody):
    """What chat and text completions have in common. The second half extends OpenAI's API."""

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "use_beam_search": (False,),
        "length_penalty": (1,),
        "logits_processors": ([],),
        "bad_words": ([],),
        "allowed_token_ids": (),
        "truncate_prompt_tokens": (),
    }

    model: ModelName
    temperature: Number | None = Field(None, ge=0, le=2)
    top_p: Number | None = Field(None, gt=0, le=1)
    n: Integer | None = Field(None, ge=1, le=MAX_N)
    stop: Stop | None = None
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    logit_bias: (
        Annotated[dict[BiasKey, Bias], Field(max_length=MAX_LOGIT_BIAS), at_most(MAX_LOGIT_BIAS)] | None
    ) = None
    seed: Integer | None = Field(None, ge=-(2**63), le=2**64 - 1)
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512)

    top_k: Integer | None = Field(None, ge=0, lt=2**31)
    min_p: Number | None = Field(None, ge=0, lt=1)
    repetition_penalty: Number | None = Field(None, gt=0)
    min_tokens: Integer | None = Field(None, ge=0, lt=2**31)
    ignore_eos: Flag | None = None
    stop_token_ids: Annotated[list[TokenId], StopAtFirst(), Field(max_length=MAX_STOP_TOKEN_IDS)] | None = (
        None
    )
    include_stop_str_in_output: Flag | None = None
    skip_special_tokens: Flag | None = None
    prompt_logprobs: Integer | None = Field(None, ge=0, le=MAX_LOGPROBS)
    priority: Integer | None = Field(None, ge=-(2**31), lt=2**31)
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    kv: str | None = Field(None, max_length=MAX_SPEC_CHARACTERS)
    draft: str | None = Field(None, max_length=MAX_SPEC_CHARACTERS)
    compress_upto: Integer | None = Field(None, ge=1, lt=2**31)

    @model_validator(mode="after")
    def _check_streaming(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options: needs stream to be true", param="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs: cannot be streamed", param="prompt_logprobs")
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class CachedTokens(BaseModel):
    cached_tokens: int


class CompletionDetails(BaseModel):
    """Tokens that were guessed ahead; the accepted ones also by how far ahead, each of `draft_passes`."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int
    draft_passes: int
    accepted_by_position: list[int]


class Usage(BaseModel):
    """Tokens of all choices together; `cached_tokens` of the prompt came from the prefix cache.

    `completion_tokens_details` is there where tokens were guessed ahead.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: CompletionDetails | None = None


class PromptLogprob(BaseModel):
    logprob: float
    decoded_token: str


# For each prompt token a map from token id to its log-probability; null for the first.
PromptLogprobs = list[dict[str, PromptLogprob] | None]


class ModelCard(BaseModel):
    """A name that requests can give as `model`; adapters have the base model as their `parent`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tokenloom"
    root: str
    parent: str | None = None
    max_model_len: int


class ModelDeleted(BaseModel):
    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class EmbeddingRequest(RequestBody):
    """POST /v1/embeddings."""

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {"dimensions": ()}

    model: ModelName
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = Field(None, max_length=512)


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class TokenizeResponse(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeRequest(RequestBody):
    """POST /detokenize."""

    model: ModelName | None = None
    tokens: TokenIds


class DetokenizeResponse(BaseModel):
    prompt: str


class Status(BaseModel):
    status: str


class Version(BaseModel):
    version: str
