"""One tree of settings: flags over environment over TOML over defaults. Every error names its key.

Environment variables spell the path with double underscores: `TOKENLOOM_SERVER__PORT=9000`.
A TOML file has one table per branch: `[server]` / `port = 9000`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from tokenloom.errors import TokenloomError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class ConfigError(TokenloomError):
    """A setting is unknown, of the wrong type or out of range."""


_SECRETS = ("server.api_keys", "server.admin_keys", "jobs.database_url")
"""Settings that error messages do not repeat."""


class _Branch(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class ModelSettings(_Branch):
    """Which model runs, and in what arithmetic."""

    name: str = Field(
        "smollm2-135m-instruct", description="Catalog name, folder of safetensors, or .gguf file."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = Field(
        "auto", description="auto: float32 on CPU, the stored type on GPU."
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    quantize: Literal["auto", "none", "q8", "q4"] = Field(
        "auto",
        description="Bits of the weights in memory. auto: as the file stores them, where the backend "
        "computes on quantised weights (cpu). none: in dtype. q8, q4: quantised on loading.",
    )
    backend: Literal["auto", "reference", "torch", "cpu"] = Field(
        "auto",
        description="reference: written for reading, the same tokens in any batch. torch: plain torch. cpu: "
        "native kernels. auto: cpu on CPUs where it was built, else torch.",
    )
    threads: int = Field(0, ge=0, description="CPU threads; 0 takes torch's own choice.")
    max_model_len: int = Field(
        0, ge=0, description="Longest prompt plus answer, in tokens; 0: the model's own."
    )


class CacheSettings(_Branch):
    """The KV pool."""

    block_size: int = Field(16, ge=1, le=256, description="Tokens per KV block.")
    kv_bytes: int = Field(0, ge=0, description="Bytes of the KV pool; 0 sizes it to the machine.")
    dtype: Literal["auto", "int8"] = Field(
        "auto",
        description="auto: the model's dtype. int8: with a scale per token and head, a quarter of float32; "
        "nothing can train then.",
    )
    prefix_caching: bool = True
    shared_prefix_attention: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Read cached blocks that several decodes share once for all of them. auto: where that "
        "leaves every bit of an answer as it is (native kernels); on: also where it does not.",
    )
    tier: Literal["none", "host", "disk"] = Field(
        "none", description="Where cached blocks go that the pool gives away: nowhere, memory, a file."
    )
    tier_bytes: int = Field(2**30, ge=1, description="Most bytes of the tier.")
    tier_path: str = Field(
        "", description="disk: the folder of the file, which has no name; empty: `tier` in the home folder."
    )

    @field_validator("tier")
    @classmethod
    def _tier_holds_prefixes(cls, tier: str, info: ValidationInfo) -> str:
        if tier != "none" and info.data.get("prefix_caching") is False:
            raise ValueError("a tier keeps blocks of the prefix cache, and cache.prefix_caching is off")
        return tier


class SchedulerSettings(_Branch):
    """How an iteration is filled."""

    max_batch_tokens: int = Field(
        512, ge=1, description="Rows of requests in one iteration: decodes plus prefill chunks."
    )
    max_running: int = Field(
        64,
        ge=1,
        description="Sequences that hold KV at the same time; with mlfq, that get rows of one iteration.",
    )
    max_waiting: int = Field(1024, ge=1, description="Requests in the queue; one more is refused (429).")
    policy: Literal["fcfs", "priority", "lpm", "mlfq"] = Field(
        "fcfs",
        description="Who is admitted next: the first; the one of the lowest `priority`; or (lpm) the one "
        "with most of its prompt in the prefix cache. mlfq: whoever has had least gets rows first, running "
        "or not.",
    )
    lpm_wait_s: float = Field(2.0, ge=0, description="With lpm: who waited longer than this goes first.")
    mlfq_quantum: int = Field(
        64, ge=1, le=2**20, description="With mlfq: rows that a request may have in the first level."
    )
    mlfq_levels: int = Field(6, ge=1, le=16, description="With mlfq: levels, each of twice the quantum.")
    mlfq_starvation_s: float = Field(
        5.0, gt=0, description="With mlfq: who got no row for so long goes up to the first level."
    )


class SloSettings(_Branch):
    """What clients may expect of the server, whatever trains beside it."""

    ttft_ms: float = Field(2000.0, gt=0, description="Time to the first token, queueing included.")
    tpot_ms: float = Field(200.0, gt=0, description="Time per output token after the first.")


class CoserveSettings(_Branch):
    """How training shares the machine with inference (FlexLLM, arXiv 2402.18789)."""

    mode: Literal["off", "coserve", "temporal", "dynamic_temporal", "spatial", "ft_only"] = Field(
        "coserve",
        description="coserve: in the same iterations, as much as the latency targets allow. temporal: a "
        "whole training pass every temporal_every iterations. dynamic_temporal: the same, by load. "
        "spatial: beside inference in a thread of its own. ft_only: no inference. off: no training.",
    )
    temporal_every: int = Field(64, ge=1, description="Inference iterations per training pass.")
    margin: float = Field(0.1, ge=0, lt=1, description="Part of the time budget that is left unused.")


class FtSettings(_Branch):
    """What one iteration may hold of training. How a job trains is said in the job."""

    max_fwd_tokens: int = Field(256, ge=1, description="Forward rows of training per iteration.")
    bwd_window: int = Field(512, ge=1, description="Largest window of rows in backward and in the loss.")
    min_rows: int = Field(24, ge=1, description="Windows are not cut smaller to fit a budget.")
    min_progress: int = Field(
        0, ge=0, description="Run the smallest piece each so many iterations whatever the targets; 0: never."
    )
    idle_iter_ms: float = Field(
        0.0, ge=0, description="Longest iteration without inference; 0: a fifth of slo.ttft_ms."
    )
    mem_frac: float = Field(0.6, gt=0, le=1, description="Part of the KV pool that training may hold.")


class AdapterSettings(_Branch):
    """Adapters that can be chosen by the request's `model`."""

    folder: str = Field(
        "", description="Adapters are loaded from here only; empty: `adapters` in the home folder."
    )
    watch: bool = Field(True, description="Load what lies in the folder, and follow its changes.")
    max_loaded: int = Field(32, ge=1, le=4096)


