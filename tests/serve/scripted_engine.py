"""A fake engine that says what it is told to, in pieces."""

from __future__ import annotations

from typing import Any

from fake_engine import FakeEngine, FakeStream, _logprob
from tokenloom.engine.outputs import Delta


class ScriptedEngine(FakeEngine):
    """Every choice answers with `pieces`, one in each step, and stops."""

    def __init__(self, *arguments: Any, pieces: list[str], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.pieces = pieces

    def generate(self, prompt_token_ids: list[int], params: Any, **options: Any) -> FakeStream:
        super().generate(prompt_token_ids, params, **options)._end()
        return ScriptedStream(self, self.calls[-1])


class ScriptedStream(FakeStream):
    def _delta(self, index: int, step: int, reason: str | None, error: str | None) -> Delta:
        pieces = self.engine.pieces  # type: ignore[attr-defined]
        params = self.call.params
        logprobs = None if params.logprobs is None else [_logprob(step, 0)]
        return Delta(index, pieces[step], [step], logprobs, reason, error=error)  # type: ignore[arg-type]

    async def __anext__(self) -> Any:
        output = await super().__anext__()
        if self.step == len(self.engine.pieces) and not output.finished:  # type: ignore[attr-defined]
            output.finished = True
            for delta in output.deltas:
                delta.finish_reason = "stop"
            self._end()
        return output
