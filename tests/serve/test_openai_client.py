"""OpenAI's own client, and lm-evaluation-harness's requests, against a real server over a tiny model."""

import openai
import pytest

from running import wait_for
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.llm import LLM

HELLO = [{"role": "user", "content": "Tell me about the sea."}]


@pytest.fixture(scope="module")
def client(real):
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def llm(tiny_folder):
    return LLM(str(tiny_folder), model__dtype="float64", model__backend="reference", cache__kv_bytes=2**23)


def chat(client, **fields):
    return client.chat.completions.create(model="tiny", messages=HELLO, **fields)


def test_a_greedy_chat_is_that_of_the_offline_api(client, llm):
    answer = chat(client, temperature=0, max_tokens=24)
    [expected] = llm.chat(HELLO, SamplingParams(temperature=0, max_tokens=24))
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)


def test_a_greedy_completion_is_that_of_the_offline_api(client, llm):
    prompts = ["the sea", "on a boat in the storm"]
    answer = client.completions.create(model="tiny", prompt=prompts, temperature=0, max_tokens=16)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16))
    assert [c.text for c in answer.choices] == [o.text for o in outputs]


def test_streamed_text_is_the_whole_text(client):
    fields = {"seed": 5, "max_tokens": 30, "n": 2, "logprobs": True, "top_logprobs": 1}
    whole = chat(client, **fields)
    texts, logprobs, usage = {0: "", 1: ""}, {0: [], 1: []}, None
    for chunk in chat(client, stream=True, stream_options={"include_usage": True}, **fields):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            logprobs[choice.index] += choice.logprobs.content if choice.logprobs else []
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content
        assert [e.logprob for e in logprobs[choice.index]] == [e.logprob for e in choice.logprobs.content]
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_a_seed_repeats_and_choices_differ(client):
    first, second, other = (chat(client, seed=seed, n=2, max_tokens=20) for seed in (1, 1, 2))
    texts = [c.message.content for c in first.choices]
    assert texts == [c.message.content for c in second.choices]
    assert texts != [c.message.content for c in other.choices]
    assert texts[0] != texts[1]


def test_logit_bias_forces_and_forbids(client):
    fields = {"temperature": 0, "max_tokens": 6}
    forced = chat(client, **fields, logit_bias={"120": 100}).choices[0]  # ids below 256 are bytes
    other = chat(client, **fields, logit_bias={"120": -100, "121": 100}).choices[0]
    assert (forced.message.content, other.message.content) == ("x" * 6, "y" * 6)


def test_fields_that_describe_a_request_leave_its_answer_as_it_is(client):
    fields = {"temperature": 0, "max_tokens": 12}
    described = chat(
        client,
        **fields,
        user="u",
        metadata={"a": "b"},
        store=True,
        safety_identifier="s",
        service_tier="flex",
    )
    assert described.choices[0].message == chat(client, **fields).choices[0].message


def test_prompts_of_one_request_times_n_are_answered_together(client, real):
    passes = real.engine.stats().iterations
    fields = {"temperature": 0, "max_tokens": 16, "extra_body": {"ignore_eos": True}}
    answer = client.completions.create(model="tiny", prompt=["a boat", "the sea", "wind"], n=2, **fields)
    assert [choice.index for choice in answer.choices] == list(range(6))
    # One after another they would take 16 passes each.
    assert real.engine.stats().iterations - passes < 3 * 16


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_does_not_leak(client, stream):
    text = chat(client, temperature=0, max_tokens=40).choices[0].message.content
    stop = next(text[i : i + 3] for i in range(4, len(text)) if "�" not in text[i : i + 3])
    answer = chat(client, temperature=0, max_tokens=40, stop=[stop], stream=stream)
    if stream:
        chunks = [chunk.choices[0] for chunk in answer]
        got, reason = "".join(c.delta.content or "" for c in chunks), chunks[-1].finish_reason
    else:
        got, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert got == text[: text.index(stop)]
    assert reason == "stop"


def test_chat_logprobs_are_of_the_tokens_of_the_text(client):
    answer = chat(
        client, temperature=0, max_tokens=8, logprobs=True, top_logprobs=3, extra_body={"ignore_eos": True}
    )
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 8
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob  # greedy takes the likeliest
    data = b"".join(bytes(entry.bytes) for entry in entries)
    assert data.decode("utf-8", "replace") == answer.choices[0].message.content


