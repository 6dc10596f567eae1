"""What any `LogitsProcessor` can count on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grammar_rig import ask, build_engine, run, tiny_files
from tokenloom.engine.engine import Engine
from tokenloom.errors import RequestError


class Banning:
    """Bans every token that the answer already holds, and remembers what it was told."""

    def __init__(self, fail_at: int = -1, error: Exception | None = None) -> None:
        self.fail_at, self.error = fail_at, error
        self.made: list[Banning] = []
        self.seen: list[int] = []

    def processor(self) -> Banning:
        self.made.append(Banning(self.fail_at, self.error))
        return self.made[-1]

    def apply(self, row: Tensor) -> None:
        if len(self.seen) == self.fail_at and self.error is not None:
            raise self.error
        row[self.seen] = -torch.inf

    def accept(self, token: int) -> bool:
        self.seen.append(token)
        return len(self.seen) == 30


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return build_engine(tiny_files(tmp_path_factory.mktemp("tiny")))


def test_each_choice_has_its_own_and_it_sees_every_token_once(engine: Engine) -> None:
    method = Banning()
    [output] = run(engine, ask(engine, n=3, processors=[method], ignore_eos=True, draft="ngram(fixed=True)"))
    assert [made.seen for made in method.made] == [choice.token_ids for choice in output.completions]


def test_what_it_bans_is_not_drawn_and_it_ends_the_answer(engine: Engine) -> None:
    [output] = run(engine, ask(engine, processors=[Banning()], ignore_eos=True))
    [choice] = output.completions
    assert len(set(choice.token_ids)) == len(choice.token_ids) == 30
    assert (choice.finish_reason, choice.stop_reason) == ("stop", None)


def test_it_comes_before_penalties(engine: Engine) -> None:
    """A bias cannot bring back what was banned."""
    bias = {5: 100.0}
    [output] = run(engine, ask(engine, processors=[Banning()], logit_bias=bias, ignore_eos=True))
    assert output.completions[0].token_ids.count(5) == 1


@pytest.mark.parametrize("draft", ["", "ngram(fixed=True)"])
def test_a_failure_ends_its_request_alone(engine: Engine, draft: str) -> None:
    bad = ask(engine, name="bad", processors=[Banning(3, ZeroDivisionError("secret"))], draft=draft)
    good = ask(engine, name="good", max_tokens=20, ignore_eos=True)
    failed, fine = (output.completions[0] for output in run(engine, bad, good))
    assert failed.finish_reason == "error" and len(failed.token_ids) == 3
    assert failed.error == "the engine failed on this request (ZeroDivisionError)"
    assert fine.finish_reason == "length" and len(fine.token_ids) == 20


def test_a_fault_of_the_request_is_told_as_one(engine: Engine) -> None:
    request = ask(engine, processors=[Banning(0, RequestError("kv: too much", param="kv"))])
    engine.add(request)
    [delta] = engine.step()[0].deltas
    assert (delta.finish_reason, delta.error, delta.param) == (
        "error",
        "kv: too much",
        "kv",
    )
    assert not engine.has_work
