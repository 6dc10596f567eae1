"""What a finetuning job may be asked for, and what "auto" comes to.

`n_epochs`, `batch_size` and `learning_rate_multiplier` are OpenAI's. `lora` and `training` are ours: they
stand beside them in the request (`extra_body` of OpenAI's client); the keys of `training` are also taken in
`hyperparameters`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

from tokenloom.errors import RequestError

BASE_LEARNING_RATE = 2e-4
PPD_LEARNING_RATE, PPD_TEXTS = 1e-2, 2
Linear = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LINEARS: tuple[Linear, ...] = get_args(Linear)
Auto = Literal["auto"]

TARGET_EPOCHS = 3
MIN_EXAMPLES_SEEN, MAX_EXAMPLES_SEEN = 100, 25_000
MAX_AUTO_EPOCHS = 25


def _integer_or_auto(low: int, high: int) -> Any:
    def check(value: Any) -> Any:
        if value == "auto" or (
            isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        ):
            return value
        raise ValueError(f'must be "auto" or an integer from {low} to {high}')

    return PlainValidator(check, json_schema_input_type=Annotated[int, Field(ge=low, le=high)] | Auto)


def _positive_or_auto() -> Any:
    def check(value: Any) -> Any:
        if value == "auto":
            return value
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1e6:
            return float(value)
        raise ValueError('must be "auto" or a number above 0, at most 1000000')

    return PlainValidator(check, json_schema_input_type=Annotated[float, Field(gt=0, le=1e6)] | Auto)


class Options(BaseModel):
    """Strict: unknown keys are refused, true is no number. A key whose value is null counts as left out."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: item for key, item in value.items() if item is not None}
        return value


