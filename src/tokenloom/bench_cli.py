"""`tokenloom bench`: speed, KV methods and drafters, measured on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tokenloom.cli_options import (
    Backend,
    Config,
    Device,
    Dtype,
    Model,
    Quantize,
    Set,
    Threads,
    err,
    fetch,
    model_flags,
    open_llm,
    out,
    read_settings,
)

bench_app = typer.Typer()


@bench_app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    model: Model = None,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompts.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode per stream.")] = 64,
    streams: Annotated[list[int] | None, typer.Option(help="Concurrent streams; may be repeated.")] = None,
    repeats: Annotated[int, typer.Option(help="Runs of each measurement; the median is reported.")] = 3,
    profile: Annotated[bool, typer.Option(help="Split an iteration into its phases.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    dtype: Dtype = None,
    device: Device = None,
    quantize: Quantize = None,
    backend: Backend = None,
    threads: Threads = None,
    config: Config = None,
    set_: Set = None,
) -> None:
    """Measure prefill, decode and concurrent streams on this machine; or what the commands below measure."""
    if context.invoked_subcommand is not None:
        return
    from tokenloom.bench.throughput import measure, report

    llm = open_llm(model_flags(model, dtype, device, quantize, backend, threads), config, set_)
    results = measure(llm, prompt_tokens, new_tokens, streams or [1, 4, 16], repeats, profile)
    if json_:
        print(json.dumps(results, indent=2))
    else:
        report(results, out)


@bench_app.command("kv")
def bench_kv(
    specs: Annotated[
        list[str] | None, typer.Argument(help="What to compare, e.g. snapkv+adakv; by default every method.")
    ] = None,
    budget: Annotated[
        str,
        typer.Option(help="For specs that name none: tokens, or parts (0.25, 12.5%); grid: 75 to 12.5%."),
    ] = "128,256",
    probe: Annotated[
        str, typer.Option(help="Of text, copy, needle, multikey, summary.")
    ] = "text,copy,needle",
    prompt_tokens: Annotated[int, typer.Option(min=64, help="Length of the prompts, but copy's.")] = 1536,
    rows: Annotated[int, typer.Option(min=2, help="Rows of text that follow, fed one by one.")] = 128,
    copy_tokens: Annotated[int, typer.Option(min=64, help="Filler around copy's block.")] = 1400,
    samples: Annotated[int, typer.Option(min=1, help="Texts of each kind; means are reported.")] = 1,
    keys: Annotated[int, typer.Option(min=1, help="Numbers hidden in a multikey prompt.")] = 8,
    depths: Annotated[
        str, typer.Option(help="Where needles are, as parts of the prompt.")
    ] = "0.1,0.3,0.5,0.7,0.9",
    question_in_prompt: Annotated[
        bool, typer.Option(help="Methods know the question when they choose what to drop.")
    ] = False,
    reuse_prompts: Annotated[
        bool,
        typer.Option(help="Compute a prompt once for all methods that leave it; no first-token times."),
    ] = False,
    text: Annotated[str, typer.Option(help="docs, code (both Python's own), or a file.")] = "docs",
    seed: Annotated[int, typer.Option(help="Of the places in the text, and of all that is drawn.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the files.")] = Path(
        "results/kv"
    ),
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    model: Model = None,
    dtype: Dtype = None,
    device: Device = None,
    quantize: Quantize = None,
    backend: Backend = None,
    threads: Threads = None,
    config: Config = None,
    set_: Set = None,
) -> None:
    """Compare KV methods: quality by probes; bytes, reads and times. Writes results.json and pareto.png."""
    from tokenloom.bench.kv import report
    from tokenloom.bench.kv.probes import Sizes, parse_depths
    from tokenloom.bench.kv.run import measure
    from tokenloom.bench.kv.specs import candidates, default_specs, parse_budgets

    found = candidates(specs or default_specs(), parse_budgets(budget))
    settings = read_settings(model_flags(model, dtype, device, quantize, backend, threads), config, set_)
    fetch(settings.model.name)
    sizes = Sizes(
        prompt_tokens,
        rows,
        copy_tokens,
        depths=parse_depths(depths),
        keys=keys,
        samples=samples,
        question_in_prompt=question_in_prompt,
    )
    with err.status("loading") as status:
        kinds = [kind.strip() for kind in probe.split(",")]
        results = measure(
            settings,
            found,
            kinds,
            sizes,
            source=text,
            seed=seed,
            reuse_prompts=reuse_prompts,
            tell=status.update,
            keep=lambda so_far: report.write_json(so_far, output),
        )
    files = report.write(results, output)
    if json_:
        print(json.dumps(results, indent=2))
    else:
        report.print_table(results, out)
        out.print(f"written: {', '.join(map(str, files))}", highlight=False)


@bench_app.command("drafting")
def bench_drafting(
    specs: Annotated[
        list[str] | None, typer.Argument(help="What to compare, e.g. ngram+token_recycling.")
    ] = None,
    workload: Annotated[str, typer.Option(help="Of chat, code, summary, json, arithmetic.")] = (
        "chat,code,summary,json,arithmetic"
    ),
    temperature: Annotated[str, typer.Option(help="0 is greedy.")] = "0,0.7",
    prompts: Annotated[int, typer.Option(min=1, help="Of each workload.")] = 4,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 128,
    streams: Annotated[int, typer.Option(min=1, help="Prompts answered together.")] = 1,
    curve: Annotated[
        str, typer.Option(help="Token_recycling along k, tree or k,tree, beside the specs.")
    ] = "",
    warming: Annotated[
        bool, typer.Option("--warming", help="Print tokens per pass by answer: what drafters learned.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the prompts, and of what is drawn.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the file.")] = Path(
        "results/drafting"
    ),
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    model: Model = None,
    dtype: Dtype = None,
    device: Device = None,
    quantize: Quantize = None,
    backend: Backend = None,
    threads: Threads = None,
    config: Config = None,
    set_: Set = None,
) -> None:
    """Compare drafters: passes, accepted guesses and tokens/s, against no drafting. Writes results.json."""
    from tokenloom.bench.drafting import curves, ppd_accuracy, report
    from tokenloom.bench.drafting.run import measure

    chosen = [
        *(specs or []),
        *(curves.specs_of([name.strip() for name in curve.split(",")]) if curve else []),
    ]
    flags = {
        "drafting.persist": False,  # nothing may be known of these prompts
        "cache.prefix_caching": False,  # every answer begins with the same chunks
        **model_flags(model, dtype, device, quantize, backend, threads),
    }
    llm = open_llm(flags, config, set_)
    with err.status("measuring") as status:
        results = measure(
            llm,
            chosen or ["ngram", "token_recycling", "token_recycling+ngram"],
            [kind.strip() for kind in workload.split(",")],
            temperatures=[float(part) for part in temperature.split(",")],
            count=prompts,
            new_tokens=new_tokens,
            streams=streams,
            seed=seed,
            tell=status.update,
        )
    if any("ppd" in spec for spec in chosen):
        results["ppd_accuracy"] = ppd_accuracy.accuracy(llm.engine)
        results["ppd_accuracy_of_the_paper"] = ppd_accuracy.PAPER
    path = report.write_json(results, output)
    if json_:
        print(json.dumps(results, indent=2))
        return
    report.print_table(results, out)
    if warming:
        curves.print_warming(results, out)
    if "ppd_accuracy" in results:
        ppd_accuracy.print_accuracy(results["ppd_accuracy"], llm.engine.name, out)
    out.print(f"written: {path}", highlight=False)
