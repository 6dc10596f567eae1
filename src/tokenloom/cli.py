"""The command line. Heavy imports wait inside the commands, so that `--help` and `--version` are quick."""

from __future__ import annotations

import json
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from tokenloom.bench_cli import bench_app
from tokenloom.calibrate_cli import calibrate_app
from tokenloom.cli_options import (
    KV,
    AdapterFolder,
    Backend,
    Config,
    Device,
    Draft,
    Dtype,
    MaxTokens,
    Model,
    Quantize,
    Seed,
    Set,
    Temperature,
    Threads,
    err,
    fetch,
    model_flags,
    open_llm,
    out,
    pairs,
    read_settings,
)
from tokenloom.errors import TokenloomError
from tokenloom.keys_cli import keys_app
from tokenloom.train_cli import train_app
from tokenloom.version import __version__

if TYPE_CHECKING:
    from tokenloom.llm import LLM

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
models_app = typer.Typer(no_args_is_help=True, help="Models that tokenloom knows or can open.")
app.add_typer(models_app, name="models")
app.add_typer(bench_app, name="bench")
app.add_typer(calibrate_app, name="calibrate")
app.add_typer(train_app, name="train")
app.add_typer(keys_app, name="keys")


def main() -> None:
    """Run the command line; an error that the user can mend is one line, not a traceback."""
    try:
        app()
    except TokenloomError as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from None


