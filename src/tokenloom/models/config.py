"""What a decoder must know about a model, read from Hugging Face's config.json or from GGUF metadata."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args

from tokenloom.errors import ModelError
from tokenloom.models.gguf_file import GGUFFile

RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3"]
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")

_GGUF_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_YARN_NUMBERS = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (RoFormer, arXiv 2104.09864); the rotated width is the whole head.

    `kind` says how the frequencies are stretched beyond the context the model was first trained on:
    `linear` (position interpolation, arXiv 2306.15595), `dynamic` (NTK-aware), `yarn` (arXiv 2309.00071)
    or `llama3` (Llama 3.1). `original_max_position` is that first context in tokens. The yarn numbers are
    those of the paper and of transformers; None means derived from `factor`. `freq_factors` (`[D/2]`, GGUF's
    `rope_freqs.weight`) divides the frequencies one by one, whatever the kind.
    """

    theta: float
    kind: RopeKind
    original_max_position: int
    factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    freq_factors: tuple[float, ...] | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Shape and options of one Llama-family decoder.

    `sliding_windows` has one entry per layer: the number of positions a query sees, itself included, or None
    for full attention. `max_position` is the context limit in tokens with RoPE scaling applied. `dtype` is
    the weights' type as stored: a torch name ("bfloat16") or a lower-case GGUF quantisation ("q4_1").
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str

    @classmethod
    def from_hf(
        cls,
        config: Mapping[str, Any],
        generation_config: Mapping[str, Any] | None = None,
        *,
        file: str = "config.json",
    ) -> ModelConfig:
        """Read a config.json of transformers 4 or 5. Raises ModelError naming `file` and the key at fault."""
        keys = _Keys(config, file)
        architecture = config.get("model_type")
        if architecture not in ARCHITECTURES:
            keys.fail(
                "model_type",
                f"architecture {architecture!r} is not supported; {', '.join(ARCHITECTURES)} are",
            )
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            keys.fail("hidden_act", f"activation {config['hidden_act']!r} is not supported; silu is")
        if config.get("quantization_config"):
            keys.fail(
                "quantization_config",
                "quantised safetensors are not supported; use unquantised weights or GGUF",
            )
        num_layers = keys.count("num_hidden_layers")
        num_heads = keys.count("num_attention_heads")
        hidden_size = keys.count("hidden_size")
        attention_bias = architecture in ("llama", "qwen3") and keys.flag("attention_bias")
        max_position = keys.count("max_position_embeddings")
        rope = _hf_rope(keys, max_position)
        generation = {key: value for key, value in (generation_config or {}).items() if value is not None}
        token_ids = _Keys({**config, **generation}, f"{file} or generation_config.json")
        return cls(
            architecture=architecture,
            vocab_size=keys.count("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=keys.count("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=keys.count("num_key_value_heads", num_heads),
            head_dim=keys.count("head_dim", 128 if architecture == "qwen3" else hidden_size // num_heads),
            max_position=_stretched(rope, max_position),
            rms_norm_eps=keys.positive("rms_norm_eps"),
            rope=rope,
            tie_word_embeddings=keys.flag("tie_word_embeddings"),
            qkv_bias=architecture == "qwen2" or attention_bias,
            o_bias=attention_bias,
            mlp_bias=architecture == "llama" and keys.flag("mlp_bias"),
            qk_norm=architecture == "qwen3",
            sliding_windows=_hf_windows(keys, architecture, num_layers),
            bos_token_id=next(iter(token_ids.token_ids("bos_token_id")), None),
            eos_token_ids=token_ids.token_ids("eos_token_id"),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."),
        )._checked(keys, "num_attention_heads", "num_key_value_heads", "head_dim")

    @classmethod
    def from_gguf(cls, reader: GGUFFile) -> ModelConfig:
        """Read GGUF metadata. Raises ModelError naming the file and the metadata key at fault."""
        keys = _Keys(reader.metadata, str(reader.path))
        architecture = reader.metadata.get("general.architecture")
        if architecture not in ARCHITECTURES:
            keys.fail(
                "general.architecture",
                f"architecture {architecture!r} is not supported; {', '.join(ARCHITECTURES)} are",
            )
        prefix = f"{architecture}."
        if reader.metadata.get(prefix + "expert_count", 0):
            keys.fail(prefix + "expert_count", "mixture-of-experts models are not supported")
        num_layers = keys.count(prefix + "block_count")
        num_heads = keys.count(prefix + "attention.head_count")
        hidden_size = keys.count(prefix + "embedding_length")
        head_dim = keys.count(prefix + "attention.key_length", hidden_size // num_heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if keys.count(prefix + key, head_dim) != head_dim:
                keys.fail(prefix + key, f"must equal the head width, {head_dim}")
        max_position = keys.count(prefix + "context_length")
        rope = _gguf_rope(keys, prefix, max_position, reader)
        window = keys.count(prefix + "attention.sliding_window", 0, minimum=0) or None
        embedding = reader.tensors.get("token_embd.weight")
        if embedding is None:
            raise ModelError(f"{reader.path}: tensor 'token_embd.weight' is missing")
        ends = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
        return cls(
            architecture=architecture,
            vocab_size=embedding.shape[0],
            hidden_size=hidden_size,
            intermediate_size=keys.count(prefix + "feed_forward_length"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=keys.count(prefix + "attention.head_count_kv", num_heads),
            head_dim=head_dim,
            max_position=_stretched(rope, max_position),
            rms_norm_eps=keys.positive(prefix + "attention.layer_norm_rms_epsilon"),
            rope=rope,
            tie_word_embeddings="output.weight" not in reader.tensors,
            qkv_bias="blk.0.attn_q.bias" in reader.tensors,
            o_bias="blk.0.attn_output.bias" in reader.tensors,
            mlp_bias="blk.0.ffn_up.bias" in reader.tensors,
            qk_norm="blk.0.attn_q_norm.weight" in reader.tensors,
            sliding_windows=(window,) * num_layers,
            bos_token_id=next(iter(keys.token_ids("tokenizer.ggml.bos_token_id")), None),
            eos_token_ids=tuple(dict.fromkeys(i for key in ends for i in keys.token_ids(key))),
            dtype=_gguf_dtype(reader),
        )._checked(keys, prefix + "attention.head_count", prefix + "attention.head_count_kv", "head width")

    def _checked(self, keys: _Keys, heads_key: str, kv_heads_key: str, head_dim_key: str) -> ModelConfig:
        if self.head_dim < 2 or self.head_dim % 2:
            keys.fail(head_dim_key, f"must be even, not {self.head_dim}; is {heads_key} right?")
        if self.num_heads % self.num_kv_heads:
            keys.fail(kv_heads_key, f"{self.num_kv_heads} does not divide {heads_key}, {self.num_heads}")
        for token_id in (*self.eos_token_ids, *([] if self.bos_token_id is None else [self.bos_token_id])):
            if token_id >= self.vocab_size:
                keys.fail("vocab_size", f"{self.vocab_size} leaves out the bos or eos token id {token_id}")
        return self


class _Keys:
    """Checked access to a mapping; every complaint names the file and the key."""

    def __init__(self, values: Mapping[str, Any], file: str) -> None:
        self.values = values
        self.file = file

    def fail(self, key: str, problem: str) -> NoReturn:
        raise ModelError(f"{self.file}: {key}: {problem}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None and default is None:
            self.fail(key, "is missing")
        return default if value is None else value

    def count(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        value = self._get(key, default)
        if (
            isinstance(value, list) and value and value.count(value[0]) == len(value)
        ):  # GGUF allows one value per layer
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            self.fail(key, f"must be an integer of at least {minimum}, not {value!r}")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            self.fail(key, f"must be a positive number, not {value!r}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            self.fail(key, f"must be true or false, not {value!r}")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            self.fail(key, f"must be a token id or a list of them, not {value!r}")
        return tuple(ids)


def _stretched(rope: RopeConfig, max_position: int) -> int:
    """The usable context: transformers' configs keep the unscaled one for these kinds of scaling."""
    if rope.kind in ("linear", "dynamic"):
        return int(max_position * rope.factor)
    if rope.kind == "yarn":
        return max(max_position, int(rope.original_max_position * rope.factor))
    return max_position


def _hf_rope(keys: _Keys, max_position: int) -> RopeConfig:
    name = "rope_parameters" if keys.values.get("rope_parameters") else "rope_scaling"
    scaling = keys.values.get(name) or {}
    if not isinstance(scaling, dict):
        keys.fail(name, f"must be an object, not {scaling!r}")
    inner = _Keys({**scaling}, f"{keys.file}: {name}")
    kind: Any = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in get_args(RopeKind):
        inner.fail("rope_type", f"{kind!r} is not supported; {', '.join(get_args(RopeKind))} are")
    partial = scaling.get("partial_rotary_factor", keys.values.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        keys.fail("partial_rotary_factor", f"must be 1, not {partial!r}: whole heads are rotated")
    theta = (inner if scaling.get("rope_theta") is not None else keys).positive("rope_theta", 10000.0)
    # Dynamic NTK in transformers measures from the model's own maximum, whatever else the config says.
    original = max_position
    if kind in ("yarn", "llama3"):
        original = inner.count("original_max_position_embeddings", max_position)
    options: dict[str, Any] = {}
    if kind == "yarn":
        options = {key: inner.positive(key) for key in _YARN_NUMBERS if scaling.get(key)}
        options["truncate"] = inner.flag("truncate", True)
        options["factor"] = inner.positive("factor", max_position / original)
    elif kind == "llama3":
        options = {key: inner.positive(key) for key in ("factor", "low_freq_factor", "high_freq_factor")}
    elif kind != "default":
        options["factor"] = inner.positive("factor")
    return RopeConfig(theta=theta, kind=kind, original_max_position=original, **options)


def _hf_windows(keys: _Keys, architecture: str, num_layers: int) -> tuple[int | None, ...]:
    if architecture == "llama" or keys.values.get("sliding_window") is None:
        return (None,) * num_layers
    if architecture == "mistral":
        return (keys.count("sliding_window"),) * num_layers
    if not keys.flag("use_sliding_window"):
        return (None,) * num_layers
    window = keys.count("sliding_window")
    types = keys.values.get("layer_types")
    if types is None:
        first = keys.count("max_window_layers", 28, minimum=0)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    windows = {"full_attention": None, "sliding_attention": window}
    if not isinstance(types, list) or len(types) != num_layers or not all(kind in windows for kind in types):
        keys.fail("layer_types", f"must list {num_layers} of {', '.join(windows)}, not {types!r}")
    return tuple(windows[kind] for kind in types)


def _gguf_rope(keys: _Keys, prefix: str, max_position: int, reader: GGUFFile) -> RopeConfig:
    prefix += "rope."
    scaling = prefix + "scaling."
    stored = keys.values.get(scaling + "type", "none")
    if stored not in ("none", "linear", "yarn"):
        keys.fail(scaling + "type", f"{stored!r} is not supported; none, linear and yarn are")
    kind: RopeKind = "default" if stored == "none" else stored
    original, options = max_position, dict[str, Any]()
    if kind != "default":
        options["factor"] = keys.positive(scaling + "factor")
    if kind == "yarn":
        original = keys.count(scaling + "original_context_length", max_position)
        options["beta_fast"] = keys.positive(scaling + "yarn_beta_fast", 32.0)
        options["beta_slow"] = keys.positive(scaling + "yarn_beta_slow", 1.0)
        if scaling + "attn_factor" in keys.values:  # multiplies the paper's factor, it does not replace it
            usual = 0.1 * math.log(max(options["factor"], 1.0)) + 1.0
            options["attention_factor"] = keys.positive(scaling + "attn_factor") * usual
    return RopeConfig(
        theta=keys.positive(prefix + "freq_base", 10000.0),
        kind=kind,
        original_max_position=original,
        freq_factors=_freq_factors(reader),
        **options,
    )


def _freq_factors(reader: GGUFFile) -> tuple[float, ...] | None:
    tensor = reader.tensors.get("rope_freqs.weight")
    if tensor is None:
        return None
    if tensor.quantization != "F32":
        raise ModelError(f"{reader.path}: tensor 'rope_freqs.weight' must be F32, not {tensor.quantization}")
    return tuple(reader.raw("rope_freqs.weight").view("<f4").ravel().tolist())


def _gguf_dtype(reader: GGUFFile) -> str:
    """The type that most matrices are stored in."""
    matrices = Counter(tensor.quantization for tensor in reader.tensors.values() if len(tensor.shape) > 1)
    common = matrices.most_common(1)[0][0]
    return _GGUF_DTYPES.get(common, common.lower())
