"""PPD's training: the embeddings of S prompt tokens learn to say what the frozen model will say soon."""

from __future__ import annotations

import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenloom.engine.draft import GUESSES
from tokenloom.engine.engine import Engine
from tokenloom.errors import RequestError
from tokenloom.finetune.optimizer import rate_factor
from tokenloom.heap import release_freed_memory
from tokenloom.methods.calibration import shape_of, store
from tokenloom.methods.drafting.ppd_student import Student, distances, read
from tokenloom.methods.drafting.ppd_text import Sample

TRIM_EVERY = 10
"""Steps. Texts differ in length, so the heap is soon full of gaps that nothing fits into."""
FIRST_WORDS = "Next 2 word"
"""Whose embeddings training begins with (official repository)."""


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults are the paper's where it has any.

    Attributes:
        prompts: S, prompt tokens.
        steps: of the optimizer; texts, cuts: of one step, random cuts of each text.
        rate: of AdamW at first; it falls as a cosine.
        decay: weight of a prompt token's loss against that of the one before it.
        dtype: of the products.
    """

    prompts: int = 3
    steps: int = 700
    texts: int = 2
    cuts: int = 32
    rate: float = 1e-2
    decay: float = 0.8
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0


@dataclass
class Trained:
    """embeddings: float32 `[S, d]`. losses: of each step, by prompt token."""

    embeddings: Tensor
    losses: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0


def first_embeddings(engine: Engine, count: int) -> Tensor:
    """Embeddings of a few words, repeated as often as needed, `[S, d]`."""
    ids = engine.tokenizer.encode(FIRST_WORDS, add_special_tokens=False)
    tokens = torch.tensor([ids[i % len(ids)] for i in range(count)], device=engine.device)
    return engine.decoder.embed(tokens).to(torch.promote_types(engine.dtype, torch.float32))


def train(
    engine: Engine,
    samples: Sequence[Sample],
    recipe: Recipe,
    progress: Callable[[int, list[float]], None] = lambda step, losses: None,
) -> Trained:
    """Distil the model into its prompt tokens (PPD, arXiv 2405.18628, section 3).

    The loss is the mean over cuts and prompt tokens i of decay^(i - 1) * KL(teacher || student), the teacher
    being the model itself at the token that prompt token i stands in for.

    Args:
        samples: greedy answers of the model.
        progress: told of each step and its losses by prompt token.

    Raises:
        RequestError: no sample is long enough.
    """
    usable = [sample for sample in samples if _cuts(sample, recipe.prompts)]
    if not usable:
        raise RequestError(f"texts: no answer is longer than {recipe.prompts + 1} tokens")
    draw, start = random.Random(recipe.seed), time.monotonic()
    student = Student(engine, recipe.dtype)
    embeddings = first_embeddings(engine, recipe.prompts).clone().requires_grad_()
    optimizer = torch.optim.AdamW([embeddings], lr=recipe.rate, weight_decay=0.0)
    weights = recipe.decay ** torch.arange(recipe.prompts, device=engine.device)
    done = Trained(embeddings.detach())
    order: list[Sample] = []
    for step in range(recipe.steps):
        optimizer.param_groups[0]["lr"] = recipe.rate * rate_factor("cosine", step, recipe.steps, 0)
        sums = torch.zeros(recipe.prompts, device=engine.device)
        for _ in range(recipe.texts):
            if not order:
                order = draw.sample(usable, len(usable))
            sample = order.pop()
            possible = _cuts(sample, recipe.prompts)
            cuts = draw.sample(possible, min(recipe.cuts, len(possible)))
            prefix = read(engine, sample.tokens, recipe.dtype)
            losses = distances(engine, student, embeddings, cuts, prefix)[0].mean(0)
            (losses * weights).mean().div(recipe.texts).backward()
            sums += losses.detach()
        optimizer.step()
        optimizer.zero_grad()
        if step % TRIM_EVERY == 0:
            release_freed_memory()
        done.losses.append((sums / recipe.texts).tolist())
        progress(step, done.losses[-1])
    done.embeddings = embeddings.detach().float().cpu()
    done.seconds = time.monotonic() - start
    return done


def keep(engine: Engine, trained: Trained, table: Tensor, log: dict[str, Any]) -> Path:
    """Store the embeddings and how often they are right, `[S, GUESSES]`; returns the file."""
    stored = {"embeddings": trained.embeddings.contiguous(), "accuracy": table.float().contiguous()}
    return store("ppd", shape_of(engine, 1), stored, {"training": json.dumps(log)})


def _cuts(sample: Sample, prompts: int) -> range:
    """Where a text may be cut: what prompt tokens guess must be there, and written by the model."""
    return range(sample.start, len(sample.tokens) - prompts)


# -- how good it is ---------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(engine: Engine, student: Student, embeddings: Tensor, samples: Sequence[Sample]) -> Tensor:
    """How often the guess of rank r by prompt token i is the token i + 1 ahead: float64 `[S, GUESSES]`."""
    size = len(embeddings)
    right, count = torch.zeros(size, GUESSES, dtype=torch.float64), 0
    for sample in samples:
        cuts = list(_cuts(sample, size))
        if not cuts:
            continue
        prefix, tokens = read(engine, sample.tokens, student.dtype), torch.tensor(sample.tokens)
        for first in range(0, len(cuts), 64):
            some = cuts[first : first + 64]
            guesses = student.logits(embeddings.to(engine.device), some, prefix).topk(GUESSES).indices.cpu()
            ahead = tokens[torch.tensor(some)[:, None] + 1 + torch.arange(size)]
            right += (guesses == ahead[..., None]).sum(0)
            count += len(some)
    if not count:
        raise RequestError(f"texts: no answer is longer than {size + 1} tokens")
    return right / count


def bigram_accuracy(learned: Sequence[Sample], samples: Sequence[Sample], prompts: int) -> Tensor:
    """The same for a table of what followed the last token at that distance, learned from texts."""
    tables = [defaultdict[int, Counter[int]](Counter) for _ in range(prompts)]
    anywhere: Counter[int] = Counter()
    for sample in learned:
        anywhere.update(sample.tokens[sample.start :])
        for cut in _cuts(sample, prompts):
            for i, table in enumerate(tables):
                table[sample.tokens[cut - 1]][sample.tokens[cut + 1 + i]] += 1
    common = [token for token, _ in anywhere.most_common(2 * GUESSES)]
    right, count = torch.zeros(prompts, GUESSES, dtype=torch.float64), 0
    for sample in samples:
        for cut in _cuts(sample, prompts):
            count += 1
            for i, table in enumerate(tables):
                known = [token for token, _ in table[sample.tokens[cut - 1]].most_common(GUESSES)]
                guesses = list(dict.fromkeys([*known, *common]))[:GUESSES]
                ahead = sample.tokens[cut + 1 + i]
                if ahead in guesses:
                    right[i, guesses.index(ahead)] += 1
    return right / max(1, count)
