"""`tokenloom train`: what a method learns of a frozen model, once."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from tokenloom.errors import RequestError
from tokenloom.models.catalog import DEFAULT_MODEL

if TYPE_CHECKING:
    from torch import Tensor

train_app = typer.Typer(no_args_is_help=True, help="Train what a method needs for a model, once.")
out, err = Console(), Console(stderr=True)

LOG_EVERY = 10


@train_app.callback()
def train() -> None:
    """Train what a method needs for a model, once; the model itself stays as it is."""


@train_app.command()
def ppd(
    model: Annotated[str, typer.Option("--model", "-m", help="Catalog name, folder or .gguf file.")] = (
        DEFAULT_MODEL
    ),
    prompts: Annotated[int, typer.Option(min=1, max=8, help="Prompt tokens (S).")] = 3,
    texts: Annotated[int, typer.Option(min=1, help="Prompts whose greedy answers are learned from.")] = 480,
    held_out: Annotated[int, typer.Option(min=1, help="Other prompts, to measure on.")] = 80,
    new_tokens: Annotated[int, typer.Option(min=8, help="Most tokens of an answer.")] = 160,
    steps: Annotated[int, typer.Option(min=1, help="Of the optimizer.")] = 700,
    cuts: Annotated[int, typer.Option(min=1, help="Cuts of each of the two texts of a step.")] = 32,
    rate: Annotated[float, typer.Option(min=0.0, help="Of learning, at first.")] = 1e-2,
    seed: Annotated[int, typer.Option(help="Of the prompts and the cuts.")] = 0,
    float32: Annotated[bool, typer.Option(help="Multiply in 32 bits; by default in bfloat16.")] = False,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Train nothing: measure what there is, and what it must beat.")
    ] = False,
    log: Annotated[Path | None, typer.Option(help="A JSON file for the training log.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; 0 takes torch's own choice.")] = None,
    server: Annotated[str, typer.Option(help="URL of a running server: it trains for its own model.")] = "",
    api_key: Annotated[str, typer.Option(help="For the server.")] = "",
) -> None:
    """Train the prompt tokens of `ppd`, or measure them, on the model's own greedy answers."""
    if server:
        from tokenloom.finetune_cli import Display
        from tokenloom.train_server import train_ppd_on_server

        if evaluate or float32 or log is not None or threads is not None:
            raise RequestError("server: --evaluate, --float32, --log and --threads are of a training here")
        train_ppd_on_server(
            server,
            api_key,
            texts=texts,
            held_out=held_out,
            new_tokens=new_tokens,
            steps=steps,
            rate=rate,
            seed=seed,
            knobs={"prompts": prompts, "cuts": cuts},
            display=Display(out, as_json=False),
        )
        out.print("The server drafts with it from now on where a request says draft=ppd.")
        return
    import torch

    from tokenloom.config import load_settings
    from tokenloom.engine.engine import Engine
    from tokenloom.methods.calibration import load, shape_of
    from tokenloom.methods.drafting import ppd_text, ppd_training
    from tokenloom.methods.drafting.ppd_student import Student

    flags = {"model.name": model, **({} if threads is None else {"model.threads": threads})}
    recipe = ppd_training.Recipe(
        prompts=prompts,
        steps=steps,
        cuts=cuts,
        rate=rate,
        seed=seed,
        dtype=torch.float32 if float32 else torch.bfloat16,
    )
    with err.status(f"loading {model}") as status:
        engine = Engine(load_settings(flags))
        if evaluate:  # fails at once where there is nothing
            trained = load("ppd", shape_of(engine, 1), hook="draft", made_by="train")["embeddings"]

        def answers(count: int, apart: bool) -> list[ppd_text.Sample]:
            def tell(done: int) -> None:
                status.update(f"writing {'held-out ' if apart else ''}answers: {done} of {count}")

            return ppd_text.answers(engine, count, new_tokens, seed, apart, progress=tell)

        learned, kept = answers(texts, False), answers(held_out, True)
        about: dict[str, Any] = {
            "model": engine.name,
            "answers": len(learned),
            "tokens": sum(len(sample.tokens) - sample.start for sample in learned),
            "held_out_answers": len(kept),
            "prompts": prompts,
            "steps": steps,
            "texts_per_step": recipe.texts,
            "cuts": cuts,
            "rate": rate,
            "decay": recipe.decay,
            "seed": seed,
            "dtype": str(recipe.dtype).removeprefix("torch."),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
        }
        if not evaluate:

            def step(at: int, losses: list[float]) -> None:
                said = "  ".join(f"{loss:.3f}" for loss in losses)
                status.update(f"step {at + 1} of {steps}: divergence {said}")
                if (at + 1) % LOG_EVERY == 0:  # also where there is no terminal
                    err.print(f"step {at + 1} of {steps}: divergence {said}, {_clock()}")

            found = ppd_training.train(engine, learned, recipe, step)
            trained = found.embeddings
            about |= {"seconds": round(found.seconds), "losses": _means(found.losses)}
        status.update("measuring")
        student = Student(engine, recipe.dtype)
        generator = torch.Generator().manual_seed(seed)
        first = ppd_training.first_embeddings(engine, len(trained)).float().cpu()
        random = first.std() * torch.randn(first.shape, generator=generator)
        tables = {
            "trained": ppd_training.accuracy(engine, student, trained, kept),
            "untrained": ppd_training.accuracy(engine, student, first, kept),
            "random": ppd_training.accuracy(engine, student, random, kept),
            "bigrams": ppd_training.bigram_accuracy(learned, kept, len(trained)),
        }
        about["accuracy"] = {name: table.tolist() for name, table in tables.items()}
    _print(tables)
    if log is not None:
        try:
            log.write_text(json.dumps(about, indent=1), encoding="utf-8")
        except OSError as error:
            raise RequestError(f"log: {log}: cannot be written ({error})") from error
    if not evaluate:
        out.print(str(ppd_training.keep(engine, found, tables["trained"], about)), soft_wrap=True)


def _clock() -> str:
    return time.strftime("%H:%M:%S")


def _means(losses: list[list[float]]) -> list[list[float]]:
    """Of every few steps, by prompt token."""
    parts = [losses[i : i + LOG_EVERY] for i in range(0, len(losses), LOG_EVERY)]
    return [[round(sum(column) / len(part), 4) for column in zip(*part, strict=True)] for part in parts]


def _print(tables: dict[str, Tensor]) -> None:
    offsets = range(2, 2 + len(tables["trained"]))
    columns = [
        Column(f"{kind}, {i} ahead", justify="right") for i in offsets for kind in ("first", "first 10")
    ]
    table = Table("guesses", *columns, title="how often they are right, on held-out answers", box=SIMPLE)
    for name, found in tables.items():
        cells = [f"{value:.1%}" for row in found for value in (float(row[0]), float(row.sum()))]
        table.add_row(name, *cells)
    out.print(table)
