"""Guesses change nothing of how likely an answer is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from draft_rig import Scripted, build_engine, request, run, text_of, tiny_files
from tokenloom.engine.draft import Tree


def test_drawn_tokens_follow_the_models_own_distribution(tmp_path: Path) -> None:
    """Three tokens of top-k 3 behind a prompt: all 27 answers can be enumerated; many guesses are right."""
    engine = build_engine(tiny_files(tmp_path), scheduler__max_running=128)
    prompt, k, draws = text_of(8, 6), 3, 1536
    params = {"temperature": 1.3, "top_k": k, "max_tokens": 3, "logprobs": None}

    def top(tokens: list[int]) -> tuple[list[int], list[float]]:
        [output] = run(engine, request(tokens, max_tokens=1, logprobs=k))
        entry = (output.completions[0].logprobs or [])[0]
        weights = torch.tensor([p for _, p in entry.top], dtype=torch.float64).div(1.3).softmax(0)
        return [token for token, _ in entry.top], weights.tolist()

    expected: dict[tuple[int, ...], float] = {(): 1.0}
    likely: dict[tuple[int, ...], list[int]] = {}
    for _ in range(3):
        longer = {}
        for path, probability in expected.items():
            likely[path], weights = top([*prompt, *path])
            longer.update({(*path, t): probability * w for t, w in zip(likely[path], weights, strict=True)})
        expected = longer

    def guess(tokens: list[int]) -> Tree:
        tree, path = Tree(), tuple(tokens[len(prompt) :])
        for token in likely.get(path, [])[:2]:
            node = tree.add(token, -1, "first")
            for second in likely.get((*path, token), [])[1:]:
                tree.add(second, node, "second")
        return tree

    seen: Counter[tuple[int, ...]] = Counter()
    accepted = 0
    for seed in range(draws // 128):
        [output] = run(engine, request(prompt, Scripted(guess), seed=seed, n=128, **params))
        seen.update(tuple(choice.token_ids) for choice in output.completions)
        accepted += output.drafts.accepted if output.drafts else 0
    assert accepted > draws / 2
    assert set(seen) <= set(expected)
    merged = [(seen[path], draws * p) for path, p in expected.items() if draws * p >= 5]
    rest = draws - sum(count for count, _ in merged), draws - sum(mean for _, mean in merged)
    cells = [*merged, rest] if rest[1] >= 5 else merged
    chi2 = sum((count - mean) ** 2 / mean for count, mean in cells)
    degrees = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    p_value = 1 - torch.special.gammainc(degrees, torch.tensor(chi2 / 2, dtype=torch.float64))
    assert p_value > 0.01