class JobSettings(_Branch):
    """Files and fine-tuning jobs."""

    database_url: str = Field("", description="SQLAlchemy URL; empty: SQLite in the home folder.")
    max_file_bytes: int = Field(512 * 2**20, ge=1024)
    quota_bytes: int = Field(8 * 2**30, ge=1024, description="All uploaded files together.")
    max_concurrent: int = Field(1, ge=1, le=16, description="Jobs that train at the same time.")


class BatchSettings(_Branch):
    """Files of requests (/v1/batches)."""

    max_concurrent: int = Field(8, ge=1, le=256, description="Lines at work at the same time.")
    max_lines: int = Field(50_000, ge=1, description="Requests in one input file.")


class MethodSettings(_Branch):
    """Published methods that are on unless a request says otherwise; see `tokenloom methods`."""

    kv: str = Field("", description='Which cached tokens are kept and read, e.g. "snapkv(budget=1024)".')
    draft: str = Field("", description='How tokens are guessed ahead, e.g. "token_recycling+ngram".')
    modules: list[str] = Field(
        default_factory=list,
        description="Python files or modules to import: they register methods of one's own.",
    )


class DraftingSettings(_Branch):
    """Guesses of tokens that the next pass verifies; `methods.draft` says who guesses."""

    max_nodes: int = Field(64, ge=1, le=128, description="Most guesses of one sequence in one pass.")
    models: list[str] = Field(
        default_factory=list, description="Models that a request's draft_model may name."
    )
    persist: bool = Field(
        True, description="Keep in the home folder what drafters have learned, and how long passes take."
    )


