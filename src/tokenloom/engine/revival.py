"""A new engine in the place of one whose state is not to be trusted: the same weights, an empty pool, and the
requests at the token up to which their clients know them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

from tokenloom.engine.engine import Engine
from tokenloom.engine.logits_processor import accept_token
from tokenloom.engine.outputs import StepOutput
from tokenloom.engine.request import Request
from tokenloom.engine.setup import allocate_kv


@dataclass(slots=True)
class Told:
    """What of a request has been given to its reader. A sampled token that is not among it never was."""

    tokens: dict[int, int] = field(default_factory=dict)
    """How many, by choice."""
    ended: set[int] = field(default_factory=set)

    def add(self, output: StepOutput) -> None:
        """Count an output that is given to the reader."""
        for delta in output.deltas:
            self.tokens[delta.index] = self.tokens.get(delta.index, 0) + len(delta.token_ids)
            if delta.finish_reason is not None:
                self.ended.add(delta.index)


def successor(engine: Engine, *, deserted: bool) -> Engine:
    """An engine over the same weights and adapters, with no request.

    Args:
        deserted: a thread may still be at work in the old one, whose memory is left to it. Otherwise the new
            one has the same memory, and the old one must not be used again.

    Raises:
        ModelError: there is no memory for a second pool.
    """
    new = copy.copy(engine)
    cache = engine.settings.cache
    if deserted:
        kv = allocate_kv(engine.config, cache, engine.dtype, engine.device, engine.max_model_len)
    else:
        kv = engine.kv
        if engine.pool.tier is not None:
            engine.pool.tier.close()
    new.begin(kv)
    new.coserver.latency = engine.coserver.latency
    return new


def carry_over(engine: Engine, request: Request, told: Told) -> Request:
    """Queue a request of another engine: its prompt and what has been told are computed again, and the rest
    follows as it would have, since what is drawn depends on seed, choice and position alone.

    Returns:
        What stands for it in the new engine.
    """
    going_on = any(told.tokens.values())
    drafts = replace(request.drafts, accepted_at=list(request.drafts.accepted_at))
    heir = replace(request, sequences=[], forked=False, hidden_sum=None, drafts=drafts)
    heir.seed = request.seed
    if going_on:
        heir.prompt_logprobs = request.prompt_logprobs
    else:
        heir.first_token_s = None
    heir.sequences = [engine.new_sequence(heir, 0)]
    engine.requests[heir.request_id] = heir
    if going_on and request.forked:
        heir.forked = True
        heir.sequences += [engine.new_sequence(heir, i) for i in range(1, request.params.n)]
    for sequence, old in zip(heir.sequences, request.sequences, strict=False):
        output = old.output[: told.tokens.get(old.index, 0)]
        for count, token in enumerate(output, start=1):
            accept_token(sequence, token)
            sequence.tokens.append(token)
            sequence.text.push(token, count)
        sequence.last_token_s = old.last_token_s
        if old.index in told.ended:
            sequence.finish_reason, sequence.stop_reason = old.finish_reason, old.stop_reason
        else:
            engine.scheduler.add(sequence)
    return heir
