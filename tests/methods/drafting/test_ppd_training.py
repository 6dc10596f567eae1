"""Training moves S vectors and nothing else, and they learn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from typer.testing import CliRunner

from draft_rig import build_engine, request, run, text_of, tiny_files
from ppd_rig import random_vectors
from tokenloom.cli import app
from tokenloom.engine.engine import Engine
from tokenloom.errors import RequestError
from tokenloom.methods.drafting.ppd_student import Student, read
from tokenloom.methods.drafting.ppd_text import Sample, answers, prompts, repeated
from tokenloom.methods.drafting.ppd_training import (
    Recipe,
    accuracy,
    bigram_accuracy,
    keep,
    train,
)
from tokenloom.models.loader import ModelFiles


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return tiny_files(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def samples(files: ModelFiles) -> list[Sample]:
    engine = build_engine(files)
    texts = [text_of(seed, 12) for seed in range(3)]
    outputs = run(engine, *(request(text, name=f"r{i}", max_tokens=30) for i, text in enumerate(texts)))
    return [
        Sample([*text, *output.completions[0].token_ids], len(text))
        for text, output in zip(texts, outputs, strict=True)
    ]


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_row_is_what_a_token_with_that_embedding_would_be(tmp_path: Path, kind: str) -> None:
    """Windows, biases and norms of heads included: the next tokens' own embeddings give their own logits."""
    engine = build_engine(tiny_files(tmp_path, kind))
    text, cut = text_of(4, 21), 17
    student = Student(engine, torch.float64)
    vectors = engine.decoder.embed(torch.tensor(text[cut : cut + 3]))
    prefix = read(engine, text, torch.float64)
    [said] = student.logits(vectors, [cut], prefix)
    expected = engine.decoder.logits(prefix.hidden[cut : cut + 3])
    torch.testing.assert_close(said, expected, rtol=0, atol=1e-9)


def test_gradients_are_those_of_finite_differences(files: ModelFiles) -> None:
    engine = build_engine(files)
    student, prefix = Student(engine, torch.float64), read(engine, text_of(5, 14), torch.float64)
    vectors = random_vectors(64).double().requires_grad_()

    def loss(at: Tensor) -> Tensor:
        return student.logits(at, [6, 11], prefix).log_softmax(-1)[..., 7].sum()

    loss(vectors).backward()
    direction = random_vectors(64, seed=1).double()
    with torch.no_grad():
        slope = (loss(vectors + 1e-6 * direction) - loss(vectors - 1e-6 * direction)) / 2e-6
    assert vectors.grad is not None
    assert float((vectors.grad * direction).sum()) == pytest.approx(float(slope), rel=1e-5)


def test_training_lowers_every_prompt_tokens_loss(files: ModelFiles, samples: list[Sample]) -> None:
    engine = build_engine(files)
    done = train(engine, samples[:1], Recipe(steps=40, texts=1, rate=0.1, dtype=torch.float64))
    for first, last in zip(done.losses[0], done.losses[-1], strict=True):
        assert last < 0.9 * first


def test_what_is_stored_is_the_vectors_and_their_accuracy(files: ModelFiles, samples: list[Sample]) -> None:
    engine = build_engine(files)
    done = train(engine, samples, Recipe(steps=1, dtype=torch.float64))
    table = accuracy(engine, Student(engine, torch.float64), done.embeddings, samples)
    path = keep(engine, done, table, {"steps": 1})
    with safe_open(path, "pt") as stored:
        assert set(stored.keys()) == {"embeddings", "accuracy"}
        assert stored.get_tensor("embeddings").shape == (3, 64)
        assert stored.get_tensor("embeddings").dtype == torch.float32
        assert stored.get_tensor("accuracy").shape == (3, 10)
        assert json.loads(stored.metadata()["training"]) == {"steps": 1}


def weights_of(engine: Engine) -> list[Tensor]:
    decoder = engine.decoder
    found = [decoder.embedding, decoder.head, decoder.norm]
    for layer in decoder.layers:
        found += [layer.input_norm, layer.post_norm]
        found += [linear.weight for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    return [tensor.clone() for tensor in found if isinstance(tensor, Tensor)]


def test_the_model_stays_as_it_is(files: ModelFiles, samples: list[Sample]) -> None:
    engine = build_engine(files)
    before = weights_of(engine)
    train(engine, samples, Recipe(steps=2, rate=1.0, dtype=torch.float64))
    assert all(map(torch.equal, weights_of(engine), before))
    assert engine.pool.num_used == 0


def test_accuracy_counts_the_ranks_of_the_right_tokens(files: ModelFiles, samples: list[Sample]) -> None:
    """Vectors that are the next tokens' own embeddings see the future: the first is always right."""
    engine = build_engine(files)
    sample = samples[0]
    short = Sample(sample.tokens[: sample.start + 2], sample.start)  # one cut
    vectors = engine.decoder.embed(torch.tensor(sample.tokens[sample.start : sample.start + 1]))
    table = accuracy(engine, Student(engine, torch.float64), vectors, [short])
    assert table[0].tolist() == [1.0] + [0.0] * 9


def test_bigrams_foretell_what_always_follows() -> None:
    cycle = Sample([1, *[2, 3, 4, 5] * 6], 1)
    table = bigram_accuracy([cycle], [cycle], 3)
    assert table[:, 0].tolist() == pytest.approx([1.0, 1.0, 1.0])


def test_answers_too_short_to_cut_are_refused(files: ModelFiles) -> None:
    engine = build_engine(files)
    with pytest.raises(RequestError, match="texts"):
        train(engine, [Sample([1, 2, 3, 4], 2)], Recipe(steps=1))


# -- texts -------------------------------------------------------------------------------------------------


def test_prompts_can_be_made_again_and_held_out_ones_are_others() -> None:
    learned = prompts(40, 3)
    assert learned == prompts(40, 3) != prompts(40, 4)
    assert not set(learned) & set(prompts(40, 3, held_out=True))


def test_answers_are_greedy_and_marked_where_they_begin(files: ModelFiles) -> None:
    engine = build_engine(files)
    found = answers(engine, 3, 12, seed=0, most_prompt=20)
    assert found
    for sample in found:
        prompt = sample.tokens[: sample.start]
        [output] = run(engine, request(prompt, max_tokens=12, ignore_eos=False))
        assert output.completions[0].token_ids == sample.tokens[sample.start :]


def test_loops_are_seen() -> None:
    assert repeated(list(range(40))) == 0.0
    assert repeated([1, 2, 3] * 20) > 0.9


# -- the command -------------------------------------------------------------------------------------------


def test_the_command_trains_measures_and_leaves_what_ppd_reads(tmp_path: Path, files: ModelFiles) -> None:
    tiny_files(tmp_path)
    common = [
        "--model",
        str(tmp_path / "tiny-llama"),
        "--texts",
        "3",
        "--held-out",
        "2",
        "--new-tokens",
        "16",
    ]
    log = tmp_path / "log.json"
    invoke = CliRunner().invoke
    done = invoke(app, ["train", "ppd", *common, "--steps", "12", "--cuts", "4", "--log", str(log)])
    assert done.exit_code == 0, done.output
    about = json.loads(log.read_text())
    assert len(about["losses"]) == 2 and set(about["accuracy"]) == {
        "trained",
        "untrained",
        "random",
        "bigrams",
    }
    engine = build_engine(files)
    run(engine, request([1, 2, 3], "ppd(rows=12)"))
    again = invoke(app, ["train", "ppd", *common, "--evaluate"])
    assert again.exit_code == 0 and "bigrams" in again.output