class LimitSettings(_Branch):
    """What one HTTP request may ask for."""

    max_body_bytes: int = Field(8 * 2**20, ge=1024)
    max_n: int = Field(16, ge=1, le=128)
    max_logprobs: int = Field(20, ge=0, le=20)
    max_tokens: int = Field(0, ge=0, description="Cap on generated tokens per choice; 0: the context.")
    max_prompts: int = Field(256, ge=1, description="Prompts in one completions or embeddings request.")
    max_concurrent: int = Field(256, ge=1, description="HTTP requests at work at the same time.")
    max_total_tokens: int = Field(
        2**20, ge=1, description="Tokens that one request may come to: prompts, and n answers to each."
    )
    key_rpm: int = Field(0, ge=0, description="Requests per minute of a user's key; 0: no limit.")
    key_tpm: int = Field(0, ge=0, description="Tokens per minute of a user's key; 0: no limit.")
    key_max_concurrent: int = Field(
        0, ge=0, description="Requests of a user's key at work at the same time; 0: no limit."
    )
    max_unread: int = Field(
        1024, ge=1, description="Iterations of an answer that its reader is behind; one more ends it."
    )
    max_stored_responses: int = Field(
        1024, ge=0, description="Answers of /v1/responses kept in memory; 0: none."
    )
    max_stored_bytes: int = Field(64 * 2**20, ge=0, description="Memory of the kept responses.")
    max_grammar_bytes: int = Field(
        65536, ge=1, le=2**17, description="Of a JSON schema, regular expression, choice list or grammar."
    )
    max_grammar_depth: int = Field(32, ge=1, le=100, description="Nesting of a JSON schema.")
    grammar_timeout_s: float = Field(5.0, gt=0, description="To compile a schema or grammar.")


class LoggingSettings(_Branch):
    """What the server writes to standard error."""

    format: Literal["text", "json"] = Field("text", description="json: one object a line, for collectors.")
    level: Literal["debug", "info", "warning", "error"] = "info"
    content: bool = Field(
        False, description="Write prompts and answers to the log, too: they are personal data."
    )


class TracingSettings(_Branch):
    """OpenTelemetry traces (the `otel` extra). All else is said by OpenTelemetry's own OTEL_* variables."""

    exporter: Literal["none", "otlp"] = Field(
        "none", description="otlp: spans go to OTEL_EXPORTER_OTLP_ENDPOINT, by HTTP."
    )


class WatchdogSettings(_Branch):
    """When the engine's loop is started again."""

    iteration_s: float = Field(
        120.0, ge=0, description="An iteration that takes longer hangs; 0: none ever does."
    )
    max_restarts: int = Field(
        3, ge=0, description="So many in window_s; after one more the server ends with status 1."
    )
    window_s: float = Field(600.0, gt=0)


