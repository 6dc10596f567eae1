"""/v1/files through the official client, on a real server."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from finetune_server import Server, serving

from finetune_fakes import DATA, names_below, wait_until
from tokenloom.serve.multipart import MAX_FIELD_BYTES

LIMIT = 3 * 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("home"), max_file_bytes=LIMIT) as running:
        yield running


def upload(server: Server, data: bytes = DATA, name: str = "train.jsonl", **options: Any) -> Any:
    return server.client.files.create(
        file=(name, data), purpose=options.pop("purpose", "fine-tune"), **options
    )


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def post_form(server: Server, **form: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/files", **form)


def test_a_file_comes_back_as_it_went_in(server: Server) -> None:
    data = bytes(range(256)) * 10_000
    made = upload(server, data)
    assert (made.object, made.bytes, made.filename, made.status) == (
        "file",
        len(data),
        "train.jsonl",
        "processed",
    )
    assert server.client.files.retrieve(made.id) == made
    assert server.client.files.wait_for_processing(made.id) == made
    assert server.client.files.content(made.id).read() == data
    assert server.service.files.get(made.id).sha256 == hashlib.sha256(data).hexdigest()


def test_always_present_keys_are_there(server: Server) -> None:
    body = httpx.get(f"{server.url}/files/{upload(server).id}").json()
    keys = {
        "id",
        "object",
        "bytes",
        "created_at",
        "expires_at",
        "filename",
        "purpose",
        "status",
        "status_details",
    }
    assert set(body) == keys
    assert body["expires_at"] is None and body["status_details"] is None


def test_a_deleted_file_is_gone(server: Server) -> None:
    made = upload(server)
    path = server.service.files.get(made.id).path
    assert server.client.files.delete(made.id).deleted is True
    assert not path.exists()
    for call in (server.client.files.retrieve, server.client.files.delete, server.client.files.content):
        with pytest.raises(openai.NotFoundError):
            call(made.id)


@pytest.mark.parametrize(
    "file_id", ["file-" + "0" * 24, "x", "..", "%00", "a" * 5000, "%2e%2e%2fjobs.sqlite"]
)
def test_unknown_ids_are_a_404(server: Server, file_id: str) -> None:
    assert error_of(httpx.get(f"{server.url}/files/{file_id}"))
    assert httpx.get(f"{server.url}/files/{file_id}/content").status_code in (404, 405)


def test_listing_walks_all_pages_both_ways_and_by_purpose(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        made = [upload(server, purpose="batch" if i % 2 else "fine-tune").id for i in range(7)]
        walk = [file.id for file in server.client.files.list(limit=2)]
        assert walk == made[::-1]
        assert [file.id for file in server.client.files.list(limit=3, order="asc")] == made
        assert [file.id for file in server.client.files.list(limit=2, purpose="batch")] == made[1::2][::-1]
        page = httpx.get(f"{server.url}/files", params={"limit": 2}).json()
        assert (page["first_id"], page["last_id"], page["has_more"]) == (made[6], made[5], True)
        for file in server.client.files.list(limit=2):
            server.client.files.delete(file.id)
        assert httpx.get(f"{server.url}/files").json() == {
            "object": "list",
            "data": [],
            "first_id": None,
            "last_id": None,
            "has_more": False,
        }


@pytest.mark.parametrize("params", [{"limit": 0}, {"limit": 10_001}, {"order": "up"}, {"after": "file-none"}])
def test_a_bad_listing_names_its_parameter(server: Server, params: dict[str, Any]) -> None:
    response = httpx.get(f"{server.url}/files", params=params)
    assert (response.status_code, error_of(response)["param"]) == (400, next(iter(params)))


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"purpose": "gossip"}, "purpose"),
        ({"purpose": "fine-tune-results"}, "purpose"),
        ({"name": "train.csv"}, "file"),
        ({"expires_after": {"anchor": "created_at", "seconds": 60}}, "expires_after.seconds"),
        ({"expires_after": {"anchor": "birth", "seconds": 3600}}, "expires_after.anchor"),
    ],
)
def test_a_bad_upload_names_its_field_and_leaves_nothing(
    server: Server, options: dict[str, Any], param: str
) -> None:
    folder = server.service.files.path("x").parent
    before = names_below(folder)
    with pytest.raises(openai.BadRequestError) as caught:
        upload(server, **options)
    assert caught.value.param == param
    assert names_below(folder) == before


def test_an_upload_without_a_file_or_purpose_is_a_400(server: Server) -> None:
    no_file = post_form(server, data={"purpose": "fine-tune"}, files={"other": b"x"})
    assert (no_file.status_code, error_of(no_file)["param"]) == (400, "file")
    no_purpose = post_form(server, files={"file": ("a.jsonl", b"x")})
    assert (no_purpose.status_code, error_of(no_purpose)["param"]) == (400, "purpose")


@pytest.mark.parametrize(
    "request_",
    [
        {"json": {"purpose": "fine-tune"}},
        {"content": b"", "headers": {"content-type": "multipart/form-data"}},
        {"content": b"", "headers": {"content-type": "multipart/form-data; boundary=x"}},
        {"content": b"garbage", "headers": {"content-type": "multipart/form-data; boundary=x"}},
        {
            "content": b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\ncut',
            "headers": {"content-type": "multipart/form-data; boundary=x"},
        },
        {
            "files": [("file", ("a.jsonl", b"1")), ("file", ("b.jsonl", b"2"))],
            "data": {"purpose": "fine-tune"},
        },
        {"files": {"file": b"1"}, "data": {f"field{i}": "x" for i in range(40)}},
        {"files": {"file": b"1"}, "data": {"purpose": "x" * (MAX_FIELD_BYTES + 1)}},
    ],
)
def test_what_is_no_form_is_a_400_and_leaves_nothing(server: Server, request_: dict[str, Any]) -> None:
    folder = server.service.files.path("x").parent
    before = names_below(folder)
    response = post_form(server, **request_)
    assert response.status_code == 400, error_of(response)
    assert names_below(folder) == before


@pytest.mark.parametrize("size", [LIMIT + 1, 2 * LIMIT])
def test_a_file_over_the_limit_is_a_413_and_leaves_nothing(server: Server, size: int) -> None:
    folder = server.service.files.path("x").parent
    before = names_below(folder)
    with pytest.raises(openai.APIStatusError) as caught:
        upload(server, b"x" * size)
    assert (caught.value.status_code, caught.value.code) == (413, "file_too_large")
    assert names_below(folder) == before
    assert upload(server, b"x" * LIMIT).bytes == LIMIT


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("../../etc/passwd.jsonl", "passwd.jsonl"),
        ("C:\\data\\é.jsonl", "é.jsonl"),
        ("..", "upload"),
        ("", "upload"),
    ],
)
def test_file_names_are_labels_only(server: Server, sent: str, kept: str) -> None:
    quoted = f'form-data; name="file"; filename="{sent}"'.replace("\\", "\\\\")
    parts = [f"--b\r\nContent-Disposition: {quoted}\r\n\r\nx\r\n"]
    parts.append('--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--b--\r\n')
    headers = {"content-type": "multipart/form-data; boundary=b"}
    assert post_form(server, content="".join(parts).encode(), headers=headers).json()["filename"] == kept


def test_an_expired_file_is_gone(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    made = upload(server, expires_after={"anchor": "created_at", "seconds": 3600})
    assert made.expires_at == made.created_at + 3600
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3601)
    with pytest.raises(openai.NotFoundError):
        server.client.files.retrieve(made.id)
    assert made.id not in [file.id for file in server.client.files.list()]


def test_the_same_key_with_the_same_file_makes_one_file(server: Server) -> None:
    folder = server.service.files.path("x").parent
    key = {"Idempotency-Key": "upload-1"}
    first = upload(server, extra_headers=key)
    before = names_below(folder)
    assert upload(server, extra_headers=key) == first
    assert names_below(folder) == before
    for other in ({"data": b"other"}, {"name": "b.jsonl"}, {"purpose": "batch"}):
        with pytest.raises(openai.BadRequestError) as caught:
            upload(server, extra_headers=key, **other)
        assert caught.value.code == "idempotency_key_reused"
    assert names_below(folder) == before


def test_concurrent_uploads_with_one_key_make_one_file(server: Server) -> None:
    made: list[str] = []
    key = {"Idempotency-Key": "upload-2"}
    threads = [
        threading.Thread(target=lambda: made.append(upload(server, extra_headers=key).id)) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 6 and len(set(made)) == 1


def test_a_bad_key_is_refused(server: Server) -> None:
    with pytest.raises(openai.BadRequestError):
        upload(server, extra_headers={"Idempotency-Key": "k" * 256})


def test_a_client_that_vanishes_leaves_nothing(server: Server) -> None:
    folder = server.service.files.path("x").parent
    before = names_below(folder)

    def half() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n' + b"x" * 2**21
        wait_until(lambda: names_below(folder) != before)
        raise ConnectionAbortedError

    with pytest.raises(ConnectionAbortedError):
        post_form(server, content=half(), headers={"content-type": "multipart/form-data; boundary=b"})
    wait_until(lambda: names_below(folder) == before)


def test_the_quota_is_a_507_and_leaves_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, quota_bytes=1000) as server:
        upload(server, b"x" * 600)
        with pytest.raises(openai.InternalServerError) as caught:
            upload(server, b"x" * 600)
        assert (caught.value.status_code, caught.value.code) == (507, "storage_full")
        assert len(names_below(tmp_path / "files")) == 1
        server.client.files.delete(server.client.files.list().data[0].id)
        upload(server, b"x" * 600)
