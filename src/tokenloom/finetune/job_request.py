"""The body of POST /v1/fine_tuning/jobs."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from tokenloom.errors import RequestError
from tokenloom.finetune.hyperparameters import (
    FinetuneOptions,
    JobOptions,
    Options,
    PpdOptions,
    RequestedHyperparameters,
    merge_given,
    resolve_hyperparameters,
)

MAX_SEED = 2**31 - 1


def _storable(text: str) -> str:
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("holds a character that is not text")
    return text


MetadataKey = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_storable)]
MetadataValue = Annotated[str, Field(max_length=512), AfterValidator(_storable)]
Name = Annotated[str, Field(min_length=1, max_length=256)]


class Supervised(Options):
    hyperparameters: RequestedHyperparameters = RequestedHyperparameters()


class Ppd(PpdOptions):
    hyperparameters: RequestedHyperparameters = RequestedHyperparameters()


class Method(Options):
    """Supervised finetuning of an adapter; or `ppd`, ours: prompt tokens that make drafts."""

    type: str
    supervised: Supervised = Supervised()
    ppd: Ppd = Ppd()

    @field_validator("type")
    @classmethod
    def _offered(cls, kind: str) -> str:
        if kind not in ("supervised", "ppd"):
            raise ValueError(f'{kind[:64]!r} is not offered, only "supervised" and "ppd"')
        return kind

    @model_validator(mode="after")
    def _one_type(self) -> Method:
        other = "ppd" if self.type == "supervised" else "supervised"
        if other in self.model_fields_set:
            raise ValueError(f'{other} does not go with type "{self.type}"')
        return self


class CreateJob(FinetuneOptions):
    """OpenAI's request, with `lora` and `training` beside it."""

    model: Name
    training_file: Name
    validation_file: Name | None = None
    suffix: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")] | None = None
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    metadata: dict[MetadataKey, MetadataValue] | None = Field(None, max_length=16)
    integrations: list[dict[str, Any]] | None = None
    method: Method | None = None

    @field_validator("integrations")
    @classmethod
    def _no_integrations(cls, integrations: list[dict[str, Any]] | None) -> None:
        if integrations:
            raise ValueError("none is offered; read the job's events or its result file instead")

    def options(self) -> JobOptions:
        """How to train, gathered from the places where clients may say it.

        Raises RequestError if two places disagree, or an adapter is described that is not trained.
        """
        places, method, more = [("hyperparameters", self.hyperparameters)], self.method, {}
        if method is not None:
            chosen = method.ppd if method.type == "ppd" else method.supervised
            places.append((f"method.{method.type}.hyperparameters", chosen.hyperparameters))
            if isinstance(chosen, Ppd):
                if "lora" in self.model_fields_set:
                    raise RequestError('lora: goes with method.type "supervised" alone', param="lora")
                more = {"ppd": PpdOptions(**chosen.model_dump(exclude={"hyperparameters"}))}
        merged = RequestedHyperparameters.model_validate(merge_given(*places))
        options = JobOptions(hyperparameters=merged, lora=self.lora, training=self.training, **more)
        resolve_hyperparameters(1, options)  # refuses `training` and `hyperparameters` that disagree
        return options


def parse_job(body: Any) -> CreateJob:
    """Check the body of a request. Raises RequestError naming the field."""
    if not isinstance(body, dict):
        raise RequestError("the request body must be a JSON object")
    try:
        return CreateJob.model_validate(body)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        path = ".".join(str(part)[:64] for part in fault["loc"] if part != "[key]")
        words = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            words = "unknown field"
        raise RequestError(f"{path}: {words}", param=path) from None
