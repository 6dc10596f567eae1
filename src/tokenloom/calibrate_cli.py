"""`tokenloom calibrate`: what some methods must know of a model, measured once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from tokenloom.models.catalog import DEFAULT_MODEL

if TYPE_CHECKING:
    from tokenloom.engine.engine import Engine

calibrate_app = typer.Typer(no_args_is_help=True, help="Measure what a method must know of a model, once.")
out, err = Console(), Console(stderr=True)

Model = Annotated[str, typer.Option("--model", "-m", help="Catalog name, folder or .gguf file.")]
Text = Annotated[
    Path | None, typer.Option(help="A UTF-8 text to measure on; by default sources of Python's library.")
]
Passages = Annotated[int, typer.Option(min=1, help="Stretches of the text.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; 0 takes torch's own choice.")]


@calibrate_app.command()
def fasa(
    model: Model = DEFAULT_MODEL,
    text: Text = None,
    passages: Passages = 4,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens of a passage.")] = 2048,
    rows: Annotated[int, typer.Option(min=1, help="Rows observed in each passage.")] = 16,
    threads: Threads = None,
) -> None:
    """Find the frequency chunks by which `fasa` predicts what a head will read."""
    from tokenloom.methods.kv.fasa_calibration import calibrate

    engine = _engine(model, tokens, threads)
    with err.status("measuring") as status:
        found = calibrate(
            engine,
            text,
            num_passages=passages,
            tokens=tokens,
            rows=rows,
            progress=lambda done: status.update(f"measuring: {done} of {passages} passages"),
        )
    out.print(
        f"Agreement with a head's own top {found.size} tokens: {found.best:.2f} for its best chunk, "
        f"{found.mean:.2f} for any one, {found.chance:.2f} by chance.\n{found.path}",
        highlight=False,
        soft_wrap=True,
    )


@calibrate_app.command("token_sparse")
def token_sparse(
    model: Model = DEFAULT_MODEL,
    text: Text = None,
    passages: Passages = 1,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens of a passage.")] = 4096,
    threads: Threads = None,
) -> None:
    """Find the layers that change their tokens least, where `token_sparse` leaves some out."""
    from tokenloom.methods.kv.token_sparse_calibration import calibrate

    engine = _engine(model, tokens, threads)
    with err.status("measuring"):
        path, drift = calibrate(engine, text, num_passages=passages, tokens=tokens)
    for layer, value in enumerate(drift):
        out.print(f"layer {layer:3}  drift {value:.3f}", highlight=False)
    out.print(str(path), highlight=False, soft_wrap=True)


@calibrate_app.command()
def palu(
    model: Model = DEFAULT_MODEL,
    text: Text = None,
    passages: Passages = 4,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens of a passage.")] = 2048,
    groups: Annotated[
        list[int] | None,
        typer.Option(help="Groups of kv heads that are compressed together; may be repeated. By default 1."),
    ] = None,
    threads: Threads = None,
) -> None:
    """Find the directions in which `palu` stores keys and values."""
    from tokenloom.methods.kv.palu_calibration import calibrate

    engine = _engine(model, tokens, threads)
    with err.status("measuring") as status:
        path, moments = calibrate(
            engine,
            text,
            num_passages=passages,
            tokens=tokens,
            groups=groups or [1],
            progress=lambda done: status.update(f"measuring: {done} of {passages} passages"),
        )
    for ratio in (0.25, 0.5, 0.7):
        keys, values = moments.kept(ratio).mean(1).tolist()
        out.print(
            f"{ratio:4.0%} of the rank holds {keys:.1%} of keys' squares and {values:.1%} of values'",
            highlight=False,
        )
    out.print(str(path), highlight=False, soft_wrap=True)


@calibrate_app.command()
def kvsharer(
    model: Model = DEFAULT_MODEL,
    text: Text = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers to share at most.")] = 4,
    passages: Passages = 30,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a passage.")] = 64,
    cosine: Annotated[float, typer.Option(help="How similar final hidden states must stay.")] = 0.5,
    threads: Threads = None,
) -> None:
    """Find the layers that can read the keys and values of others under `kvsharer`."""
    from tokenloom.methods.kv.kvsharer_calibration import calibrate

    engine = _engine(model, tokens, threads)
    with err.status("measuring") as status:
        found = calibrate(
            engine,
            text,
            layers=layers,
            num_passages=passages,
            tokens=tokens,
            cosine=cosine,
            progress=lambda done: status.update(f"measuring: {done} of {layers} layers"),
        )
    for (layer, root), similar in zip(found.pairs, found.cosines, strict=True):
        out.print(f"layer {layer:3} reads layer {root:3}  cosine {similar:.3f}", highlight=False)
    out.print(f"{found.tried} pairs tried\n{found.path}", highlight=False, soft_wrap=True)


def _engine(model: str, tokens: int, threads: int | None) -> Engine:
    from tokenloom.config import load_settings
    from tokenloom.engine.engine import Engine

    flags = {"model.name": model, **({} if threads is None else {"model.threads": threads})}
    with err.status(f"loading {model}"):
        return Engine(load_settings(flags))
