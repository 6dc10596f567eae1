"""Guesses in the loop: who guesses, how much of it is verified, what is kept of it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tokenloom.cache.block_pool import OutOfBlocks
from tokenloom.config import home
from tokenloom.engine.draft import GUESSES, Draft, Drafter, DraftPlace, Key, Planned, Tree, Verified
from tokenloom.engine.draft_size import (
    ENGINE_TRIALS,
    GAIN,
    SEQUENCE_TRIALS,
    Acceptance,
    most_promising,
    path_rates,
)
from tokenloom.engine.latency_model import Features, LatencyModel
from tokenloom.engine.pass_times import pass_times

if TYPE_CHECKING:
    from tokenloom.engine.engine import Engine
    from tokenloom.engine.request import Sequence
    from tokenloom.engine.scheduler import Plan

PROBE_AFTER, MOST_WAIT = 16, 256
"""A sequence whose guesses were not worth it tries a few again after so many passes, then twice as many."""
PROBE_NODES = 3
CHEAP_MS = 0.5
"""A proposal that takes longer is made of no more nodes than are tried; others are weighed whole."""
MOST_REFUSED = 64
MOST_NODES = 128
LISTEN_EVERY = 8
"""A sequence that guesses nothing hears of so many passes once what was likely, and how long they take."""


@dataclass(slots=True)
class Guessing:
    """What the engine keeps of a sequence that drafts."""

    drafter: Drafter
    planned: Planned | None
    """The drafter, if it is one of those."""
    acceptance: Acceptance
    cost_ms: float = 0.0
    """What a proposal takes, lately."""
    heard_ms: float = 0.0
    """What it takes, lately, to read its prompt tokens after a pass."""
    most: int = 16
    """Nodes to ask for: more than were worth it last time."""
    idle: int = 0
    """Passes since a guess was worth it; 0 where there was none to weigh."""
    wait: int = PROBE_AFTER
    beside: int = 0
    """Sequences in the pass in which guesses were weighed last."""
    refused: set[tuple[Key, ...]] = field(default_factory=set)
    """Keys of trees that were not worth it since it rests: they still are not."""


@dataclass(slots=True)
class _Asked:
    sequence: Sequence
    guessing: Guessing
    tree: Tree
    rates: list[float] = field(default_factory=list)
    """Of the planned rows, then of the tree's nodes."""
    num_planned: int = 0