class ServerSettings(_Branch):
    """Where and for whom the server listens."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    api_keys: list[Annotated[SecretStr, Field(min_length=1)]] = Field(
        default_factory=list, description="Empty: no key is asked for."
    )
    admin_keys: list[Annotated[SecretStr, Field(min_length=1)]] = Field(
        default_factory=list,
        description="For loading adapters, and for all else; empty: api_keys are enough for that.",
    )
    cache_per_key: bool = Field(
        True,
        description="Cached prefixes are shared within one key only; else a client could find out by "
        "usage.cached_tokens how other keys' prompts begin.",
    )
    served_model_name: str = Field("", description="Name in /v1/models; empty: the model's own.")
    tool_format: Literal["auto", "hermes", "llama3"] = Field(
        "auto", description="How the model writes tool calls; auto: as its chat template shows them."
    )
    cors_origins: list[str] = Field(default_factory=list, description="Empty: no cross-origin access.")
    allowed_hosts: list[str] = Field(
        default_factory=list,
        description="On loopback, Host names taken besides localhost, 127.0.0.1 and [::1].",
    )
    drain_timeout_s: float = Field(
        30.0, ge=0.0, description="On SIGTERM, how long running requests may go on."
    )
    dead_peer_s: float = Field(
        60.0, ge=1.0, description="A client that reads nothing, or is silent, for so long is gone (Linux)."
    )


class Settings(BaseSettings):
    """The whole tree."""

    model_config = SettingsConfigDict(
        env_prefix="TOKENLOOM_", env_nested_delimiter="__", extra="ignore", validate_default=True
    )

    model: ModelSettings = Field(default_factory=ModelSettings)
    cache: CacheSettings = Field(default_factory=CacheSettings)
    scheduler: SchedulerSettings = Field(default_factory=SchedulerSettings)
    slo: SloSettings = Field(default_factory=SloSettings)
    coserve: CoserveSettings = Field(default_factory=CoserveSettings)
    ft: FtSettings = Field(default_factory=FtSettings)
    adapters: AdapterSettings = Field(default_factory=AdapterSettings)
    jobs: JobSettings = Field(default_factory=JobSettings)
    batches: BatchSettings = Field(default_factory=BatchSettings)
    methods: MethodSettings = Field(default_factory=MethodSettings)
    drafting: DraftingSettings = Field(default_factory=DraftingSettings)
    limits: LimitSettings = Field(default_factory=LimitSettings)
    logging: LoggingSettings = Field(default_factory=LoggingSettings)
    tracing: TracingSettings = Field(default_factory=TracingSettings)
    watchdog: WatchdogSettings = Field(default_factory=WatchdogSettings)
    server: ServerSettings = Field(default_factory=ServerSettings)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings


def load_settings(flags: dict[str, Any] | None = None, config_file: Path | None = None) -> Settings:
    """Read the settings of this process.

    Args:
        flags: dotted keys to values, e.g. `{"server.port": 9000}`; None values are left out.
        config_file: a TOML file, or None.

    Raises:
        ConfigError: naming the key (and the file it came from, if one was given).
    """
    tree: dict[str, Any] = {}
    if config_file is not None:
        try:
            tree = tomllib.loads(config_file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{config_file}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{config_file}: not valid TOML: {error}") from error
    unknown = set(tree) - set(Settings.model_fields)
    if unknown:
        raise ConfigError(f"{config_file}: unknown key {sorted(unknown)[0]!r}")
    try:
        settings = Settings(**tree)
        merged = settings.model_dump()
        for key, value in (flags or {}).items():
            if value is not None:
                _put(merged, key, value)
        return Settings.model_construct(
            **{name: type(getattr(settings, name)).model_validate(merged[name]) for name in merged}
        )
    except SettingsError as error:
        field = str(error).split('"')[1]
        raise ConfigError(
            f"environment variable TOKENLOOM_{field.upper()}: {field} is a branch of settings; "
            f"name a key of it, as in TOKENLOOM_{field.upper()}__KEY"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if error.title not in ("Settings",):
            where = f"{error.title.removesuffix('Settings').lower()}.{where}"
        source = f" (from {config_file} or the environment)" if config_file else ""
        if where.startswith(_SECRETS):
            # Neither in the message nor in a traceback below it.
            raise ConfigError(f"setting {where}: {first['msg']}{source}") from None
        raise ConfigError(f"setting {where}: {first['msg']}, got {first['input']!r}{source}") from error


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    branch, _, leaf = key.partition(".")
    if not isinstance(tree.get(branch), dict) or leaf not in tree[branch]:
        raise ConfigError(f"unknown setting {key!r}")
    tree[branch][leaf] = value


def home() -> Path:
    """Where state lives: `TOKENLOOM_HOME`, or the user's data folder."""
    return Path(os.environ.get("TOKENLOOM_HOME") or platformdirs.user_data_path("tokenloom"))
