"""/v1/responses as OpenAI's client sends and reads it, over a fake engine that spells the alphabet."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from fake_engine import FakeEngine
from running import Running, assert_error, settings, wait_for

TURN = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def one_client() -> Iterator[openai.OpenAI]:
    server = Running(FakeEngine(settings()))
    with client_of(server) as client:
        client.server = server  # type: ignore[attr-defined]
        yield client
    server.stop()


@pytest.fixture
def client(one_client) -> openai.OpenAI:
    """One server for all tests; its engine does nothing wrong yet."""
    one_client.server.engine.behave()
    return one_client


def client_of(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def create(client: openai.OpenAI, text: object = "hello", tokens: int = 5, **fields: object):
    return client.responses.create(model="fake", input=text, max_output_tokens=tokens, **fields)


def prompt_of(client: openai.OpenAI) -> str:
    """What the engine was asked last."""
    engine = client.server.engine
    return engine.tokenizer.decode(engine.calls[-1].prompt, skip_special_tokens=False)


def post(client: openai.OpenAI, **body: object):
    return client.server.http.post("/v1/responses", json={"model": "fake", "input": "hi", **body})


def test_a_text_is_answered(client):
    response = create(client, metadata={"a": "b"}, user="u", temperature=0.5, top_p=0.9)
    assert response.output_text == "abcde"
    assert (response.metadata, response.user) == ({"a": "b"}, "u")
    assert (response.temperature, response.top_p, response.max_output_tokens) == (0.5, 0.9, 5)
    params = client.server.engine.calls[-1].params
    assert (params.temperature, params.top_p, params.max_tokens) == (0.5, 0.9, 5)


def test_an_answer_that_was_cut_is_incomplete(client):
    response = create(client)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[0].status == "incomplete"


def test_usage_counts_the_prompt_and_the_answer(client):
    usage = create(client).usage
    prompt = len(client.server.engine.calls[-1].prompt)
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (prompt, 5, prompt + 5)
    assert usage.input_tokens_details.cached_tokens == 3
    assert usage.input_tokens_details.cache_write_tokens == prompt - 3


def test_instructions_go_before_messages_of_all_roles(client):
    parts = [{"type": "input_text", "text": "one"}, {"type": "input_text", "text": "two"}]
    turns = [
        {"role": "developer", "content": "be brief"},
        {"type": "message", "role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "output_text", "text": "three"}]},
    ]
    create(client, turns, instructions="be kind")
    roles = ("system\nbe kind", "system\nbe brief", "user\none\ntwo", "assistant\nthree", "assistant\n")
    assert prompt_of(client) == "<|im_end|>\n".join(f"<|im_start|>{turn}" for turn in roles)


def test_the_next_turn_goes_on_from_a_kept_response_without_its_instructions(client):
    first = create(client, "hello", instructions="be kind")
    create(client, "and now?", previous_response_id=first.id)
    turns = ("user\nhello", "assistant\nabcde", "user\nand now?", "assistant\n")
    assert prompt_of(client) == "<|im_end|>\n".join(f"<|im_start|>{turn}" for turn in turns)


def test_output_can_be_sent_back_as_input(client):
    first = create(client)
    create(client, [TURN, *[item.model_dump() for item in first.output], TURN])
    assert "assistant\nabcde<|im_end|>" in prompt_of(client)


def test_a_stream_has_openais_events_in_their_order(client):
    events = list(create(client, tokens=2, stream=True))
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(10))
    assert events[-1].response.output_text == events[6].text == "ab"
    assert client.responses.retrieve(events[0].response.id) == events[-1].response


def test_the_clients_stream_helper_ends_with_a_completed_response(client):
    client.server.engine.stop_at = 2
    with client.responses.stream(model="fake", input="hi") as stream:
        pieces = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert final.output_text == "".join(pieces) == "abc"
    assert (final.status, final.incomplete_details) == ("completed", None)
    assert final.completed_at >= final.created_at


def test_logprobs_come_with_the_text_and_with_its_pieces(client):
    whole = create(client, top_logprobs=2, include=["message.output_text.logprobs"])
    entries = whole.output[0].content[0].logprobs
    assert [entry.token for entry in entries] == list("abcde")
    assert [len(entry.top_logprobs) for entry in entries] == [2] * 5
    events = create(client, top_logprobs=2, stream=True)
    pieces = [event.logprobs for event in events if event.type == "response.output_text.delta"]
    assert [entry.token for piece in pieces for entry in piece] == list("abcde")


def test_input_items_are_listed_page_by_page_with_the_earlier_turns(client):
    first = create(client, "one")
    second = create(client, [TURN, TURN], previous_response_id=first.id)
    page = client.responses.input_items.list(second.id, limit=2, order="asc")
    assert page.has_more
    items = list(page)  # fetches the other pages
    assert [item.role for item in items] == ["user", "assistant", "user", "user"]
    assert items[1].id == first.output[0].id
    newest = client.responses.input_items.list(second.id).data
    assert [item.id for item in newest] == [item.id for item in reversed(items)]


def test_a_deleted_response_is_gone(client):
    response = create(client)
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_store_false_keeps_nothing(client):
    response = create(client, store=False)
    assert post(client, previous_response_id=response.id).json()["error"]["code"] == (
        "previous_response_not_found"
    )


def test_the_least_recently_used_response_makes_room(serve):
    with client_of(serve(limits__max_stored_responses=2)) as client:
        first, second = create(client), create(client)
        client.responses.retrieve(first.id)
        third = create(client)
        assert client.responses.retrieve(first.id) and client.responses.retrieve(third.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(second.id)


def test_bytes_bound_what_is_kept(serve):
    with client_of(serve(limits__max_stored_bytes=20_000)) as client:
        short = create(client)
        create(client, "x" * 400, store=False)
        assert client.responses.retrieve(short.id)
        create(client, "x" * 400)
        for _ in range(8):
            create(client)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(short.id)


def test_a_background_response_is_polled(client):
    client.server.engine.behave(step_s=0.02)
    response = create(client, background=True)
    assert response.status == "queued"
    wait_for(lambda: client.responses.retrieve(response.id).status == "incomplete")
    assert client.responses.retrieve(response.id).output_text == "abcde"


@pytest.mark.parametrize("end", ["cancel", "delete"])
def test_a_background_response_is_stopped(client, end):
    engine = client.server.engine
    engine.behave(step_s=0.05)
    response = create(client, tokens=500, background=True)
    if end == "cancel":
        assert client.responses.cancel(response.id).status == "cancelled"
        assert client.responses.retrieve(response.id).status == "cancelled"
    else:
        client.responses.delete(response.id)
    assert engine.running == 0
    assert len(engine.aborted) == 1


def test_a_background_failure_is_told_without_internals(client):
    client.server.engine.break_at = 1
    response = create(client, background=True)
    wait_for(lambda: client.responses.retrieve(response.id).status == "failed")
    error = client.responses.retrieve(response.id).error
    assert error.code == "server_error" and "secret" not in error.message


def test_a_stream_that_breaks_off_ends_with_response_failed(client):
    client.server.engine.fail_at = 1
    events = list(create(client, stream=True))
    assert events[-1].type == "response.failed"
    assert events[-1].response.status == "failed"
    assert events[-1].response.error.message.startswith("the engine failed on this request")


def test_leaving_a_stream_aborts_it_and_keeps_nothing(client):
    client.server.engine.behave(step_s=0.01)
    stream = create(client, tokens=500, stream=True)
    begun = next(iter(stream))
    stream.close()
    wait_for(lambda: client.server.engine.running == 0)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(begun.response.id)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("conversation", "conv_1"),
        ("prompt", {"id": "pmpt_1"}),
        ("reasoning", {"effort": "high"}),
        ("truncation", "auto"),
        ("max_tool_calls", 1),
    ],
)
def test_what_is_not_supported_is_refused_by_name(client, field, value):
    assert_error(post(client, **{field: value}), 400, field, "unsupported_parameter")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input[0]"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
        ),
        ({"input": "hi" * 600}, "input"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format"),
        ({"include": ["reasoning.encrypted_content"]}, "include[0]"),
        ({"metadata": {"k" * 65: "v"}}, "metadata.k"),
        ({"background": True, "stream": True}, "background"),
        ({"background": True, "store": False}, "background"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
    ],
)
def test_faulty_fields_are_named(client, body, param):
    error = post(client, **body).json()["error"]
    assert (error["param"] or "").startswith(param), error
    assert error["type"] == "invalid_request_error"


def test_max_output_tokens_over_the_servers_cap_is_named(serve):
    with client_of(serve(limits__max_tokens=4)) as client:
        with pytest.raises(openai.BadRequestError) as refused:
            create(client, tokens=5)
        assert refused.value.param == "max_output_tokens"
        assert "max_output_tokens: is 5" in refused.value.message


def test_only_background_responses_can_be_cancelled(client):
    response = create(client)
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(response.id)


def test_a_kept_response_is_not_streamed_again(client):
    response = create(client)
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.retrieve(response.id, stream=True)
    assert refused.value.param == "stream"
