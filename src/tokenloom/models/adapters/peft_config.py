"""PEFT's `adapter_config.json`: which linears an adapter touches and how, by PEFT's matching of names."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tokenloom.models.adapters.adapter import AdapterConfig, AdapterError
from tokenloom.models.adapters.bottleneck import BottleneckConfig
from tokenloom.models.adapters.ia3 import Ia3Config
from tokenloom.models.adapters.lora import LoraConfig
from tokenloom.models.adapters.sites import LINEARS, MODULE

CONFIG_FILE = "adapter_config.json"

Value = TypeVar("Value", int, float)
Modules = dict[tuple[int, str], str]
"""(layer, linear) -> the module's name inside the model, `model.layers.0.self_attn.q_proj`."""

_LARGEST_RANK = 2**16  # keeps the product of two widths, one of them from the file, far from overflow
_OUTSIDE = ("model.embed_tokens", "lm_head")
# These say where an adapter came from, or how it was set up before training.
_NEUTRAL = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "megatron_core", "qalora_group_size", "eva_config", "init_ia3_weights"),
}
_MATCHING = {"target_modules", "exclude_modules"}
_LORA = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("layers_to_transform", "layers_pattern", "init_lora_weights"),
}
# Other ways to set LoRA up (PiSSA, OLoRA, ...) also change the base model's weights.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def read_config(folder: Path, num_layers: int) -> AdapterConfig:
    """The configuration of an adapter folder for a model of that many layers.

    Raises:
        AdapterError: the file is broken, or asks for what is not supported; the message names file and key.
    """
    options = _Options(folder / CONFIG_FILE)
    kind = options.values.get("peft_type")
    readers: dict[Any, Callable[[_Options, Modules], AdapterConfig]] = {
        "LORA": _lora,
        "IA3": _ia3,
        "BOTTLENECK": _bottleneck,
    }
    if not isinstance(kind, str) or kind not in readers:
        options.fail("peft_type", f"{kind!r} is not supported; {', '.join(readers)} are")
    modules = {
        (i, linear): f"model.layers.{i}.{MODULE[linear]}" for i in range(num_layers) for linear in LINEARS
    }
    return readers[kind](options, modules)


def _lora(options: _Options, modules: Modules) -> LoraConfig:
    options.refuse_all_but(_NEUTRAL | _MATCHING | _LORA)
    init = options.values.get("init_lora_weights")
    if init not in _PLAIN_INITS:
        options.fail("init_lora_weights", f"{init!r} also changes the base model's weights")
    rank, alpha = options.count("r", 8), options.number("lora_alpha", 8)
    dropout = options.number("lora_dropout", 0)
    if not 0 <= dropout < 1:
        options.fail("lora_dropout", f"{dropout} is not within 0 and 1")
    targeted = _targeted(options, modules)
    ranks = {key: _by_pattern(options, "rank_pattern", modules[key], rank) for key in targeted}
    alphas = {key: _by_pattern(options, "alpha_pattern", modules[key], alpha) for key in targeted}
    return LoraConfig(
        r=rank,
        alpha=alpha,
        dropout=dropout,
        targets=_by_linear(targeted, modules),
        rslora=options.flag("use_rslora"),
        ranks=_exceptions(ranks, rank),
        alphas=_exceptions(alphas, alpha),
    )


def _ia3(options: _Options, modules: Modules) -> Ia3Config:
    options.refuse_all_but(_NEUTRAL | _MATCHING | {"feedforward_modules"})
    targeted = _targeted(options, modules)
    wanted = options.names("feedforward_modules")
    if isinstance(wanted, str):
        feedforward = [
            key for key in targeted if options.matches("feedforward_modules", wanted, modules[key])
        ]
    else:  # PEFT compares the ends here, in mid-word too
        feedforward = [key for key in targeted if modules[key].endswith(tuple(wanted))]
    return Ia3Config(_by_linear(targeted, modules), _by_linear(feedforward, modules))


def _bottleneck(options: _Options, modules: Modules) -> BottleneckConfig:
    options.refuse_all_but(_NEUTRAL | _MATCHING | {"size", "scale", "activation"})
    size, scale = options.count("size"), options.number("scale", 1)
    targets = _by_linear(_targeted(options, modules), modules)
    try:
        return BottleneckConfig(size, targets, scale, options.values.get("activation", "relu"))
    except AdapterError as error:
        raise AdapterError(f"{options.file}: {error}") from error


def _targeted(options: _Options, modules: Modules) -> list[tuple[int, str]]:
    """The linears that PEFT would give an adapter."""
    wanted, excluded = options.names("target_modules"), options.names("exclude_modules", [])
    for name in _OUTSIDE:
        all_linear = isinstance(wanted, str) and wanted.lower() == "all-linear"
        if not all_linear and _reaches(options, wanted, excluded, name):
            options.fail("target_modules", f"reaches {name}; only the linears of layers can have an adapter")
    targeted = [key for key, name in modules.items() if _reaches(options, wanted, excluded, name)]
    if not targeted:
        options.fail("target_modules", f"{wanted!r} reaches none of the model's linears")
    return targeted


