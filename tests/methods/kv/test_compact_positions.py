"""tokenselect(positions=compact): what a row reads stands side by side, whatever the length of the text."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from kv_rig import (
    answer,
    bits,
    build_engine,
    dense_logprob,
    request,
    run,
    same,
    text_of,
    tiny_files,
    tokens,
)
from tokenloom.errors import RequestError
from tokenloom.methods.kv.tokenselect import CompactPolicy
from tokenloom.models.loader import ModelFiles

CONTEXT = 64
SPEC = "tokenselect(budget=24, n_init=2, n_local=6, chunk=8, theta=1.0, positions=compact)"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return tiny_files(tmp_path_factory.mktemp("llama"), max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """Its keys depend on a token and its position alone: a dense run over some tokens is the truth."""
    folder = tmp_path_factory.mktemp("one")
    return tiny_files(folder, num_hidden_layers=1, max_position_embeddings=CONTEXT)


@pytest.mark.parametrize("length", [20, 150])
def test_logits_are_those_of_the_chosen_tokens_side_by_side(
    one_layer: ModelFiles, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of twice the model's context too."""
    read: list[list[int]] = []
    plain = CompactPolicy._read

    def spy(self: Any, layer: int, q: Tensor, index: Tensor, cached: Any) -> Tensor:
        if index[-1] >= length - 1:
            read.append(index.tolist())
        return plain(self, layer, q, index, cached)

    monkeypatch.setattr(CompactPolicy, "_read", spy)
    engine, truth = build_engine(one_layer, cache__prefix_caching=False), build_engine(one_layer)
    prompt = text_of(4, length)
    output = answer(engine, prompt, SPEC, max_tokens=40)
    written, entries = prompt + tokens(output)[0], output.completions[0].logprobs or []
    del read[:-40]  # earlier chunks of the prompt
    assert len(read) == len(entries) == 40
    for index, entry in zip(read, entries, strict=True):
        expected = dense_logprob(truth, [written[i] for i in index], entry.token_id)
        assert abs(expected - entry.logprob) < 1e-4
    assert {len(index) for index in read[-20:]} == {24}


def test_the_model_never_sees_a_position_beyond_what_a_row_reads(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, seen = build_engine(files), []
    plain = engine.decoder.rope.cos_sin

    def spy(positions: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(int(positions.max()))
        return plain(positions)

    monkeypatch.setattr(engine.decoder.rope, "cos_sin", spy)
    output = answer(engine, text_of(1, 200), SPEC, max_tokens=30)
    assert len(tokens(output)[0]) == 30
    assert max(seen) == 25  # 2 first, 16 chosen, a chunk of 8


def test_a_request_that_fits_is_plain_attention_and_shares_nothing_with_longer_ones(
    files: ModelFiles,
) -> None:
    spec = SPEC.replace("budget=24", "budget=50")
    for flags in ({"model__backend": "reference"}, {"model__backend": "torch"}):
        engine = build_engine(files, **flags)
        short = text_of(2, 30)
        answer(engine, short + text_of(3, 60), spec)  # its blocks hold the same tokens without RoPE
        assert bits(answer(engine, short, spec, max_tokens=20)) == bits(
            answer(engine, short, "off", max_tokens=20)
        )


@pytest.mark.parametrize("rows", [19, 2048])
def test_batches_chunks_prefixes_and_forks_change_nothing(files: ModelFiles, rows: int) -> None:
    alone = build_engine(files, cache__prefix_caching=False, model__backend="reference")
    prompts = [text_of(1, 120), text_of(1, 120)[:88] + text_of(2, 20)]
    expected = [answer(alone, prompt, SPEC) for prompt in prompts]
    dense = answer(alone, text_of(5, 40))
    engine = build_engine(
        files, model__backend="reference", scheduler__max_batch_tokens=rows, scheduler__max_running=8
    )
    for _ in range(2):
        outputs = run(
            engine,
            *(request(p, SPEC, str(i), n=1 + i) for i, p in enumerate(prompts)),
            request(text_of(5, 40), "", "dense"),
        )
        same(outputs[0], expected[0])
        assert [tokens(outputs[1])[i] for i in (0, 1)] == tokens(expected[1]) * 2
        assert bits(outputs[2]) == bits(dense)
    assert engine.scheduler.prefix_hits > 0


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("tokenselect(budget=24, chunk=8, positions=compact, prefill=False)", "needs prefill=True"),
        ("tokenselect(budget=24, chunk=64, positions=compact)", "reads up to 8. tokens .* context is 64"),
        ("tokenselect(budget=24, positions=inside)", "positions must be one of"),
        ("snapkv+tokenselect(positions=compact)", "stores keys without RoPE"),
    ],
)
def test_what_cannot_be_is_refused(files: ModelFiles, spec: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as refused:
        build_engine(files).add(request(text_of(1, 60), spec))
    assert refused.value.param == "kv"


def test_others_are_held_to_the_models_context(files: ModelFiles) -> None:
    with pytest.raises(RequestError, match="context is 64 tokens"):
        build_engine(files).add(request(text_of(1, 100), SPEC.replace("compact", "original")))