def test_a_repeated_prompt_comes_from_the_prefix_cache(client):
    prompt = list(range(100, 164))
    fields = {"model": "tiny", "prompt": prompt, "max_tokens": 1, "temperature": 0}
    client.completions.create(**fields)
    usage = client.completions.create(**fields).usage
    assert 0 < usage.prompt_tokens_details.cached_tokens < len(prompt)


def test_leaving_a_stream_frees_its_slots(client, real):
    blocks = real.engine.stats().kv_blocks_used
    stream = chat(client, stream=True, n=2, extra_body={"ignore_eos": True})
    next(iter(stream))
    assert real.engine.stats().running > 0
    stream.close()
    wait_for(lambda: real.engine.stats().running == 0)
    assert real.engine.stats().kv_blocks_used <= blocks


def test_embeddings_are_those_of_the_offline_api(client, llm):
    texts = ["the sea", "a boat"]
    expected = llm.embed(texts)
    for fields in ({}, {"encoding_format": "float"}):  # by default the client asks for base64
        answer = client.embeddings.create(model="tiny", input=texts, **fields)
        for item, vector in zip(answer.data, expected, strict=True):
            assert item.embedding == pytest.approx(vector, rel=1e-5)


def test_the_clients_error_classes(client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=HELLO)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        chat(client, temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt=[1] * 600)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "prompt")


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_lm_evals_requests_give_the_loglikelihoods_of_score(real, llm):
    """As its local-completions model sends and reads them (openai_completions.py, `parse_logprobs`)."""
    context, continuation = "The sea is", " wide and the boat is small"
    encode = llm.tokenizer.encode
    ctxlen, tokens = len(encode(context)), encode(context) + encode(continuation)
    payload = {
        "model": "tiny",
        "prompt": [tokens, tokens[:-3]],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    choices = real.http.post("/v1/completions", json=payload).json()["choices"]
    for choice, ids in zip(choices, payload["prompt"], strict=True):
        lists = choice["logprobs"]
        scored = [entry.logprob for entry in llm.score(ids)[0].logprobs[ctxlen:]]
        assert lists["token_logprobs"][ctxlen:-1] == scored
        tops = lists["top_logprobs"][ctxlen:-1]
        greedy = all(a == max(top.values()) for a, top in zip(scored, tops, strict=True))
        best = llm.score(ids, top=1)[0].logprobs[ctxlen:]
        assert greedy == all(entry.logprob == entry.top[0][1] for entry in best)


def test_scoring_without_generating_gives_the_same(real, llm):
    ids = llm.tokenizer.encode("a boat on the sea")
    fields = {"model": "tiny", "prompt": ids, "echo": True, "logprobs": 0, "max_tokens": 0}
    lists = real.http.post("/v1/completions", json=fields).json()["choices"][0]["logprobs"]
    assert lists["token_logprobs"][1:] == [entry.logprob for entry in llm.score(ids)[0].logprobs[1:]]
    assert len(lists["tokens"]) == len(ids)


def test_greedy_teacher_forcing_is_seen_as_greedy(real, llm):
    prompt = llm.tokenizer.encode("the sea")
    answer = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))[0]
    ids = prompt + answer.completions[0].token_ids
    fields = {"model": "tiny", "prompt": ids, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    lists = real.http.post("/v1/completions", json=fields).json()["choices"][0]["logprobs"]
    answered = slice(len(prompt), -1)
    chosen, tops = lists["token_logprobs"][answered], lists["top_logprobs"][answered]
    assert len(chosen) == 6
    assert chosen == [max(top.values()) for top in tops]


def test_real_requests_show_in_the_metrics(real):
    fields = {"model": "tiny", "prompt": "the sea", "max_tokens": 4}
    real.http.post("/v1/completions", json=fields)
    text = real.http.get("/metrics").text
    assert 'tokenloom:time_to_first_token_seconds_count{model_name="tiny"}' in text
    [line] = [s for s in text.splitlines() if s.startswith("tokenloom:generation_tokens_total")]
    assert float(line.split()[-1]) > 0
