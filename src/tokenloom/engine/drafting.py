"""Guesses in the loop: who guesses, how much of it is verified, what is kept of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tokenloom.cache.block_pool import OutOfBlocks
from tokenloom.config import home
from tokenloom.engine.draft import GUESSES, Draft, Drafter, DraftPlace, Planned, Tree, Verified
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
MOST_NODES = 128
CHEAP = 0.02
"""A proposal that takes a larger part of a pass than this is not made where the last one was not worth it."""


LISTEN_EVERY = 4
"""A sequence whose guesses are not worth it hears the most likely tokens of so many passes once."""


@dataclass(slots=True)
class Guessing:
    """What the engine keeps of a sequence that drafts."""

    drafter: Drafter
    acceptance: Acceptance
    cost_ms: float = 0.0
    """What a proposal takes, lately."""
    heard_ms: float = 0.0
    """What it takes, lately, to read its prompt tokens after a pass."""
    most: int = 16
    """Nodes to ask for: more than were worth it last time."""
    idle: int = 0
    wait: int = PROBE_AFTER


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
        self._pass_ms = 0.0
        """What the last pass would have taken without guesses."""
        if engine.settings.methods.draft:
            self._model()  # else the first request would wait for it

    # -- before the pass --------------------------------------------------------------------------------

    def plan(self, plan: Plan) -> None:
        """Add guesses to an iteration whose rows are planned, as far as rows and blocks are left over."""
        asked = []
        for sequence in list(plan.rows):
            if sequence.request.draft is not None and sequence.num_pending == 1 and sequence.num_output:
                try:
                    guessing = self._guessing(sequence)
                    asked.append(_Asked(sequence, guessing, self._propose(sequence, guessing)))
                except Exception as error:
                    for sibling in sequence.request.sequences:
                        plan.drop(sibling)
                    self.engine.on_fault(sequence, error)
        asked = [part for part in asked if part.sequence in plan.rows]
        if not asked:
            return
        self._choose(plan, asked)
        for part in asked:
            tree = self._with_blocks(part.sequence, part.tree)
            plan.drafts[part.sequence] = Draft(tree)
            plan.num_rows += tree.num_rows
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
            sequence.guessing = Guessing(request.draft.drafter(place), acceptance)
        return sequence.guessing

    def _propose(self, sequence: Sequence, guessing: Guessing) -> Tree:
        depth = self._depth(sequence)
        room = min(self.engine.settings.drafting.max_nodes, MOST_NODES)
        if guessing.drafter.fixed:
            most = room
        elif guessing.idle >= guessing.wait:
            most = min(PROBE_NODES, room)
        else:
            most = min(guessing.most, room)
        dear = guessing.cost_ms > CHEAP * self._pass_ms
        if dear and 0 < guessing.idle < guessing.wait and not guessing.drafter.fixed:
            guessing.idle += 1
            return Tree()
        if depth < 1:
            return Tree()
        start = time.perf_counter()
        tree = guessing.drafter.propose(sequence.tokens, most)
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

        self._pass_ms = time_of(0)
        decodes = sum(sequence.num_pending == rows for sequence, rows in plan.rows.items())
        chosen = most_promising([part.rates for part in free], decodes, room, time_of)
        # Where even guesses that are all right would lose, there is nothing to find out.
        n = min(room, PROBE_NODES)
        hopeless = n < 1 or (decodes + n) * time_of(0) < GAIN * decodes * time_of(n)
        for part, nodes in zip(free, chosen, strict=True):
            self._adapt(part, nodes, hopeless)

    def _gains(self, part: _Asked) -> list[float]:
        """What planned rows bring, where there is still something to guess."""
        drafter, room = part.guessing.drafter, min(self.engine.settings.drafting.max_nodes, MOST_NODES)
        if isinstance(drafter, Planned) and self._depth(part.sequence) > 0:
            return drafter.gains(room)
        return []

    def _adapt(self, part: _Asked, chosen: list[int], hopeless: bool) -> None:
        guessing = part.guessing
        rows = sum(i < part.num_planned for i in chosen)
        nodes = [i - part.num_planned for i in chosen if i >= part.num_planned]
        probing = guessing.idle >= guessing.wait and not hopeless
        if chosen:
            guessing.idle, guessing.wait = 0, PROBE_AFTER
            guessing.most = min(2 * len(nodes) + 8, MOST_NODES)
        elif probing:
            nodes = list(range(min(PROBE_NODES, len(part.tree))))
            guessing.idle, guessing.wait = 1, min(2 * guessing.wait, MOST_WAIT)
        else:
            guessing.idle += 1
        if nodes != list(range(len(part.tree))):
            part.tree = part.tree.keep(nodes)
        if rows and isinstance(guessing.drafter, Planned):
            guessing.drafter.grow(part.tree, part.sequence.tokens, rows)
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
            if sequence.finish_reason is None:
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
            for sequence, draft in plan.drafts.items()
            if (guessing := sequence.guessing) is not None
            and guessing.drafter.wants
            # To listen costs as much as a few guesses do; a drafter that rests loses little by it.
            and (len(draft.tree) or guessing.idle % LISTEN_EVERY == 0)
        }
        if not asking:
            return {}
        drafts = [plan.drafts[sequence] for sequence in asking]
        rows = [draft.first_row + i for draft in drafts for i in range(1 + len(draft.tree))]
        heard = logits if rows == list(range(len(logits))) else logits[rows]
        top = self.engine.decoder.kernels.top(heard, max(asking.values()))[1].cpu().numpy()
        ends = np.cumsum([1 + len(draft.tree) for draft in drafts])
        return dict(zip(asking, np.split(top, ends[:-1]), strict=True))

    def _guesses(self, plan: Plan, hidden: Tensor) -> dict[Sequence, np.ndarray]:
        """What prompt tokens say, of those alone below the last token that became text."""
        asked = {
            sequence: draft.prompt_rows
            for sequence, draft in plan.drafts.items()
            if draft.prompt_rows and sequence.finish_reason is None
        }
        if not asked:
            return {}
        start, decoder = time.perf_counter(), self.engine.decoder
        logits = decoder.logits(hidden[[row for rows in asked.values() for row in rows]])
        top = decoder.kernels.top(logits, GUESSES)[1].cpu().numpy()
        took_ms = (time.perf_counter() - start) * 1e3 / len(asked)
        for sequence in asked:
            if sequence.guessing is not None:
                sequence.guessing.heard_ms += 0.2 * (took_ms - sequence.guessing.heard_ms)
        ends = np.cumsum([len(rows) for rows in asked.values()])
        return dict(zip(asked, np.split(top, ends[:-1]), strict=True))

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