class Drafting:
    """Gives sequences in decode a tree of guesses each (`plan`), keeps what became text (`keep`) and learns
    of it (`settle`)."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.shared: dict[Any, Any] = {}
        self.acceptance = Acceptance(ENGINE_TRIALS)
        self._latency: LatencyModel | None = None
        self._features = Features()
        if engine.settings.methods.draft:
            self._model()  # else the first request would wait for it

    # -- before the pass --------------------------------------------------------------------------------

    def plan(self, plan: Plan) -> None:
        """Add guesses to an iteration whose rows are planned, as far as rows and blocks are left over."""
        asked = []
        for sequence in list(plan.rows):
            if sequence.request.draft is None or sequence.num_pending != 1 or not sequence.num_output:
                continue
            try:
                guessing = self._guessing(sequence)
                tree = self._propose(sequence, guessing, len(plan.rows))
            except Exception as error:
                for sibling in sequence.request.sequences:
                    plan.drop(sibling)
                self.engine.on_fault(sequence, error)
                continue
            if tree is not None:
                asked.append(_Asked(sequence, guessing, tree))
            elif _listens(sequence, guessing):
                plan.drafts[sequence] = Draft(Tree())
        asked = [part for part in asked if part.sequence in plan.rows]
        if asked:
            self._choose(plan, asked)
        for part in asked:
            tree = self._with_blocks(part.sequence, part.tree) if part.tree.num_rows else part.tree
            if tree.num_rows or _listens(part.sequence, part.guessing):
                plan.drafts[part.sequence] = Draft(tree)
                plan.num_rows += tree.num_rows
        if plan.drafts:
            self._features = features_of(plan)

    def _guessing(self, sequence: Sequence) -> Guessing:
        if sequence.guessing is None:
            request, engine = sequence.request, self.engine
            assert request.draft is not None
            adapter = request.adapter.name if request.adapter is not None else ""
            place = DraftPlace(
                engine.name,
                engine.config.vocab_size,
                (adapter, request.cache_salt),
                self.shared,
                home() if engine.settings.drafting.persist else None,
                engine,
            )
            acceptance = Acceptance(SEQUENCE_TRIALS, self.acceptance)
            drafter = request.draft.drafter(place)
            planned = drafter if isinstance(drafter, Planned) else None
            sequence.guessing = Guessing(drafter, planned, acceptance)
        return sequence.guessing

    def _propose(self, sequence: Sequence, guessing: Guessing, beside: int) -> Tree | None:
        """None: it rests, and says nothing at a glance."""
        drafter, room = guessing.drafter, min(self.engine.settings.drafting.max_nodes, MOST_NODES)
        # Fewer neighbours than when guesses were not worth it may leave room for them.
        resting = not drafter.fixed and 0 < guessing.idle < guessing.wait and beside >= guessing.beside
        if drafter.fixed:
            most = room
        elif guessing.idle >= guessing.wait and guessing.cost_ms > CHEAP_MS:
            most = min(PROBE_NODES, room)
        else:
            most = min(guessing.most, room)
        if resting:
            tree = drafter.glance(sequence.tokens, most)
            if not len(tree) or tuple(tree.keys) in guessing.refused:
                guessing.idle += 1
                return None
        depth = self._depth(sequence)
        if depth < 1:
            return None
        if not resting:
            start = time.perf_counter()
            tree = drafter.propose(sequence.tokens, most)
            took_ms = (time.perf_counter() - start) * 1e3
            guessing.cost_ms += 0.2 * (took_ms - guessing.cost_ms)
        if tree.num_rows <= most and max(tree.depths, default=0) <= depth:
            return tree
        return tree.keep([i for i, d in enumerate(tree.depths) if d <= depth]).within(most)

    def _choose(self, plan: Plan, asked: list[_Asked]) -> None:
        """Cut each tree to what is verified in this pass."""
        room = self.engine.settings.scheduler.max_batch_tokens - plan.num_rows
        for part in asked:
            if part.guessing.drafter.fixed:
                part.tree = part.tree.within(room)
                room -= part.tree.num_rows
        for part in asked:
            if not part.guessing.drafter.fixed:
                gains = self._gains(part)
                part.rates = [*gains, *path_rates(part.tree, part.guessing.acceptance)]
                part.num_planned = len(gains)
        free = [part for part in asked if part.rates]
        if not free:
            return
        fixed = sum(part.tree.num_rows for part in asked if part.guessing.drafter.fixed)
        cost_ms = sum(part.guessing.cost_ms + part.guessing.heard_ms for part in free)
        base = features_of(plan)
        context = max(len(part.sequence.tokens) for part in free)
        latency = self._model()

        def time_of(n: int) -> float:
            more = n + fixed
            features = Features(base.rows + more, base.context + more * context, base.head_rows + more)
            return latency.corrected(features) + (cost_ms if n else 0.0)

        decodes = sum(sequence.num_pending == rows for sequence, rows in plan.rows.items())
        chosen = most_promising([part.rates for part in free], decodes, room, time_of)
        for part, nodes in zip(free, chosen, strict=True):
            due = not nodes and part.guessing.idle >= part.guessing.wait
            # Where even guesses that are all right would lose, there is nothing to find out.
            n = min(room, PROBE_NODES) if due else 0
            hopeful = n > 0 and (decodes + n) * time_of(0) >= GAIN * decodes * time_of(n)
            self._adapt(part, nodes, hopeful)
            part.guessing.beside = len(plan.rows)

    def _gains(self, part: _Asked) -> list[float]:
        """What planned rows bring, where there is still something to guess."""
        planned, idle = part.guessing.planned, part.guessing.idle
        if planned is None or 0 < idle < part.guessing.wait or self._depth(part.sequence) < 1:
            return []
        return planned.gains(min(self.engine.settings.drafting.max_nodes, MOST_NODES))

    def _adapt(self, part: _Asked, chosen: list[int], hopeful: bool) -> None:
        guessing = part.guessing
        rows = sum(i < part.num_planned for i in chosen)
        nodes = [i - part.num_planned for i in chosen if i >= part.num_planned]
        due = guessing.idle >= guessing.wait
        if chosen or due or len(guessing.refused) >= MOST_REFUSED:
            guessing.refused.clear()
        if chosen:
            guessing.idle, guessing.wait = 0, PROBE_AFTER
            guessing.most = min(2 * len(nodes) + 8, MOST_NODES)
        elif due and hopeful:
            nodes = list(range(min(PROBE_NODES, len(part.tree))))
            guessing.idle, guessing.wait = 1, min(2 * guessing.wait, MOST_WAIT)
        else:
            guessing.idle = 1 if due else guessing.idle + 1
            guessing.refused.add(tuple(part.tree.keys))
        if nodes != list(range(len(part.tree))):
            part.tree = part.tree.keep(nodes)
        if rows and guessing.planned is not None:
            guessing.planned.grow(part.tree, part.sequence.tokens, rows)
            depth = self._depth(part.sequence)
            if max(part.tree.depths, default=0) > depth:
                part.tree = part.tree.keep([i for i, d in enumerate(part.tree.depths) if d <= depth])

    def _depth(self, sequence: Sequence) -> int:
        """How many tokens beyond the next one the answer may still have."""
        return self.engine.max_output(sequence.request) - sequence.num_output - 1

    def _with_blocks(self, sequence: Sequence, tree: Tree) -> Tree:
        """As much of the tree as there is memory for: guesses never take a block from anybody's tokens."""
        # Prompt tokens stand beyond what they guess, and the model may have no position there.
        last = self.engine.config.max_position - 1 - sequence.num_computed
        depths = (0, *tree.depths)
        tree.prompts = [max(0, min(n, last - d)) for n, d in zip(tree.prompts, depths, strict=True)]
        table, first = sequence.table, sequence.kv_start + 1
        try:
            table.grow(first + tree.num_rows)
        except OutOfBlocks:
            return tree.within(len(table.blocks) * table.pool.block_size - first)
        return tree

    # -- after it ---------------------------------------------------------------------------------------

    def keep(self, sequence: Sequence, draft: Draft) -> None:
        """The node that the walk has come to became text: its keys and values go behind those before it."""
        target = sequence.num_computed
        source = target - len(draft.path) + 1 + draft.path[-1]
        if source != target:
            slots = [
                torch.tensor([sequence.table.slot(i)], device=self.engine.device) for i in (source, target)
            ]
            self.engine.kv.copy_slots(*slots)
        sequence.num_computed += 1
        if self.engine.scheduler.prefix_caching:
            sequence.publish_blocks(target)

    def settle(self, plan: Plan, logits: Tensor, hidden: Tensor, measured_ms: float | None) -> None:
        """Free what was not accepted, count, and let drafters learn.

        hidden: of all rows of the batch, normalised.
        measured_ms: what the pass took; None where others had a part in it.
        """
        tops, guesses = self._tops(plan, logits), self._guesses(plan, hidden)
        for sequence, draft in plan.drafts.items():
            guessing = sequence.guessing
            if guessing is None:
                continue  # the sequence was at fault
            for key, right in draft.results:
                guessing.acceptance.count(key, right)
            if len(draft.tree):
                for counts in (sequence.request.drafts, self.engine.counters.drafts):
                    counts.add(len(draft.tree), len(draft.path))
            if draft.tree.num_rows and sequence.finish_reason is None:
                sequence.table.cut(-(-sequence.kv_start // sequence.table.pool.block_size))
            known = sequence.tokens[-2 - len(draft.path)]
            accepted = [0, *(1 + node for node in draft.path)]
            tokens, depths = [known, *draft.tree.tokens], [0, *draft.tree.depths]
            verified = Verified(tokens, depths, accepted, tops.get(sequence, _NOTHING))
            if sequence in guesses:
                verified.guesses = guesses[sequence]
            try:
                guessing.drafter.learn(verified)
            except Exception as error:
                self.engine.on_fault(sequence, error)
        if self._latency is not None and measured_ms is not None:  # the co-server's own learns elsewhere
            self._latency.observe(self._features, measured_ms)

    def _tops(self, plan: Plan, logits: Tensor) -> dict[Sequence, np.ndarray]:
        """The most likely tokens of the rows of drafts, for drafters that want to know."""
        asking = {
            sequence: guessing.drafter.wants
            for sequence in plan.drafts
            if (guessing := sequence.guessing) is not None and guessing.drafter.wants
        }
        if not asking:
            return {}
        drafts = [plan.drafts[sequence] for sequence in asking]
        rows = [draft.first_row + i for draft in drafts for i in range(1 + len(draft.tree))]
        heard = logits if rows == list(range(len(logits))) else logits[rows]
        top = self.engine.decoder.kernels.likeliest(heard, max(asking.values())).cpu().numpy()
        return _apart(asking, top, [1 + len(draft.tree) for draft in drafts])

    def _guesses(self, plan: Plan, hidden: Tensor) -> dict[Sequence, np.ndarray]:
        """What prompt tokens say, of those alone below the last token that became text."""
        asked = {
            sequence: draft.prompt_rows
            for sequence, draft in plan.drafts.items()
            if draft.tree.vectors is not None and draft.prompt_rows and sequence.finish_reason is None
        }
        if not asked:
            return {}
        start, decoder = time.perf_counter(), self.engine.decoder
        logits = decoder.logits(hidden[[row for rows in asked.values() for row in rows]])
        top = decoder.kernels.likeliest(logits, GUESSES).cpu().numpy()
        took_ms = (time.perf_counter() - start) * 1e3 / len(asked)
        for sequence in asked:
            if sequence.guessing is not None:
                sequence.guessing.heard_ms += 0.2 * (took_ms - sequence.guessing.heard_ms)
        return _apart(asked, top, [len(rows) for rows in asked.values()])

    def close(self, sequence: Sequence) -> None:
        """The sequence is over. May be said twice."""
        if sequence.guessing is not None:
            sequence.guessing.drafter.close()
            sequence.guessing = None

    @property
    def num_bytes(self) -> int:
        """Of what drafters keep beyond their sequences."""
        return sum(kept.num_bytes for kept in list(self.shared.values()))

    def _model(self) -> LatencyModel:
        """How long passes take: as the co-server knows, or as a short measurement says, kept on disk."""
        if self.engine.coserver.latency is not None:
            self._latency = None
            return self.engine.coserver.latency
        if self._latency is None:
            self._latency = pass_times(self.engine, home() if self.engine.settings.drafting.persist else None)
        return self._latency


_NOTHING = torch.empty(0, 0, dtype=torch.int64).numpy()


def _listens(sequence: Sequence, guessing: Guessing) -> bool:
    """Whether a sequence hears of a pass in which it guesses nothing. Where its guesses are not worth it, it
    loses little by hearing a part: that costs as much as a few of them would."""
    cold = guessing.drafter.wants > 0 and guessing.idle == 0
    return cold or sequence.num_output % LISTEN_EVERY == 0


def _apart(sequences: Iterable[Sequence], rows: np.ndarray, counts: list[int]) -> dict[Sequence, np.ndarray]:
    """Rows that lie one after another, by their sequence."""
    ends = list(accumulate(counts))
    return {
        sequence: rows[end - count : end]
        for sequence, end, count in zip(sequences, ends, counts, strict=True)
    }


def features_of(plan: Plan) -> Features:
    """What the time of an iteration's inference depends on, guesses included."""
    features = Features(rows=plan.num_rows)
    for sequence, rows in plan.rows.items():
        start = sequence.num_computed
        features.context += rows * start + rows * (rows + 1) // 2
        features.head_rows += start + rows == len(sequence.tokens)
    for sequence, draft in plan.drafts.items():
        features.head_rows += len(draft.tree)
        features.context += draft.tree.num_rows * len(sequence.tokens)
    return features
