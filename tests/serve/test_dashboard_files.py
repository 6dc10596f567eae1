"""The dashboard's page and files: what may run in it, what is kept, and that nothing else can be read."""

import http.client
import re

import pytest

from running import assert_error
from tokenloom.serve.static import PAGE_PATHS


def test_the_page_is_html_that_runs_nothing_inline_and_nothing_from_elsewhere(shared):
    response = shared.http.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert not re.search(r"<script(?![^>]* src=)|\sstyle=|\son\w+=|https?://", response.text)


def test_every_file_that_the_page_names_is_served(shared):
    named = re.findall(r'(?:src|href)="(/[^"]+)"', shared.http.get("/").text)
    modules = [path for path in PAGE_PATHS if path.endswith(".js")]
    assert set(named) <= set(PAGE_PATHS) and len(named) > 5
    for path in modules:
        imported = re.findall(r'from "\.(/[^"]+)"', shared.http.get(path).text)
        assert {f"/dashboard{name}" for name in imported} <= set(PAGE_PATHS)


@pytest.mark.parametrize("path", PAGE_PATHS)
def test_each_file_is_kept_until_it_changes(shared, path):
    first = shared.http.get(path)
    assert (
        first.headers["cache-control"] == "no-cache" and first.headers["x-content-type-options"] == "nosniff"
    )
    for condition in (first.headers["etag"], f'"other", W/{first.headers["etag"]}', "*"):
        again = shared.http.get(path, headers={"if-none-match": condition})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == first.headers["etag"]
    assert shared.http.get(path, headers={"if-none-match": '"other"'}).content == first.content


def test_head_is_get_without_the_body(shared):
    head, whole = shared.http.head("/"), shared.http.get("/")
    assert head.status_code == 200 and head.content == b""
    for name in ("content-length", "content-type", "etag", "content-security-policy"):
        assert head.headers[name] == whole.headers[name]


def test_the_page_is_not_to_be_written(shared):
    assert_error(shared.http.post("/", json={}), 405, None, "method_not_allowed")


@pytest.mark.parametrize(
    "path",
    [
        "/dashboard",
        "/dashboard/",
        "/dashboard/../app.py",
        "/dashboard/%2e%2e/app.py",
        "/dashboard/..%2fapp.py",
        "/dashboard//etc/passwd",
        "/dashboard/vendor/../../app.py",
        "/dashboard/base.css%00.js",
        "/dashboard/base.css%0a",
        "/dashboard/index.html",
        "/%0a",
    ],
)
def test_no_other_path_is_a_file(shared, path):
    connection = http.client.HTTPConnection("127.0.0.1", shared.port)
    connection.request("GET", path)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    # A line break at the end of a path is none to the router: then it is the file itself.
    assert response.status == 404 or (path.endswith("%0a") and response.status == 200), body


def test_with_keys_the_page_loads_without_one_and_what_it_shows_does_not(serve):
    server = serve(server__api_keys=["one"])
    for path in PAGE_PATHS:
        assert server.http.get(path).status_code == 200
    for path in ("/live", "/v1/models", "/v1/methods", "/dashboard/nothing.js"):
        assert_error(server.http.get(path), 401, None, "invalid_api_key")


def test_the_librarys_licence_comes_with_it(shared):
    assert "MIT License" in shared.http.get("/dashboard/vendor/uPlot-LICENSE.txt").text


def test_methods_are_listed_with_their_knobs(shared):
    cards = shared.http.get("/v1/methods").json()["data"]
    found = {(card["hook"], card["name"]): card for card in cards}
    assert found["kv", "snapkv"]["knobs"]["budget"] and found["kv", "snapkv"]["arxiv"]
    assert ("draft", "ngram") in found
