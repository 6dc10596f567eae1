"""Who is at fault when a pass fails: that request ends with an error, and all others go on as if it had never
been there."""

from __future__ import annotations

import logging

from tokenloom.engine.engine import Engine
from tokenloom.engine.outputs import StepOutput
from tokenloom.engine.request import Request, Sequence
from tokenloom.engine.scheduler import Plan
from tokenloom.engine.training import Training

logger = logging.getLogger("tokenloom.engine")


class Isolation:
    """Steps an engine so that a fault stays with the request that causes it.

    - A fault of one sequence's own (logits that are not numbers, a method that fails) ends its request.
    - A pass that fails as a whole has changed nothing but keys and values that the next try writes again. Its
      rows are run again without guesses and training; if that fails too, in halves, down to one request.
    - A KV method remembers what a pass showed it, so a pass cannot be repeated under it. Such requests lose
      their KV and wait; they come back one at a time, and one with which a pass fails again is at fault.
    - A job is at fault if batches fail with its rows and run without them, twice in the same training pass.

    Args:
        engine: what it steps. An engine of its own raises on every fault.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        engine.on_fault = self.blame
        self._outputs: list[StepOutput] = []
        self._waiting: list[Request] = []  # of those with a KV method
        self._on_trial: Request | None = None
        self._tokens_before = 0  # that the one on trial had
        self._suspect: tuple[Training, int] | None = None  # and its rows in passes that came to their end

    @property
    def has_work(self) -> bool:
        return self.engine.has_work or bool(self._waiting)

    def step(self) -> list[StepOutput]:
        """An iteration. Raises what is nobody's fault: the engine's state is not to be trusted then."""
        if self._waiting or self._on_trial is not None:
            self._next_trial()
        engine = self.engine
        try:
            outputs = engine.step()
        except Exception as error:
            outputs = self._after(error)
        outputs += self._outputs
        self._outputs = []
        return outputs

    def blame(self, sequence: Sequence, error: Exception) -> None:
        """A request ends because of what happened with one of its sequences."""
        request = sequence.request
        logger.error("request %s failed", request.request_id, exc_info=error)
        for one in request.sequences:
            for block in one.blocks:
                self.engine.pool.disown(block)
        message = f"the engine failed on this request ({type(error).__name__})"
        output = self.engine.fail(request.request_id, "error", message)
        if output is not None:
            self._outputs.append(output)

    # -- a pass that failed -----------------------------------------------------------------------------

    def _after(self, error: Exception) -> list[StepOutput]:
        engine = self.engine
        if engine.under_way is None:
            raise error
        (plan, train_rows), engine.under_way = engine.under_way, None
        logger.warning("a pass failed and is run again", exc_info=error)
        training = engine.coserver.abandon() if train_rows else None
        requests = list(dict.fromkeys(sequence.request for sequence in plan.rows))
        governed = [request for request in requests if request.kv is not None]
        plain = [request for request in requests if request.kv is None]
        guilty = len(self._outputs)
        outputs = self._run(plan, plain) if plain else []
        if len(self._outputs) == guilty:
            if governed == [self._on_trial]:
                self.blame(governed[0].sequences[0], error)
                return outputs
            if training is not None and not governed:
                self._suspect_training(training, error)
        for request in governed:
            self._hold(request)
        return outputs

    def _run(self, plan: Plan, requests: list[Request]) -> list[StepOutput]:
        """The rows that some of a plan's requests have in it, in as few passes as it takes."""
        chosen = set(requests)
        rows = {sequence: rows for sequence, rows in plan.rows.items() if sequence.request in chosen}
        try:
            return self.engine.run_pass(Plan(rows, sum(rows.values())), 0)
        except Exception as error:
            if self.engine.under_way is None:
                raise
            self.engine.under_way = None
            if len(requests) == 1:
                self.blame(next(iter(rows)), error)
                return []
        half = len(requests) // 2
        return self._run(plan, requests[:half]) + self._run(plan, requests[half:])

    def _suspect_training(self, training: Training, error: Exception) -> None:
        if self._suspect == (training, training.rows_run):
            self.engine.coserver.blame(training, error)
        self._suspect = training, training.rows_run

    # -- requests with a KV method ----------------------------------------------------------------------

    def _hold(self, request: Request) -> None:
        for sequence in request.sequences:
            if sequence in self.engine.scheduler.running:
                self.engine.scheduler.set_aside(sequence)
        if request is self._on_trial:
            self._on_trial = None
        self._waiting.append(request)

    def _next_trial(self) -> None:
        trial = self._on_trial
        if trial is not None and not trial.finished and _tokens(trial) == self._tokens_before:
            return
        self._on_trial = None
        while self._waiting and self._on_trial is None:
            request = self._waiting.pop(0)
            left = [sequence for sequence in request.sequences if sequence.finish_reason is None]
            for sequence in left:
                self.engine.scheduler.add(sequence)
            if left:
                self._on_trial, self._tokens_before = request, _tokens(request)


def _tokens(request: Request) -> int:
    return sum(sequence.num_output for sequence in request.sequences)
