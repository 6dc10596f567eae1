"""Engines on tiny models, and drafters that guess as they are told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tiny_models import build_tiny
from tokenloom.config import load_settings
from tokenloom.engine.draft import Tree, Verified
from tokenloom.engine.engine import Engine
from tokenloom.engine.outputs import Completion, RequestOutput, collect
from tokenloom.engine.request import Request
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.methods.defaults import with_methods
from tokenloom.methods.drafting import draft_method
from tokenloom.models.loader import ModelFiles, open_model

BLOCK = 4


def tiny_files(folder: Path, architecture: str = "llama", **overrides: Any) -> ModelFiles:
    path, _ = build_tiny(folder, architecture, torch.float32, **overrides)
    return open_model(str(path))


def build_engine(files: ModelFiles, **flags: Any) -> Engine:
    defaults = {
        "model.dtype": "float64",
        "cache.block_size": BLOCK,
        "cache.kv_bytes": 2**22,
        "drafting.persist": False,
    }
    keys = {key.replace("__", "."): value for key, value in flags.items()}
    return Engine(with_methods(load_settings({**defaults, **keys})), files)


def request(prompt: list[int], draft: Any = "", name: str = "r", **params: Any) -> Request:
    """draft: a spec, or a method."""
    chosen = {"temperature": 0.0, "logprobs": 2, "ignore_eos": True, "max_tokens": 24, **params}
    method = draft_method(draft) if isinstance(draft, str) else draft
    return Request(name, prompt, SamplingParams(**chosen), draft=method)


def run(engine: Engine, *requests: Request) -> list[RequestOutput]:
    outputs = {
        r.request_id: RequestOutput(r.request_id, r.prompt, [Completion(i) for i in range(r.params.n)])
        for r in requests
    }
    for each in requests:
        engine.add(each)
    steps = 0
    while engine.has_work:
        for output in engine.step():
            collect(outputs[output.request_id], output)
        engine.pool.check()
        steps += 1
        assert steps < 5000
    assert engine.pool.num_used == 0
    return list(outputs.values())


def same(actual: RequestOutput, expected: RequestOutput, tolerance: float = 1e-9) -> None:
    for got, want in zip(actual.completions, expected.completions, strict=True):
        assert got.token_ids == want.token_ids
        assert (got.text, got.finish_reason, got.stop_reason) == (
            want.text,
            want.finish_reason,
            want.stop_reason,
        )
        for a, b in zip(got.logprobs or [], want.logprobs or [], strict=True):
            assert a.token_id == b.token_id and abs(a.logprob - b.logprob) <= tolerance
            assert [t for t, _ in a.top] == [t for t, _ in b.top]


def text_of(seed: int, length: int) -> list[int]:
    return torch.randint(0, 200, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass
class Scripted:
    """A method whose every proposal is `guess(tokens)`, and which remembers what it was told."""

    guess: Callable[[list[int]], Tree]
    fixed: bool = True
    wants: int = 0
    spec: str = "scripted"
    heard: list[Verified] = field(default_factory=list)
    closed: int = 0

    def check(self, engine: Any) -> None: ...

    def drafter(self, place: Any) -> Scripted:
        return self

    def propose(self, tokens: list[int], most: int) -> Tree:
        tree = self.guess(tokens)
        return tree.keep(range(min(most, len(tree))))

    glance = propose

    def learn(self, verified: Verified) -> None:
        self.heard.append(verified)

    def close(self) -> None:
        self.closed += 1


def random_tree(seed: int, nodes: int, spine: list[int], vocab: int = 288) -> Tree:
    """Random nodes, among which the tokens of `spine` are a path from the root; key: depth."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(high: int) -> int:
        return int(torch.randint(0, high, (1,), generator=generator))

    tree, parent = Tree(), -1
    for token in spine:
        for _ in range(drawn(3)):
            tree.add(drawn(vocab), drawn(len(tree) + 1) - 1, "wrong")
        parent = tree.add(token, parent, "right")
    while len(tree) < nodes:
        tree.add(drawn(vocab), drawn(len(tree) + 1) - 1, "wrong")
    return tree


def foretelling(text: list[int], ahead: int, nodes: int = 0) -> Callable[[list[int]], Tree]:
    """Guesses that are right for `ahead` tokens, given the whole text, among random ones."""
    return lambda tokens: random_tree(len(tokens), nodes, text[len(tokens) : len(tokens) + ahead])
