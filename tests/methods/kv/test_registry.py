"""Specs: what they ask for, and what is said about those that cannot be read."""

from __future__ import annotations

import json
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kv_rig import answer, bits, build_engine, text_of, tiny_files, tokens
from tokenloom.cli import app
from tokenloom.config import ConfigError, Settings, load_settings
from tokenloom.errors import RequestError
from tokenloom.methods.defaults import with_methods
from tokenloom.methods.kv import combine, from_press
from tokenloom.methods.registry import entries, parse, spec_of


def test_a_spec_names_methods_with_knobs() -> None:
    (snapkv, scorer), (pyramid, budget) = parse("snapkv(budget=0.25, pooling=max) + pyramid", "kv")
    assert (snapkv.name, scorer.budget, scorer.pooling, scorer.window) == ("snapkv", 0.25, "max", 32)
    assert (pyramid.name, budget.beta) == ("pyramid", 20.0)


@pytest.mark.parametrize("spec", ["", "  ", "off"])
def test_no_method_is_asked_for(spec: str) -> None:
    assert combine(spec) is None


@pytest.mark.parametrize("entry", entries(), ids=lambda e: f"{e.hook}-{e.name}")
def test_a_spec_in_full_means_the_same(entry) -> None:  # type: ignore[no-untyped-def]
    made = entry.make()
    assert parse(spec_of(entry, made), entry.hook) == [(entry, made)]


@pytest.mark.parametrize("entry", entries(), ids=lambda e: f"{e.hook}-{e.name}")
def test_every_knob_and_claim_is_told(entry) -> None:  # type: ignore[no-untyped-def]
    assert is_dataclass(entry.make) and entry.title and entry.claim
    for knob in fields(entry.make):
        assert knob.name in (entry.make.__doc__ or ""), f"{entry.name}: {knob.name} is not explained"


FAULTS = {
    "nosuch": "kv: no method 'nosuch'; there are ",
    "snapkv(": "cannot be read; write it like",
    "snapkv(128)": "is not a method",
    "1+snapkv": "'1' is not a method",
    "snapkv-quest": "is not a method",
    "a.b(c=1)": "is not a method",
    "snapkv(size=3)": "snapkv has no knob 'size'; it has budget, window, kernel, pooling",
    "snapkv(**{})": "snapkv has no knob None",
    "snapkv(window=1.5)": "window must be a whole number, not 1.5",
    "snapkv(window=True)": "window must be a whole number, not True",
    "snapkv(pooling=3)": "pooling must be a word, not 3",
    "snapkv(budget=word)": "budget must be a number, not word",
    "snapkv(budget=[1])": "budget must be a number, not [1]",
    "snapkv(budget=0)": "snapkv: budget must be a number of tokens, or a part between 0 and 1, not 0",
    "snapkv(budget=-1)": "budget must be a number of tokens",
    "snapkv(budget=1.5)": "budget must be a number of tokens",
    "snapkv(budget=1e999)": "budget must be",
    "snapkv(kernel=4)": "kernel must be odd",
    "snapkv(window=__import__('os'))": "window must be a whole number",
    "tokenselect(vote=loud)": "vote must be one of soft, head, topk, random, not loud",
    "tokenselect(n_init=100, n_local=100, budget=150)": "leave nothing of the budget",
    "pyramid(beta=0.5)+snapkv": "beta must be at least 1",
    "adakv(alpha=2.0)+snapkv": "alpha must be between 0 and 1",
    "snapkv+keydiff": "snapkv and keydiff are both a scorer; one is enough",
    "quest+tokenselect": "both a selector",
    "snapkv+streaming": "do not go together: both decide what is dropped",
    "quest+streaming": "do not go together",
    "snapkv+pyramid+quest": "do not go together: a selector needs the same tokens in every layer",
    "snapkv+adakv+quest": "do not go together: a selector needs as many tokens in every head",
    "pyramid": "pyramid needs a scorer beside it",
    "merge+quest": "merge needs a scorer beside it",
    "+".join(["snapkv"] * 300): "longer than 1000 characters",
    "(" * 400: "cannot be read",
    "snapkv\x00": "cannot be read",
}


@pytest.mark.parametrize("spec", FAULTS, ids=[f[:40] for f in FAULTS])
def test_faulty_specs_are_refused_by_name(spec: str) -> None:
    with pytest.raises(RequestError) as error:
        combine(spec)
    assert error.value.param == "kv"
    assert FAULTS[spec] in str(error.value)
    assert len(str(error.value)) < 2500


def test_a_servers_own_spec_is_checked_when_it_starts() -> None:
    with pytest.raises(ConfigError, match=r"setting methods.kv: no method 'nosuch'"):
        with_methods(load_settings({"methods.kv": "nosuch"}))
    with pytest.raises(ConfigError, match=r"chunk=256 rows"):
        with_methods(load_settings({"methods.kv": "tokenselect", "scheduler.max_batch_tokens": 128}))
    assert with_methods(load_settings({"methods.kv": "snapkv+int8"})).cache.dtype == "int8"
    assert with_methods(load_settings({})).cache.dtype == "auto"


def test_methods_are_listed_and_shown() -> None:
    run = CliRunner().invoke
    listed = run(app, ["methods", "--json"])
    assert {"snapkv", "quest"} <= {m["name"] for m in json.loads(listed.stdout)}
    shown = run(app, ["methods", "quest"])
    assert shown.exit_code == 0 and "quest(budget=1024, page=16" in shown.stdout.replace("\n", "")
    assert json.loads(run(app, ["methods", "quest", "--json"]).stdout)["arxiv"] == "2406.10774"


# -- methods of one's own -----------------------------------------------------------------------------------

EXAMPLE = Path(__file__).parents[3] / "examples" / "own_kv_method.py"


def with_modules(*modules: str) -> Settings:
    return with_methods(load_settings({"methods.modules": list(modules), "methods.kv": "off"}))


def test_a_file_brings_methods_of_its_own(tmp_path: Path) -> None:
    with_modules(str(EXAMPLE))
    with_modules(str(EXAMPLE))  # a second server in the process
    engine = build_engine(tiny_files(tmp_path), cache__prefix_caching=False)
    prompt = text_of(1, 90)
    plain = bits(answer(engine, prompt))
    assert bits(answer(engine, prompt, "every_other(recent=90)")) != plain
    everything = answer(engine, prompt, "every_other(recent=500)")
    assert tokens(everything) == tokens(answer(engine, prompt))
    few = answer(engine, prompt, "long_keys(budget=20, window=4)+pyramid+merge")
    assert bits(few) != plain and len(tokens(few)[0]) == 12


def test_a_score_like_kvpress_is_taken() -> None:
    class Press:
        """Gets `[1, Hk, n, D]` and gives `[1, Hk, n]`."""

        def score(self, module, hidden_states, keys, values, attentions, kwargs):  # type: ignore[no-untyped-def]
            assert keys.shape == values.shape == (1, 2, 7, 16)
            return keys.norm(dim=-1)

    keys = torch.randn(7, 2, 16)
    assert torch.equal(from_press(Press())(keys, keys, keys[:0]), keys.norm(dim=-1).t())


def test_files_that_cannot_be_imported_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import nosuchmodule\n")
    for name in (str(broken), str(tmp_path / "absent.py"), "tokenloom.nosuch"):
        with pytest.raises(ConfigError, match=f"methods.modules: {re.escape(name)}: "):
            with_modules(name)
    twice = tmp_path / "twice.py"
    twice.write_text(EXAMPLE.read_text().replace("every_other", "quest"))
    with pytest.raises(ConfigError, match="kv has a method"):
        with_modules(str(twice))