@app.callback(invoke_without_command=True)
def tokenloom(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """One engine in which the token is the unit of work: serve and finetune LLMs on the same weights."""
    if version:
        print(f"tokenloom {__version__}")
        raise typer.Exit


@app.command()
def serve(
    model: Model = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    api_key: Annotated[list[str] | None, typer.Option(help="Ask clients for a key; may be repeated.")] = None,
    admin_key: Annotated[list[str] | None, typer.Option(help="Keys for loading adapters.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest prompt plus answer, in tokens.")] = None,
    max_batch_tokens: Annotated[int | None, typer.Option(help="Rows of requests in one iteration.")] = None,
    dtype: Dtype = None,
    device: Device = None,
    quantize: Quantize = None,
    backend: Backend = None,
    threads: Threads = None,
    kv: KV = None,
    draft: Draft = None,
    config: Config = None,
    set_: Set = None,
) -> None:
    """Serve a model over the OpenAI API."""
    flags = {
        "server.host": host,
        "server.port": port,
        "server.api_keys": api_key or None,
        "server.admin_keys": admin_key or None,
        "model.max_model_len": max_model_len,
        "scheduler.max_batch_tokens": max_batch_tokens,
        "methods.kv": kv,
        "methods.draft": draft,
        **model_flags(model, dtype, device, quantize, backend, threads),
    }
    from tokenloom.logs import set_up_logging
    from tokenloom.methods.defaults import with_drafter, with_methods

    settings = with_methods(read_settings(flags, config, set_))
    set_up_logging(settings.logging)
    fetch(settings.model.name)
    from tokenloom.engine.async_engine import AsyncEngine
    from tokenloom.engine.engine import Engine
    from tokenloom.serve.app import run_server

    with err.status(f"loading {settings.model.name}"):
        engine = AsyncEngine(with_drafter(Engine(settings)))
    run_server(engine, settings, announce=lambda url: _announce(engine.model_name, url))


def _announce(name: str, url: str) -> None:
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello!"}]})
    out.print(f"\n[bold]{name}[/] is served at [bold]{url}[/], to a browser too. Try:\n", highlight=False)
    print(f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'\n")
    print(
        f"{sys.executable} -m pip install --quiet openai\n"
        f"{sys.executable} - <<'EOF'\n"
        "from openai import OpenAI\n"
        f'client = OpenAI(base_url="{url}/v1", api_key="none")\n'
        f'messages = [{{"role": "user", "content": "Hello!"}}]\n'
        f'answer = client.chat.completions.create(model="{name}", messages=messages)\n'
        "print(answer.choices[0].message.content)\n"
        "EOF\n",
        flush=True,
    )


@app.command()
def chat(
    model: Model = None,
    system: Annotated[str, typer.Option(help="A system message.")] = "",
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.2,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 0.9,
    seed: Seed = None,
    adapter: AdapterFolder = None,
    dtype: Dtype = None,
    device: Device = None,
    quantize: Quantize = None,
    backend: Backend = None,
    threads: Threads = None,
    kv: KV = None,
    compress_upto: Annotated[
        int | None, typer.Option(min=1, help="So many first messages are what --kv compresses.")
    ] = None,
    draft: Draft = None,
    config: Config = None,
    set_: Set = None,
) -> None:
    """Chat with a model in the terminal. /reset forgets the conversation, /exit leaves."""
    from tokenloom.engine.sampling_params import SamplingParams
    from tokenloom.text.chat_context import context_tokens

    flags = {
        "methods.kv": kv,
        "methods.draft": draft,
        **model_flags(model, dtype, device, quantize, backend, threads),
    }
    llm = open_llm(flags, config, set_)
    name = _load_adapter(llm, adapter)
    params = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    start = [{"role": "system", "content": system}] if system else []
    history = list(start)
    out.print(f"[dim]{llm.engine.name}. /reset forgets the conversation, /exit leaves.[/]", highlight=False)
    while True:
        try:
            text = out.input("[bold green]you>[/] ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if text == "/exit":
            return
        if text == "/reset":
            history = list(start)
            continue
        if not text:
            continue
        history.append({"role": "user", "content": text})
        answer = ""
        try:
            prompt = llm.tokenizer.encode(llm.tokenizer.render_chat(history), add_special_tokens=False)
            upto = None
            if compress_upto is not None:
                render = partial(llm.tokenizer.render_chat, add_generation_prompt=False)
                messages = min(compress_upto, len(history))  # there are few at first
                upto = context_tokens(llm.tokenizer, render, history, messages, prompt)
            for delta in llm.stream(prompt, params, adapter=name, compress_upto=upto):
                answer += delta.text
                print(delta.text, end="", flush=True)
        except KeyboardInterrupt:  # stop this answer, not the chat
            answer += " [stopped]"
        except TokenloomError as error:
            err.print(f"[red]{error}[/]", highlight=False)
            history.pop()
            continue
        print()
        history.append({"role": "assistant", "content": answer})


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    model: Model = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    n: Annotated[int, typer.Option(help="How many answers.")] = 1,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object per answer.")] = False,
    adapter: AdapterFolder = None,
    dtype: Dtype = None,
    device: Device = None,
    quantize: Quantize = None,
    backend: Backend = None,
    threads: Threads = None,
    kv: KV = None,
    compress_upto: Annotated[
        int | None, typer.Option(min=1, help="So many first tokens are what --kv compresses.")
    ] = None,
    draft: Draft = None,
    config: Config = None,
    set_: Set = None,
) -> None:
    """Continue a prompt and print the text."""
    from tokenloom.engine.sampling_params import SamplingParams

    text = typer.get_text_stream("stdin").read() if prompt == "-" else prompt
    flags = {
        "methods.kv": kv,
        "methods.draft": draft,
        **model_flags(model, dtype, device, quantize, backend, threads),
    }
    llm = open_llm(flags, config, set_)
    name = _load_adapter(llm, adapter)
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed, n=n)
    if n == 1 and not json_:
        for delta in llm.stream(text, params, adapter=name, compress_upto=compress_upto):
            print(delta.text, end="", flush=True)
        print()
        return
    [output] = llm.generate(text, params, adapter=name, compress_upto=compress_upto)
    for choice in output.completions:
        fields = {"text": choice.text, "tokens": len(choice.token_ids), "finish_reason": choice.finish_reason}
        print(json.dumps(fields, ensure_ascii=False) if json_ else f"[{choice.index}] {choice.text}")


@app.command()
def finetune(
    data: Annotated[Path, typer.Argument(help="JSONL: a chat or a prompt and completion per line.")],
    model: Model = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the adapter.")] = Path("adapter"),
    validation: Annotated[Path | None, typer.Option(help="JSONL to evaluate on at checkpoints.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak rate.")] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA's r.")] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA's scale is alpha / r.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Of LoRA's input.")] = None,
    target_modules: Annotated[str | None, typer.Option(help="Comma-separated, e.g. q_proj,v_proj.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-O", help="Any other option of the jobs API, KEY=VALUE.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the adapter, the order of examples and dropout.")] = 0,
    server: Annotated[str, typer.Option(help="URL of a running server that is to train.")] = "",
    api_key: Annotated[str, typer.Option(help="For the server.")] = "",
    suffix: Annotated[str | None, typer.Option(help="Part of the new model's name on the server.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object per step.")] = False,
    dtype: Dtype = None,
    device: Device = None,
    quantize: Quantize = None,
    backend: Backend = None,
    threads: Threads = None,
    config: Config = None,
    set_: Set = None,
) -> None:
    """Train a LoRA adapter, here or on a running server. Ctrl-C stops; the same command goes on."""
    from tokenloom.finetune_cli import Display, train_on_server, train_standalone

    options: dict[str, Any] = {
        "n_epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "r": rank,
        "alpha": alpha,
        "dropout": dropout,
        "target_modules": [name.strip() for name in target_modules.split(",")] if target_modules else None,
        **pairs(option, "--option"),
    }
    options = {key: value for key, value in options.items() if value is not None}
    display = Display(err if json_ else out, json_)
    if server:
        name = train_on_server(server, api_key, model, data, validation, suffix, seed, options, display)
        print(json.dumps({"fine_tuned_model": name}) if json_ else f"{name} is ready: name it as the model")
        return
    settings = read_settings(model_flags(model, dtype, device, quantize, backend, threads), config, set_)
    fetch(settings.model.name)
    folder = train_standalone(settings, data, output, validation, seed, options, display)
    use = shlex.join(["tokenloom", "chat", "--adapter", str(folder), "--model", settings.model.name])
    print(json.dumps({"adapter": str(folder)}) if json_ else f"The adapter is in {folder}. Try:\n{use}")


@app.command()
def top(
    url: Annotated[str, typer.Option(help="Where the server listens.")] = "http://127.0.0.1:8000",
    key: Annotated[
        str, typer.Option(envvar="TOKENLOOM_API_KEY", help="An API key, if it asks for one.")
    ] = "",
    interval_s: Annotated[float, typer.Option(min=0.25, max=60, help="Seconds between frames.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and exit.")] = False,
) -> None:
    """Watch a running server: iterations, latencies, KV pool, requests, jobs. Ctrl-C leaves."""
    from tokenloom.top_cli import run_top

    run_top(out, url, key, interval_s, once)


@models_app.command("list")
def list_models() -> None:
    """List the catalog, and which of it is on this machine."""
    from tokenloom.models.catalog import entries

    table = Table("name", "title", "licence", "size", "pulled")
    for entry in entries():
        size = f"{entry.size_bytes / 1e6:.0f} MB"
        table.add_row(entry.name, entry.title, entry.license, size, "yes" if entry.is_pulled() else "no")
    out.print(table)


@models_app.command("pull")
def pull_model(
    name: Annotated[str, typer.Argument(help="Catalog name or owner/name on the hub.")] = "",
) -> None:
    """Fetch a model into the cache; the default one if no name is given."""
    from tokenloom.models.catalog import DEFAULT_MODEL, pull

    print(pull(name or DEFAULT_MODEL))


@models_app.command("show")
def show_model(name: Annotated[str, typer.Argument(help="Catalog name, folder or .gguf file.")]) -> None:
    """Show a model's shape, size and context without loading its weights."""
    from tokenloom.models.loader import describe, open_model

    table = Table("field", "value", show_header=False)
    for field, value in describe(open_model(name)).items():
        table.add_row(field, str(value))
    out.print(table)


@app.command("methods")
def list_methods(
    name: Annotated[str, typer.Argument(help="Show the knobs of this one.")] = "",
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the published methods that can be switched on, or one method's knobs and their defaults."""
    from tokenloom.methods.show import show_method, show_methods

    (show_method(name, out, json_) if name else show_methods(out, json_))


def _load_adapter(llm: LLM, folder: Path | None) -> str | None:
    """Load an adapter under its folder's name; the name, or None without one."""
    if folder is None:
        return None
    llm.load_adapter(folder.resolve().name, folder)
    return folder.resolve().name
