"""A user's key sees the files, jobs and batches that were made with it; an operator's sees all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from finetune_server import Server, serving

from batch_site import Site, chat
from finetune_fakes import DATA, wait_until
from running import settings
from tokenloom.finetune.errors import NotFoundError
from tokenloom.finetune.job_request import parse_job
from tokenloom.finetune.principal import Principal
from tokenloom.finetune.records import TERMINAL
from tokenloom.serve.key_ring import KeyRing

KEYS = {"server__api_keys": ["one", "two"], "server__admin_keys": ["boss"]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("home"), KeyRing(settings(**KEYS))) as running:
        yield running


@pytest.fixture
def held(server: Server) -> Iterator[None]:
    """No job takes a step, and none from before is at work."""
    jobs = server.service.store.jobs
    wait_until(lambda: all(job.status in TERMINAL for job in jobs.list_jobs(limit=100).data))
    server.runner.go.clear()
    yield
    server.runner.go.set()


@pytest.fixture
def one(server: Server) -> openai.OpenAI:
    return server.client.with_options(api_key="one")


@pytest.fixture
def two(server: Server) -> openai.OpenAI:
    return server.client.with_options(api_key="two")


@pytest.fixture
def boss(server: Server) -> openai.OpenAI:
    return server.client.with_options(api_key="boss")


def upload(client: openai.OpenAI, **options: Any) -> str:
    return client.files.create(file=("train.jsonl", DATA), purpose="fine-tune", **options).id


def train(client: openai.OpenAI, **options: Any) -> str:
    return client.fine_tuning.jobs.create(model="tiny", training_file=upload(client), **options).id


def ids(page: Any) -> set[str]:
    return {entry.id for entry in page}


def test_files_are_listed_to_their_owner_and_to_the_operator(one, two, boss):
    mine, theirs = upload(one), upload(two)
    assert {mine, theirs} & ids(one.files.list()) == {mine}
    assert {mine, theirs} & ids(two.files.list()) == {theirs}
    assert {mine, theirs} <= ids(boss.files.list())


@pytest.mark.parametrize("call", ["retrieve", "content", "delete"])
def test_a_file_of_another_key_is_not_there(one, two, boss, call):
    mine = upload(one)
    with pytest.raises(openai.NotFoundError) as refused:
        getattr(two.files, call)(mine)
    with pytest.raises(openai.NotFoundError) as unknown:
        getattr(two.files, call)("file-" + "0" * 24)
    assert str(refused.value).replace(mine, "") == str(unknown.value).replace("file-" + "0" * 24, "")
    getattr(boss.files, call)(upload(one))
    getattr(one.files, call)(mine)


def test_listing_does_not_go_on_from_a_file_of_another_key(one, two):
    with pytest.raises(openai.BadRequestError) as refused:
        two.files.list(after=upload(one))
    assert refused.value.param == "after"


def test_a_job_cannot_be_made_of_a_file_of_another_key(one, two):
    for files in (
        {"training_file": upload(one)},
        {"training_file": upload(two), "validation_file": upload(one)},
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            two.fine_tuning.jobs.create(model="tiny", **files)
        assert (refused.value.param, refused.value.code) == (list(files)[-1], "file_not_found")


def test_jobs_are_listed_to_their_owner_and_to_the_operator(one, two, boss):
    mine, theirs = train(one), train(two)
    assert {mine, theirs} & ids(one.fine_tuning.jobs.list()) == {mine}
    assert {mine, theirs} & ids(two.fine_tuning.jobs.list()) == {theirs}
    assert {mine, theirs} <= ids(boss.fine_tuning.jobs.list())


@pytest.mark.parametrize("call", ["retrieve", "pause", "resume", "cancel", "list_events", "checkpoints.list"])
def test_a_job_of_another_key_is_not_there(held, one, two, call):
    mine = train(one)
    wait_until(lambda: one.fine_tuning.jobs.retrieve(mine).status == "running")
    act = two.fine_tuning.jobs
    for part in call.split("."):
        act = getattr(act, part)
    with pytest.raises(openai.NotFoundError):
        act(mine)
    assert one.fine_tuning.jobs.retrieve(mine).status == "running"


def test_results_and_models_of_a_job_are_its_owners(server, one, two):
    mine = train(one)
    job = wait_until(lambda: (job := one.fine_tuning.jobs.retrieve(mine)).result_files and job)
    assert one.files.content(job.result_files[0]).read()
    with pytest.raises(openai.NotFoundError):
        two.files.retrieve(job.result_files[0])
    with pytest.raises(NotFoundError):
        server.service.delete_model(job.fine_tuned_model, Principal("api-2", False))
    assert server.service.delete_model(job.fine_tuned_model, Principal("api-1", False)).job_id == mine


def test_two_keys_may_choose_the_same_idempotency_key(one, two):
    again = {"extra_headers": {"Idempotency-Key": "again"}}
    mine, theirs = upload(one, **again), upload(two, **again)
    assert upload(one, **again) == mine != theirs
    jobs = [
        client.fine_tuning.jobs.create(model="tiny", training_file=file, **again).id
        for client, file in ((one, mine), (one, mine), (two, theirs))
    ]
    assert jobs[0] == jobs[1] != jobs[2]


def test_what_was_made_without_a_key_is_the_operators(server, one, boss):
    nobodys = server.service.create_file([DATA], "train.jsonl").id
    assert boss.files.retrieve(nobodys).id == nobodys
    with pytest.raises(openai.NotFoundError):
        one.files.retrieve(nobodys)


def test_the_settings_keys_without_an_admins_see_all(tmp_path: Path):
    with serving(tmp_path / "home", KeyRing(settings(server__api_keys=["one", "two"]))) as server:
        mine = upload(server.client.with_options(api_key="one"))
        assert server.client.with_options(api_key="two").files.retrieve(mine).id == mine


@pytest.fixture
def sites(serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path / "home"))
    server = serve(jobs=True, coserve__mode="off", **KEYS)
    opened = [Site(server, key) for key in ("one", "two", "boss")]
    yield opened
    for site in opened:
        site.client.close()


def test_batches_and_their_outputs_are_their_owners(sites):
    one, two, boss = sites
    mine = one.run([chat("a"), chat("bad", temperature=9)])
    theirs = two.run([chat("b")])
    assert ids(one.client.batches.list()) == {mine.id}
    assert ids(two.client.batches.list()) == {theirs.id}
    assert ids(boss.client.batches.list()) == {mine.id, theirs.id}
    for file in (mine.input_file_id, mine.output_file_id, mine.error_file_id):
        assert one.client.files.retrieve(file).id == boss.client.files.retrieve(file).id == file
        with pytest.raises(openai.NotFoundError):
            two.client.files.content(file)


def test_a_model_can_be_used_by_all_keys_and_deleted_by_its_owners(sites):
    one, two, _ = sites
    service = one.server.jobs.service
    file = service.create_file([DATA], "train.jsonl")
    jobs, request = service.store.jobs, parse_job({"model": "fake", "training_file": file.id})
    job = jobs.create(request, who=Principal("api-1", True))
    for status in ("queued", "running"):
        jobs.move(job.id, status, "")
    adapter = job.directory / "adapter"
    adapter.mkdir(parents=True)
    with service.files.begin() as results:
        results.write(b"step\n")
        jobs.succeed(job.id, adapter, 1, results)
    assert job.name in ids(two.client.models.list())
    with pytest.raises(openai.NotFoundError):
        two.client.models.delete(job.name)
    assert one.client.models.delete(job.name).deleted


def test_a_batch_of_another_key_is_not_there(sites):
    one, two, _ = sites
    one.engine.behave(step_s=0.02)
    mine = one.start([chat("a", tokens=100)])
    for act in (two.client.batches.retrieve, two.client.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            act(mine.id)
    with pytest.raises(openai.BadRequestError) as refused:
        two.client.batches.list(after=mine.id)
    assert refused.value.param == "after"
    with pytest.raises(openai.BadRequestError) as unknown:
        two.client.batches.create(
            input_file_id=mine.input_file_id, endpoint="/v1/chat/completions", completion_window="24h"
        )
    assert unknown.value.code == "file_not_found"
    assert one.until_over(one.client.batches.cancel(mine.id)).status == "cancelled"