class LoraOptions(Options):
    """The adapter (LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732)."""

    r: int = Field(16, ge=1, le=512, description="Rank.")
    alpha: float = Field(16.0, gt=0, le=4096, description="The update is scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: list[Linear] = Field(list(LINEARS), min_length=1, max_length=len(LINEARS))
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead.")


class TrainingOptions(Options):
    """How the adapter is trained."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float | None = Field(
        None, gt=0, le=10, description="Replaces the base rate 2e-4 (ppd: 1e-2), which the multiplier scales."
    )
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="Part of all steps in which the rate rises.")
    weight_decay: float = Field(0.0, ge=0, le=1)
    max_grad_norm: float = Field(1.0, ge=0, le=1e6, description="0 turns clipping off.")
    max_seq_tokens: int = Field(2048, ge=8, le=131072, description="Longer examples are truncated.")
    grad_accum: int = Field(
        1, ge=1, le=256, description="An optimizer step is taken each batch_size * grad_accum examples."
    )
    pack: bool = Field(True, description="Let short examples of a batch share a window.")
    early_stopping_patience: int | None = Field(
        None, ge=1, le=1000, description="Stop after this many validations without a better loss."
    )
    retain: Literal["lean", "fast", "ckpt"] = Field(
        "lean", description="Which activations are kept for backward; less memory means more recomputation."
    )
    checkpoint_every_steps: int | None = Field(None, ge=1, description="None: at the end of each epoch.")
    save_total_limit: int = Field(3, ge=1, le=1000, description="Older checkpoints are deleted.")


class PpdOptions(Options):
    """Prompt tokens of Parallel Prompt Decoding (arXiv 2405.18628), trained instead of an adapter."""

    prompts: int = Field(3, ge=1, le=8, description="Prompt tokens (S).")
    cuts: int = Field(32, ge=1, le=1024, description="Places of a text at which they are learned.")
    decay: float = Field(0.8, gt=0, le=1, description="Weight of a prompt token's loss by the one before it.")


class RequestedHyperparameters(TrainingOptions):
    """OpenAI's three, and the keys of `training` for clients that keep all in one place."""

    n_epochs: Annotated[int | Auto, _integer_or_auto(1, 50)] = "auto"
    batch_size: Annotated[int | Auto, _integer_or_auto(1, 256)] = "auto"
    learning_rate_multiplier: Annotated[float | Auto, _positive_or_auto()] = "auto"


class FinetuneOptions(Options):
    """The part of a job's request that says how to train."""

    hyperparameters: RequestedHyperparameters = RequestedHyperparameters()
    lora: LoraOptions = LoraOptions()
    training: TrainingOptions = TrainingOptions()


class JobOptions(FinetuneOptions):
    """The same, gathered from all places of a job's request: what is kept of it."""

    ppd: PpdOptions | None = None


class Hyperparameters(Options):
    """A job's settings with every "auto" resolved; what the trainer reads.

    `learning_rate` is the peak rate: the base (or `training.learning_rate`) times the multiplier.
    """

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float
    learning_rate: float
    lora: LoraOptions
    training: TrainingOptions
    ppd: PpdOptions | None = None

    @property
    def kind(self) -> str:
        """What the job trains."""
        return "lora" if self.ppd is None else "ppd"


def merge_given(*sources: tuple[str, BaseModel]) -> dict[str, Any]:
    """Keys that the client gave in any of several places, each a (path, model).

    Raises RequestError if two places disagree.
    """
    merged: dict[str, tuple[str, Any]] = {}
    for path, model in sources:
        for key in sorted(model.model_fields_set):
            value = getattr(model, key)
            place, other = merged.setdefault(key, (path, value))
            if other != value:
                raise RequestError(
                    f"{path}.{key} is {value!r} but {place}.{key} is {other!r}", param=f"{path}.{key}"
                )
    return {key: value for key, (_, value) in merged.items()}


def resolve_hyperparameters(n_examples: int, requested: FinetuneOptions) -> Hyperparameters:
    """Put numbers where the request says "auto".

    Epochs follow OpenAI's data-preparation cookbook: 3, raised until 100 examples are seen (at most 25) and
    lowered to stay at 25,000. The batch is 0.2 % of the examples, from 1 to 256. Prompt tokens are trained as
    in their paper: two texts a step, a rate of 1e-2 that falls as a cosine, no clipping.

    Raises RequestError if a key is given both in `hyperparameters` and in `training`, with unequal values.
    """
    given = merge_given(("hyperparameters", requested.hyperparameters), ("training", requested.training))
    n_epochs, batch_size, multiplier = (
        given.pop(key, "auto") for key in ("n_epochs", "batch_size", "learning_rate_multiplier")
    )
    multiplier = 1.0 if multiplier == "auto" else multiplier
    ppd = requested.ppd if isinstance(requested, JobOptions) else None
    base, texts = BASE_LEARNING_RATE, max(1, min(256, round(0.002 * n_examples)))
    if ppd is not None:
        base, texts = PPD_LEARNING_RATE, PPD_TEXTS
        given = {"schedule": "cosine", "warmup_ratio": 0.0, "max_grad_norm": 0.0, "pack": False, **given}
    training = TrainingOptions.model_validate(given)
    return Hyperparameters(
        n_epochs=_auto_epochs(n_examples) if n_epochs == "auto" else n_epochs,
        batch_size=texts if batch_size == "auto" else batch_size,
        learning_rate_multiplier=multiplier,
        learning_rate=(training.learning_rate or base) * multiplier,
        lora=requested.lora,
        training=training,
        ppd=ppd,
    )


def _auto_epochs(n_examples: int) -> int:
    if n_examples * TARGET_EPOCHS < MIN_EXAMPLES_SEEN:
        return min(MAX_AUTO_EPOCHS, MIN_EXAMPLES_SEEN // max(1, n_examples))
    if n_examples * TARGET_EPOCHS > MAX_EXAMPLES_SEEN:
        return max(1, MAX_EXAMPLES_SEEN // n_examples)
    return TARGET_EPOCHS
