"""Each sampling rule against its definition, and randomness that belongs to the request."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenloom.engine import sampler
from tokenloom.engine.sampler import token_logprobs, uniform
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.kernels import get_kernels


def sample(rows: torch.Tensor, sequences: list[Any], end_tokens: tuple[int, ...]) -> tuple[list[int], Any]:
    return sampler.sample(rows, sequences, end_tokens, get_kernels())


def sequence(
    output: tuple[int, ...] = (), prompt: tuple[int, ...] = (), index: int = 0, **params: Any
) -> Any:
    """What the sampler reads of a sequence."""
    params.setdefault("seed", 0)
    sampling = SamplingParams(max_tokens=99, **params)
    request = SimpleNamespace(params=sampling, seed=sampling.seed)
    return SimpleNamespace(
        request=request,
        index=index,
        tokens=[*prompt, *output],
        output=list(output),
        num_output=len(output),
    )


def counts(logits: list[float], draws: int = 4000, **params: Any) -> list[float]:
    """Observed frequency of each token over many positions of one request."""
    rows = torch.tensor([logits] * draws)
    sequences = [sequence(output=(0,) * 0, seed=i, **params) for i in range(draws)]
    tokens, _ = sample(rows, sequences, ())
    return [tokens.count(t) / draws for t in range(len(logits))]


def expect(observed: list[float], probs: list[float], draws: int = 4000) -> None:
    for seen, p in zip(observed, probs, strict=True):
        assert abs(seen - p) <= 4.5 * math.sqrt(p * (1 - p) / draws) + 1e-9, (observed, probs)


PROBS = [0.5, 0.25, 0.15, 0.1]
LOGITS = [math.log(p) for p in PROBS]


def test_temperature_zero_is_argmax() -> None:
    assert sample(torch.tensor([[1.0, 3.0, 2.0]]), [sequence(temperature=0)], ())[0] == [1]


def test_temperature_one_is_the_models_distribution() -> None:
    expect(counts(LOGITS, temperature=1.0), PROBS)


def test_temperature_sharpens() -> None:
    sharp = [p**2 for p in PROBS]
    expect(counts(LOGITS, temperature=0.5), [p / sum(sharp) for p in sharp])


def test_top_k_keeps_the_k_most_likely() -> None:
    expect(counts(LOGITS, top_k=2), [2 / 3, 1 / 3, 0, 0])


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    expect(counts(LOGITS, top_p=0.75), [2 / 3, 1 / 3, 0, 0])
    expect(counts(LOGITS, top_p=0.76), [p / 0.9 for p in PROBS[:3]] + [0])


def test_top_p_renormalises_after_top_k() -> None:
    # Within the top 2 the first has 2/3, which reaches 0.6 alone.
    expect(counts(LOGITS, top_k=2, top_p=0.6), [1, 0, 0, 0])


def test_min_p_is_relative_to_the_most_likely() -> None:
    expect(counts(LOGITS, min_p=0.45), [2 / 3, 1 / 3, 0, 0])
    expect(counts(LOGITS, min_p=0.45, top_p=0.95), [2 / 3, 1 / 3, 0, 0])


def test_top_p_beyond_the_candidate_list_still_sees_the_whole_vocabulary() -> None:
    vocab = 3000  # flat: 1,024 candidates hold a third of the mass
    tokens, _ = sample(torch.zeros(400, vocab), [sequence(top_p=0.9, seed=i) for i in range(400)], ())
    assert len(set(tokens)) > 300
    assert max(tokens) > 1024 or min(tokens) < vocab - 1024


def test_logit_bias_and_penalties() -> None:
    rows = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    assert sample(rows, [sequence(temperature=0, logit_bias={3: 100})], ())[0] == [3]
    assert sample(rows, [sequence((0,), temperature=0, presence_penalty=1.5)], ())[0] == [1]
    assert sample(rows, [sequence((0, 0), temperature=0, frequency_penalty=0.6)], ())[0] == [1]
    assert sample(rows, [sequence((0,), temperature=0, frequency_penalty=0.6)], ())[0] == [0]
    assert sample(rows, [sequence(prompt=(0,), temperature=0, repetition_penalty=3.0)], ())[0] == [1]
    negative = torch.tensor([[-1.0, -1.5]])
    assert sample(negative, [sequence(prompt=(0,), temperature=0, repetition_penalty=2.0)], ())[0] == [1]


def test_presence_and_frequency_ignore_the_prompt() -> None:
    rows = torch.tensor([[2.0, 1.0]])
    assert sample(rows, [sequence(prompt=(0, 0), temperature=0, presence_penalty=2.0)], ())[0] == [0]


def test_min_tokens_bans_end_and_stop_tokens() -> None:
    rows = torch.tensor([[3.0, 2.0, 1.0]])
    early = sequence(temperature=0, min_tokens=1, stop_token_ids=(1,))
    assert sample(rows, [early], (0,))[0] == [2]
    late = sequence((2,), temperature=0, min_tokens=1, stop_token_ids=(1,))
    assert sample(rows, [late], (0,))[0] == [0]


def test_editing_one_row_leaves_the_callers_logits_alone() -> None:
    rows = torch.tensor([[2.0, 1.0], [2.0, 1.0]])
    tokens, _ = sample(rows, [sequence(temperature=0, logit_bias={1: 50}), sequence(temperature=0)], ())
    assert tokens == [1, 0]
    assert rows.tolist() == [[2.0, 1.0], [2.0, 1.0]]


def test_logprobs_are_of_the_models_own_distribution() -> None:
    rows = torch.tensor([LOGITS])
    tokens, logprobs = sample(rows, [sequence(temperature=0, logit_bias={3: 100}, logprobs=2)], ())
    assert tokens == [3] and logprobs[0] is not None
    assert logprobs[0].logprob == pytest.approx(math.log(0.1), abs=1e-6)
    assert [t for t, _ in logprobs[0].top] == [0, 1]
    assert [p for _, p in logprobs[0].top] == pytest.approx(LOGITS[:2], abs=1e-6)


def test_logprobs_only_where_asked() -> None:
    rows = torch.tensor([LOGITS] * 3)
    _, logprobs = sample(rows, [sequence(), sequence(logprobs=0), sequence(logprobs=1)], ())
    assert logprobs[0] is None
    assert logprobs[1] is not None and logprobs[1].top == ()
    assert logprobs[2] is not None and len(logprobs[2].top) == 1


def test_token_logprobs_match_log_softmax() -> None:
    torch.manual_seed(0)
    rows = torch.randn(4, 50, dtype=torch.float64)
    entries = token_logprobs(rows, [1, 2, 3, 4], [0, 1, 5, 5], get_kernels())
    expected = rows.log_softmax(-1)
    for i, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(expected[i, i + 1].item(), abs=1e-12)
        assert [t for t, _ in entry.top] == expected[i].argsort(descending=True)[: len(entry.top)].tolist()


params_strategy = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 1, 5, 4000]),
        "top_p": st.sampled_from([0.1, 0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "presence_penalty": st.sampled_from([0.0, 1.0]),
        "seed": st.integers(0, 2**63),
    }
)


@settings(max_examples=60, deadline=None)
@given(st.lists(params_strategy, min_size=1, max_size=6), st.integers(0, 1000))
def test_a_row_draws_the_same_token_alone_and_in_any_batch(rows: list[dict[str, Any]], seed: int) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(len(rows), 2000) * 3
    sequences = [sequence((1, 2), index=i, **row) for i, row in enumerate(rows)]
    together, _ = sample(logits, sequences, ())
    alone = [sample(logits[i : i + 1], [s], ())[0][0] for i, s in enumerate(sequences)]
    assert together == alone


@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 127), st.integers(0, 10**6))
def test_uniform_is_in_range_and_repeatable(seed: int, choice: int, position: int) -> None:
    u = uniform(seed, choice, position)
    assert 0.0 <= u < 1.0
    assert u == uniform(seed, choice, position)


def test_uniform_is_uniform_over_each_argument() -> None:
    for numbers in (
        [uniform(s, 0, 0) for s in range(4096)],
        [uniform(7, c, 0) for c in range(4096)],
        [uniform(7, 0, p) for p in range(4096)],
    ):
        bins = [0] * 16
        for u in numbers:
            bins[int(u * 16)] += 1
        chi_square = sum((b - 256) ** 2 / 256 for b in bins)
        assert chi_square < 37.7  # 15 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", math.nan),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("top_k", 1.5),
        ("min_p", 1.0),
        ("n", 0),
        ("n", 129),
        ("max_tokens", -1),
        ("logprobs", 21),
        ("presence_penalty", 2.1),
        ("repetition_penalty", 0.0),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", dict.fromkeys(range(2000), 1.0)),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("seed", 2**70),
        ("min_tokens", 17),
    ],
)
def test_bad_parameters_name_their_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field) as error:
        SamplingParams(**{field: value})
    assert error.value.param == field  # type: ignore[attr-defined]
