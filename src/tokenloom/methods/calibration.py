"""What methods must know of a model, measured once: text, observed rows, and where the results lie.

A calibration is a safetensors file under `config.home()/calibration/<model>/<method>/`; those of the default
model are part of the package. One made here wins over one that came with the package.
"""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tokenloom.batch import BatchBuilder, SegmentKind, Tap
from tokenloom.cache.block_pool import OutOfBlocks
from tokenloom.cache.block_table import BlockTable
from tokenloom.cache.cached_tokens import CachedTokens
from tokenloom.cache.policy import KVPolicy, SequenceShape
from tokenloom.config import home
from tokenloom.durable import new_folder
from tokenloom.engine.engine import Engine
from tokenloom.errors import RequestError

SHIPPED = Path(__file__).with_name("calibrated")
_FILE = "measured.safetensors"
_ROWS = 512  # of one pass

# Modules of Python's library that explain themselves at length, in English and in code. `tokenloom bench kv`
# takes other ones: what is measured must not be tested on the text that it was measured on.
_MODULES = ("pickletools", "_pydecimal", "optparse", "turtle", "tarfile", "_pyio", "threading", "random")


def passages(engine: Engine, file: Path | None, count: int, tokens: int) -> list[list[int]]:
    """`count` stretches of `tokens` tokens, evenly spread over a text.

    Args:
        file: UTF-8; None: sources of Python's standard library, which every machine has.

    Raises:
        RequestError: the file cannot be read, or is too short, or the model's context is.
    """
    if tokens > engine.max_model_len:
        raise RequestError(f"tokens: {tokens} are more than the model's context of {engine.max_model_len}")
    library = Path(sysconfig.get_path("stdlib"))
    files = [library / f"{name}.py" for name in _MODULES] if file is None else [file]
    try:
        text = "\n\n".join(path.read_text("utf-8") for path in files if file or path.exists())
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"text: {file or library}: cannot be read ({error})") from error
    # Far more than is needed would only take time; a token has about four characters.
    ids = engine.tokenizer.encode(text[: max(400_000, count * tokens * 8)], add_special_tokens=False)
    if len(ids) < count * tokens:
        raise RequestError(
            f"text: {len(ids)} tokens are too few for {count} passages of {tokens} (--passages, --tokens)"
        )
    stride = (len(ids) - tokens) // max(1, count - 1)
    return [ids[i * stride : i * stride + tokens] for i in range(count)]


def shape_of(engine: Engine, prompt_tokens: int) -> SequenceShape:
    """The shape of a prompt that nothing follows, in an engine's model."""
    c = engine.config
    return SequenceShape(prompt_tokens, 0, c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim, engine.name)


def observe(
    engine: Engine, tokens: Sequence[int], policy: KVPolicy | None = None, taps: Sequence[Tap] = ()
) -> None:
    """Run a prompt through the layers while a policy, or taps, look on. A tap's `rows` are set for each pass.

    Raises:
        RequestError: the pool has too few blocks for it.
    """
    table = BlockTable(engine.pool)
    cached = CachedTokens(engine.kv, table, engine.decoder.kernels)
    try:
        table.grow(len(tokens))
        for start in range(0, len(tokens), _ROWS):
            rows = list(tokens[start : start + _ROWS])
            builder = BatchBuilder(engine.device)
            builder.add(
                SegmentKind.PREFILL,
                rows,
                table.blocks,
                kv_start=start,
                block_size=engine.pool.block_size,
                contiguous=table.contiguous,
                logits="none",
            )
            cached.start, cached.length = start, start + len(rows)
            if policy is not None:
                builder.governed(policy, cached)
            for tap in taps:
                tap.rows = slice(0, len(rows))
                builder.taps.append(tap)
            engine.decoder.forward(builder.build(), engine.kv)
    except OutOfBlocks:
        raise RequestError(f"tokens: the KV pool has no room for {len(tokens)} (cache.kv_bytes)") from None
    finally:
        table.clear()


# -- where it lies ----------------------------------------------------------------------------------------


def key_of(shape: SequenceShape) -> str:
    """The folder of a model: its name, and its shape, since names of folders are not always to be trusted."""
    name = re.sub(r"[^a-z0-9._-]+", "--", shape.model.lower()).strip(".-") or "model"
    return f"{name}@{shape.num_layers}x{shape.num_heads}x{shape.num_kv_heads}x{shape.head_dim}"


def store(method: str, shape: SequenceShape, measured: dict[str, Tensor], about: dict[str, str]) -> Path:
    """Keep what was measured, and how; the file is complete or it is not there."""
    folder = home() / "calibration" / key_of(shape) / method
    with new_folder(folder) as aside:
        save_file(measured, aside / _FILE, metadata=about)
    _read.cache_clear()
    return folder / _FILE


def load(
    method: str, shape: SequenceShape, hook: str = "kv", made_by: str = "calibrate"
) -> dict[str, Tensor]:
    """What was measured of this model for a method. It is read once: a server goes on with what it has read.

    Args:
        hook: the method's; made_by: the command that measures.

    Raises:
        RequestError: (param: the hook) nothing was; the message says how to do it.
    """
    return _read(method, key_of(shape), home(), hook, made_by)


@cache
def _read(method: str, key: str, state: Path, hook: str, made_by: str) -> dict[str, Tensor]:
    name, _, numbers = key.partition("@")
    files = [state / "calibration" / key / method / _FILE]
    # A file of the same weights may have more to its name: smollm2-135m-instruct.q4_1.
    files += [
        path / f"{method}.safetensors"
        for path in sorted(SHIPPED.glob("*"))
        if path.name.partition("@")[2] == numbers and name.startswith(path.name.partition("@")[0])
    ]
    for file in files:
        if file.exists():
            try:
                with safe_open(file, "pt") as tensors:
                    return {k: tensors.get_tensor(k) for k in tensors.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise RequestError(
                    f"{hook}: {method}: {file} cannot be read ({error})", param=hook
                ) from error
    raise RequestError(
        f"{hook}: {method} must be measured or trained once for this model ({name}): "
        f"run tokenloom {made_by} {method} --model ... with the same model",
        param=hook,
    )
