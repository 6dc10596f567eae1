"""A context that is compressed before the question that follows it is read."""

from __future__ import annotations

from typing import Any

import pytest

from kv_rig import BLOCK, bits, build_engine, request, run, same, text_of, tiny_files, tokens
from tokenloom.bench.kv.teacher import TeacherEngine
from tokenloom.config import load_settings
from tokenloom.engine.engine import Engine
from tokenloom.engine.outputs import RequestOutput
from tokenloom.errors import RequestError
from tokenloom.methods.kv import combine
from tokenloom.models.loader import ModelFiles

CONTEXT, QUESTION = text_of(1, 70), text_of(2, 13)
SPECS = [
    "snapkv(budget=24, window=8)",
    "snapkv(budget=0.3, window=8)+adakv",
    "snapkv(budget=24, window=8)+pyramid+merge",
    "knorm(budget=24)+quest(budget=12, page=4, dense_layers=0)",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return tiny_files(tmp_path_factory.mktemp("llama"))


def asked(
    engine: Engine, spec: str, question: list[int] = QUESTION, upto: int | None = 70, **options: Any
) -> RequestOutput:
    one = request(CONTEXT + question, spec, **options)
    one.compress_upto = upto
    return run(engine, one)[0]


@pytest.mark.parametrize("spec", SPECS[:3])  # a selector reads a prompt's rows otherwise than an answer's
def test_it_is_a_prompt_whose_answer_begins_with_the_question(files: ModelFiles, spec: str) -> None:
    engine = build_engine(files, cache__prefix_caching=False, model__backend="reference")
    output = asked(engine, spec)
    settings = {"model.dtype": "float64", "cache.block_size": BLOCK, "cache.kv_bytes": 2**22}
    teacher = TeacherEngine(load_settings({**settings, "model.backend": "reference"}), files)
    given = teacher.run(CONTEXT, QUESTION + tokens(output)[0], combine(spec))
    for i, entry in enumerate(output.completions[0].logprobs or []):
        expected = given.logits[len(QUESTION) + i].log_softmax(-1)[entry.token_id]
        assert abs(float(expected) - entry.logprob) < 1e-9


def test_the_budget_is_of_the_context(files: ModelFiles) -> None:
    engine = build_engine(files, cache__prefix_caching=False)
    one = request(CONTEXT + QUESTION, "snapkv(budget=0.5, window=8)")
    one.compress_upto = 70
    engine.add(one)
    engine.step()
    assert engine.pool.num_used == -(-35 // BLOCK)
    engine.step()
    assert engine.pool.num_used == -(-(35 + len(QUESTION)) // BLOCK)
    engine.abort("r")


@pytest.mark.parametrize("spec", SPECS)
def test_questions_about_one_context_share_it(files: ModelFiles, spec: str) -> None:
    cold = build_engine(files, cache__prefix_caching=False, model__backend="reference")
    warm = build_engine(files, model__backend="reference", scheduler__max_batch_tokens=37)
    questions = [QUESTION, text_of(5, 30)]
    for _ in range(2):
        for question in questions:
            same(asked(warm, spec, question), asked(cold, spec, question))
    assert warm.scheduler.prefix_hits >= 3 * (70 - 8 - BLOCK)


def test_the_question_chooses_nothing(files: ModelFiles) -> None:
    """What is kept for one question is what is kept for another; without the mark it is not."""
    engine = build_engine(files, cache__prefix_caching=False)
    kept: list[Any] = []
    keep = engine.kv.copy_cells
    engine.kv.copy_cells = lambda source, target: (  # type: ignore[method-assign]
        kept.append(source.tolist()),
        keep(source, target),
    )[1]

    def chosen(question: list[int], upto: int | None) -> list[list[int]]:
        engine.pool._cursor = 0  # the same blocks each time
        kept.clear()
        asked(engine, "snapkv(budget=24, window=8)", question, upto)
        return list(kept)

    other = text_of(6, 13)
    assert chosen(QUESTION, 70) == chosen(other, 70)
    assert chosen(QUESTION, None) != chosen(other, None)


def test_the_whole_prompt_is_the_default(files: ModelFiles) -> None:
    engine = build_engine(files, cache__prefix_caching=False)
    spec = SPECS[0]
    assert bits(asked(engine, spec, upto=83)) == bits(asked(engine, spec, upto=None))
    assert bits(asked(engine, spec, upto=70)) != bits(asked(engine, spec, upto=None))


@pytest.mark.parametrize(
    ("spec", "upto", "words"),
    [
        ("", 5, "needs a kv method that compresses"),
        ("quest", 5, "needs a kv method that compresses"),
        ("snapkv", 84, "it is 84; the prompt has 83 tokens"),
        ("snapkv", 0, "it is 0; the prompt has 83 tokens"),
    ],
)
def test_what_makes_no_sense_is_refused(files: ModelFiles, spec: str, upto: int, words: str) -> None:
    with pytest.raises(RequestError, match=words) as refused:
        asked(build_engine(files), spec, upto=upto)
    assert refused.value.param == "compress_upto"
