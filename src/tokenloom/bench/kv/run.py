"""Methods times probes: runs them all, each beside dense attention on the same tokens."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable
from dataclasses import asdict
from statistics import fmean, median
from typing import Any

import torch

from tokenloom.bench.kv.probes import Probe, Sizes, build
from tokenloom.bench.kv.quality import overlap, quality
from tokenloom.bench.kv.specs import Candidate, settings_for
from tokenloom.bench.kv.teacher import Run, TeacherEngine
from tokenloom.bench.kv.text import Corpus
from tokenloom.config import Settings
from tokenloom.errors import RequestError
from tokenloom.kernels import describe

VERSION = 1


def measure(
    settings: Settings,
    found: list[Candidate],
    kinds: list[str],
    sizes: Sizes,
    *,
    source: str = "docs",
    seed: int = 0,
    reuse_prompts: bool = False,
    tell: Callable[[str], None] = lambda line: None,
    keep: Callable[[dict[str, Any]], object] = lambda results: None,
) -> dict[str, Any]:
    """Run every probe under dense attention and under every candidate.

    Args:
        found: of `candidates`; the first is dense attention.
        kinds: of `probes.KINDS`.
        source, seed: of the text, and of where in it a probe begins.
        reuse_prompts: compute a prompt once for all methods that leave it as dense attention has it: long
            ones take a fraction of the time, but `ttft_ms` says nothing then.
        tell: is told what runs now; keep: is given the results so far, after each probe.

    Returns:
        Ready for JSON: see `docs/methods/kv.md`. A candidate that the engine refuses has an `error`.

    Raises:
        RequestError: a probe cannot be built, or dense attention cannot run it.
    """
    engine = TeacherEngine(settings, reuse_prompts=reuse_prompts)
    probes = build(kinds, Corpus(engine.tokenizer, source, seed), sizes)
    rows: list[dict[str, Any]] = [
        {**asdict(candidate), "error": None, "probes": [], "groups": {}} for candidate in found
    ]
    results: dict[str, Any] = {
        "version": VERSION,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "model": engine.name,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "device": str(engine.device),
        "backend": describe(engine.decoder.kernels),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {platform.processor() or platform.system()}",
        "text": source,
        "seed": seed,
        "sizes": asdict(sizes),
        "reuse_prompts": reuse_prompts,
        "methods": rows,
    }
    engines = {settings.cache.dtype: engine}
    for i, probe in enumerate(probes):
        count = f"{probe.group} ({i + 1} of {len(probes)})"
        tell(f"dense attention: {count}")
        dense = engine.run(probe.prompt, probe.given, new_tokens=probe.new_tokens)
        for candidate, row in zip(found, rows, strict=True):
            if row["error"] is not None or (probe.group == "copy absent" and candidate is not found[0]):
                continue
            tell(f"{candidate.spec}: {count}")
            try:
                needed = settings_for(candidate, settings)
                if needed.cache.dtype not in engines:
                    engines[needed.cache.dtype] = TeacherEngine(needed, reuse_prompts=reuse_prompts)
                row["probes"].append(_result(engines[needed.cache.dtype], candidate, probe, dense))
            except RequestError as error:
                row["error"] = str(error)
        for row in rows:
            row["groups"] = _by_group(row["probes"])
        keep(results)
    return results


def _result(engine: TeacherEngine, candidate: Candidate, probe: Probe, dense: Run) -> dict[str, Any]:
    """One candidate's run of one probe, against dense attention's."""
    method = candidate.method()
    run = dense if candidate.spec == "off" else engine.run(probe.prompt, dense.tokens, method)
    result = {
        "group": probe.group,
        "prompt_tokens": len(probe.prompt),
        **quality(run.logits, dense.logits, dense.tokens, probe.answers),
        "kv_bytes": run.kv_bytes[0],
        "kv_bytes_end": run.kv_bytes[-1],
        "kv_bytes_peak": run.peak_bytes,
        "tokens_read": fmean(run.tokens_read),
        "ttft_ms": run.ttft_ms,
        "tpot_ms": median(run.step_ms),
    }
    if probe.given is None:
        own = run.tokens
        if candidate.spec != "off":
            own = engine.run(probe.prompt, None, method, new_tokens=probe.new_tokens).tokens
        result["overlap"] = overlap(own, dense.tokens)
    return result


def _by_group(probes: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means of every number over the probes of a group."""
    groups: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(probe["group"] for probe in probes):
        members = [probe for probe in probes if probe["group"] == name]
        numbers = [key for key, value in members[0].items() if not isinstance(value, str)]
        groups[name] = {key: fmean(member[key] for member in members) for key in numbers}
    return groups
