"""The end of an iteration: what its tokens are to the requests that asked for them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tokenloom.engine.outputs import Delta, StepOutput
from tokenloom.engine.request import Sequence

if TYPE_CHECKING:
    from tokenloom.engine.engine import Engine


def publish(engine: Engine, ready: list[Sequence], gains: dict[Sequence, Delta]) -> list[StepOutput]:
    """Gather the outputs by request, note when they came, and close the requests that are over.

    Args:
        ready: sequences of which all tokens are computed.
        gains: what has been sampled for those that generate.
    """
    now = time.monotonic()
    outputs: dict[str, StepOutput] = {}
    for sequence in ready:
        if not sequence.generates and sequence.finish_reason is None:
            outputs[sequence.request.request_id] = _prompt_only(engine, sequence)
    for sequence, delta in gains.items():
        request = sequence.request
        output = outputs.get(request.request_id)
        if output is None:
            if request.request_id not in engine.requests:
                continue  # another of its choices was at fault
            output = StepOutput(request.request_id, [], cached_tokens=request.cached_tokens)
            outputs[request.request_id] = output
            if request.first_token_s is None:
                request.first_token_s = now
                engine.counters.ttft.add(now - request.arrival_s, now)
                output.prompt_logprobs = request.prompt_logprobs
            if request.draft is not None:
                output.drafts = request.drafts
        output.deltas.append(delta)
        if sequence.num_output > len(delta.token_ids):
            engine.counters.itl.add(now - sequence.last_token_s, now)
        sequence.last_token_s = now
        if sequence.finish_reason is not None:
            engine.drafting.close(sequence)
        if request.finished and not output.finished:
            output.finished = True
            engine.forget(request)
    return list(outputs.values())


def _prompt_only(engine: Engine, sequence: Sequence) -> StepOutput:
    """The answer of a request that generates nothing: an embedding, or scores with max_tokens=0."""
    request = sequence.request
    engine.finish(sequence, "length")
    deltas = [Delta(i, "", [], finish_reason="length") for i in range(request.params.n)]
    output = StepOutput(request.request_id, deltas, True, request.prompt_logprobs)
    output.cached_tokens = request.cached_tokens
    if request.hidden_sum is not None:
        output.embedding = (request.hidden_sum / len(request.prompt)).tolist()
    engine.forget(request)
    return output