def _reaches(options: _Options, wanted: str | list[str], excluded: str | list[str], name: str) -> bool:
    if isinstance(excluded, str):
        if options.matches("exclude_modules", excluded, name):
            return False
    elif _has_ending(name, excluded):
        return False
    if isinstance(wanted, str):
        return wanted.lower() == "all-linear" or options.matches("target_modules", wanted, name)
    return name in wanted or (_has_ending(name, wanted) and _in_layers(options, name))


def _has_ending(name: str, endings: list[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _in_layers(options: _Options, name: str) -> bool:
    layers = options.values.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    layers = layers if isinstance(layers, list) else [layers]
    if not all(type(layer) is int for layer in layers):
        options.fail("layers_to_transform", "must be a layer's number or a list of them")
    for pattern in options.list_of_names("layers_pattern") or ["[^.]*"]:
        number = options.search("layers_pattern", rf"(?:^|\.)(?:{pattern})\.(?P<layer>\d+)\.", name)
        if number is not None:
            return int(number["layer"]) in layers
    return False


def _by_pattern(options: _Options, option: str, name: str, default: Value) -> Value:
    """The value of the first pattern that matches the end of a module's name."""
    patterns = options.values.get(option) or {}
    if not isinstance(patterns, dict):
        options.fail(option, "must be an object")
    for pattern, value in patterns.items():
        if options.search(option, rf"^(?:.*\.)?(?:{pattern})$", name):
            read = options.to_count if option == "rank_pattern" else options.to_number
            return read(f"{option}.{pattern}", value)  # type: ignore[return-value]
    return default


def _by_linear(keys: list[tuple[int, str]], modules: Modules) -> tuple[str, ...]:
    """`q_proj` where a linear is meant in all layers, `3.q_proj` where only in some."""
    num_layers = len(modules) // len(LINEARS)

    def names() -> Iterator[str]:
        for linear in LINEARS:
            layers = [layer for layer, name in keys if name == linear]
            yield from [linear] if len(layers) == num_layers else [f"{layer}.{linear}" for layer in layers]

    return tuple(names())


def _exceptions(values: Mapping[tuple[int, str], Value], default: Value) -> dict[str, Value]:
    """What differs from the default, by linear where all layers agree, else by layer and linear."""
    found: dict[str, Value] = {}
    for linear in LINEARS:
        of_linear = {layer: value for (layer, name), value in values.items() if name == linear}
        if len(set(of_linear.values())) == 1:
            found[linear] = next(iter(of_linear.values()))
        else:
            found |= {f"{layer}.{linear}": value for layer, value in of_linear.items()}
    return {key: value for key, value in found.items() if value != default}


class _Options:
    """The keys of one adapter_config.json; every complaint names the file and the key."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._patterns: dict[str, re.Pattern[str]] = {}
        try:
            self.values = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise AdapterError(f"{file}: cannot be read as JSON ({error})") from error
        if not isinstance(self.values, dict):
            raise AdapterError(f"{file}: must hold a JSON object")

    def fail(self, key: str, problem: str) -> NoReturn:
        raise AdapterError(f"{self.file}: {key}: {problem}")

    def refuse_all_but(self, known: set[str]) -> None:
        """Refuse every other key that switches something on: leaving it out would compute something else."""
        for key, value in self.values.items():
            if key not in known and value and not (key == "bias" and value == "none"):
                self.fail(key, f"{value!r} is not supported")

    def count(self, key: str, default: int | None = None) -> int:
        return self.to_count(key, self.values.get(key, default))

    def number(self, key: str, default: float) -> float:
        return self.to_number(key, self.values.get(key, default))

    def flag(self, key: str) -> bool:
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            self.fail(key, f"must be true or false, not {value!r}")
        return value

    def names(self, key: str, default: list[str] | None = None) -> str | list[str]:
        """A pattern, or a list of names."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, str | list) or not all(isinstance(name, str) for name in value):
            self.fail(key, f"must be a list of names or a pattern, not {value!r}")
        return value

    def list_of_names(self, key: str) -> list[str]:
        value = self.names(key, [])
        return [value] if isinstance(value, str) and value else list(value)

    def to_count(self, key: str, value: Any) -> int:
        if type(value) is not int or not 1 <= value <= _LARGEST_RANK:
            self.fail(key, f"must be a whole number from 1 to {_LARGEST_RANK}, not {value!r}")
        return value

    def to_number(self, key: str, value: Any) -> float:
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            self.fail(key, f"must be a finite number, not {value!r}")
        return float(value)

    def matches(self, key: str, pattern: str, name: str) -> bool:
        """Whether a pattern matches the whole name."""
        return self._compiled(key, pattern).fullmatch(name) is not None

    def search(self, key: str, pattern: str, name: str) -> re.Match[str] | None:
        return self._compiled(key, pattern).search(name)

    def _compiled(self, key: str, pattern: str) -> re.Pattern[str]:
        # Kept here: a file may have more patterns than the cache of `re` holds.
        if pattern not in self._patterns:
            try:
                self._patterns[pattern] = re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                self.fail(key, f"not a regular expression: {error}")
        return self._patterns[pattern]
