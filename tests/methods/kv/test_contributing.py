"""CONTRIBUTING.md's method in one file is one: taken from the page, registered and run."""

import re
from pathlib import Path

import pytest
import torch

from kv_rig import answer, bits, build_engine, request, run, text_of, tiny_files, tokens
from tokenloom.config import load_settings
from tokenloom.methods.defaults import with_methods
from tokenloom.methods.registry import entries, parse

PAGE = (Path(__file__).parents[3] / "CONTRIBUTING.md").read_text()


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The page's first block of Python, as the module of methods that the page makes of it."""
    path = tmp_path_factory.mktemp("contributing") / "vnorm.py"
    path.write_text(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1])
    with_methods(load_settings({"methods.modules": [str(path)], "methods.kv": "off"}))
    return path


def test_it_is_listed_with_what_it_promises(example):
    [entry] = [entry for entry in entries("kv") if entry.name == "vnorm"]
    assert (entry.title, entry.claim) == ("Value norms", "keeps the tokens whose values are longest")
    assert entry.knobs["budget"] == 1024


def test_its_score_is_the_length_of_the_values(example):
    [(_, method)] = parse("vnorm(budget=8)", "kv")
    values = torch.randn(7, 2, 16)
    scores = method.score(torch.zeros(7, 2, 16), values, values[:0])
    assert torch.allclose(scores, values.square().sum(-1).sqrt().t())


@pytest.fixture(scope="module")
def engine(example, tmp_path_factory):
    return build_engine(tiny_files(tmp_path_factory.mktemp("tiny")), cache__prefix_caching=False)


def test_a_budget_as_long_as_the_prompt_changes_nothing(engine):
    prompt = text_of(1, 40)
    assert bits(answer(engine, prompt, "vnorm(budget=64)")) == bits(answer(engine, prompt))


def test_a_smaller_budget_holds_fewer_blocks_and_goes_with_the_others(engine):
    prompt = text_of(1, 90)

    def held(kv):
        most = []
        run(engine, request(prompt, kv, max_tokens=8), watch=lambda: most.append(engine.pool.num_used))
        return most[-2]

    assert held("vnorm(budget=20, window=4)") < held("") / 2
    together = answer(engine, prompt, "vnorm(budget=0.5)+pyramid+merge")
    assert len(tokens(together)[0]) == 12


@pytest.mark.parametrize("command", re.findall(r"^make (\w+)", PAGE, re.MULTILINE))
def test_its_commands_are_in_the_makefile(command):
    makefile = (Path(__file__).parents[3] / "Makefile").read_text()
    assert re.search(rf"^{command}:", makefile, re.MULTILINE)


NAMED = set(re.findall(r"`((?:src|tests|examples)/[\w/.]+\.py)`", PAGE))
NAMED.remove("src/tokenloom/methods/kv/vnorm.py")  # the one that a contributor writes


@pytest.mark.parametrize("path", sorted(NAMED))
def test_the_files_that_it_names_are_there(path):
    assert (Path(__file__).parents[3] / path).is_file()
