"""The Dockerfile's steps without Docker: built on top of this machine's own system, and served from there.

    python tests/system/image_steps.py [--build-arg TORCH_INDEX=URL]

Needs Linux and root, and nothing is left behind: each stage is an overlay over `/` in memory (some 4 GB), in
mount, process and network namespaces of its own. Every RUN, COPY and ENV is done as it stands there; then the
last stage is started as `docker run --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges`
would, with a tiny random model: it must be unhealthy before it answers and healthy after, answer a request,
write to /data alone, and end with status 0 on SIGTERM.

What stays unshown: the base image (this machine's system and Python are in its place, so that a package
which they happen to have would not be missed) and what only Docker does (layers, caching, VOLUME). The build
reaches the network as ever; the server has loopback alone.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.path.realpath(sys._base_executable))  # type: ignore[attr-defined]
SYSTEM_PATH = f"{PYTHON.parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
START_S = 120
CLONE_NEWNET = 0x40000000  # of Linux' sched.h; os.unshare came with Python 3.12
STOP_S = 60
ASK = """
import json, urllib.request as r
body = {"model": "tiny", "prompt": "the sea", "max_tokens": 8, "ignore_eos": True}
headers = {"Content-Type": "application/json"}
request = r.Request("http://127.0.0.1:8000/v1/completions", json.dumps(body).encode(), headers)
assert json.load(r.urlopen(request))["usage"]["completion_tokens"] == 8
"""


@dataclass
class Stage:
    """What a stage has come to so far."""

    root: Path
    env: dict[str, str] = field(default_factory=lambda: {"PATH": SYSTEM_PATH})
    folder: str = "/"
    user: str = "0:0"
    said: dict[str, str] = field(default_factory=dict)
    """HEALTHCHECK, ENTRYPOINT and CMD."""

    def expand(self, text: str) -> str:
        return string.Template(text).safe_substitute(self.env)

    def inside(self, path: str) -> Path:
        """Where a path of the image lies here."""
        return self.root / os.path.join(self.folder, path).lstrip("/")

    def command(self, words: list[str], more: dict[str, str] | None = None) -> list[str]:
        env = [f"{key}={value}" for key, value in {**self.env, **(more or {})}.items()]
        return ["chroot", str(self.root), "env", "-i", "-C", self.folder, *env, *words]


def over_this_system(where: Path) -> Path:
    """A copy of `/` that can be written to."""
    upper, work, merged = (where / name for name in ("upper", "work", "merged"))
    for folder in (upper, work, merged):
        folder.mkdir(parents=True)
    layers = f"lowerdir=/,upperdir={upper},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, merged], check=True)
    subprocess.run(["mount", "-t", "proc", "proc", merged / "proc"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", merged / "dev"], check=True)
    for name in DEVICES:
        (merged / "dev" / name).touch()
        subprocess.run(["mount", "--bind", f"/dev/{name}", merged / "dev" / name], check=True)
    for folder in list(PYTHON.parents)[:-1]:  # where whoever runs the image must come through, too
        inside = merged / str(folder).lstrip("/")
        inside.chmod(inside.stat().st_mode | 0o011)
    return merged


def copy(stage: Stage, words: str, stages: dict[str, Stage]) -> None:
    """COPY, with --from and --chown; .dockerignore's patterns for all folders are left out."""
    options = dict(re.findall(r"--(\w+)=(\S+)", words))
    *sources, target = re.sub(r"--\w+=\S+\s*", "", words).split()
    base = stages[options["from"]].root if "from" in options else ROOT
    ignored = [line[3:] for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("**/")]
    skip = shutil.ignore_patterns(*ignored) if "from" not in options else None
    for source in sources:
        path, to = base / source.lstrip("/"), stage.inside(target)
        if path.is_dir():
            shutil.copytree(path, to, symlinks=True, ignore=skip, dirs_exist_ok=True)
        else:
            shutil.copy2(path, to / path.name if target.endswith("/") else to)
        if "chown" in options:
            subprocess.run(["chown", "-R", options["chown"], to], check=True)


def build(memory: Path, given: dict[str, str]) -> Stage:
    """Do what the Dockerfile says; the last stage."""
    passed = {k: v for k, v in os.environ.items() if k.startswith("PIP_") or k.lower().endswith("_proxy")}
    stages: dict[str, Stage] = {}
    stage, arguments = Stage(Path("/")), {}
    for step in DockerfileParser(path=str(ROOT / "Dockerfile")).structure:
        what, value = step["instruction"], step["value"]
        if what != "COMMENT":
            print(f"{what} {value[:100]}", flush=True)
        if what == "FROM":
            name = value.split(" AS ")[-1]
            stage, arguments = Stage(over_this_system(memory / str(len(stages)))), {}
            stages[name] = stage
        elif what == "ARG":
            key, _, default = value.partition("=")
            arguments[key] = given.get(key, default)
        elif what == "ENV":
            pairs = [word.split("=", 1) for word in shlex.split(value)]
            stage.env |= {key: stage.expand(text) for key, text in pairs}
        elif what == "RUN":
            command = stage.command(["/bin/sh", "-c", value], {**passed, **arguments})
            subprocess.run(command, check=True)
        elif what == "COPY":
            copy(stage, value, stages)
        elif what == "WORKDIR":
            stage.folder = value
            stage.inside("").mkdir(parents=True, exist_ok=True)
        elif what == "USER":
            stage.user = value
        elif what in ("HEALTHCHECK", "ENTRYPOINT", "CMD"):
            stage.said[what] = value[value.index("[") :]
        elif what not in ("COMMENT", "EXPOSE", "VOLUME"):
            raise SystemExit(f"{what}: this script does not know it")
    return stage


def serve(stage: Stage, model: Path) -> None:
    """Start the image as its page says, ask it, stop it."""
    tiny = stage.inside("/models/tiny")
    shutil.copytree(model, tiny)
    subprocess.run(["chmod", "-R", "a+rX", tiny], check=True)
    data, root = stage.inside("/data"), str(stage.root)
    # What `docker run` does for --read-only, --tmpfs /tmp and the volume.
    subprocess.run(["mount", "--bind", data, data], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", root], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", stage.inside("/tmp")], check=True)
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "no network namespace")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    uid, gid = stage.user.split(":")
    drop = ["setpriv", "--reuid", uid, "--regid", gid, "--clear-groups", "--no-new-privs"]
    more = {"TOKENLOOM_MODEL__NAME": "/models/tiny", "TOKENLOOM_MODEL__BACKEND": "cpu"}  # that was compiled

    def command(words: list[str]) -> list[str]:
        return stage.command([*drop, "--bounding-set=-all", *words], more)

    healthy = command(json.loads(stage.said["HEALTHCHECK"]))

    def is_healthy() -> bool:
        return subprocess.run(healthy, check=False, stderr=subprocess.DEVNULL).returncode == 0

    assert not is_healthy(), "healthy before it runs"
    entry = [*json.loads(stage.said["ENTRYPOINT"]), *json.loads(stage.said["CMD"])]
    server = subprocess.Popen(command(entry))
    try:
        deadline = time.monotonic() + START_S
        while not is_healthy():
            assert server.poll() is None, f"it ended with status {server.returncode}"
            assert time.monotonic() < deadline, f"not healthy within {START_S} s"
            time.sleep(0.5)
        subprocess.run(command(["python", "-c", ASK]), check=True)
        server.send_signal(signal.SIGTERM)
        assert server.wait(STOP_S) == 0, f"it ended with status {server.returncode}"
    finally:
        server.kill()
    written = sorted(str(path.relative_to(data)) for path in data.rglob("*"))
    assert all(str(os.lstat(data / path).st_uid) == uid for path in written), "not all is the user's"
    print("in /data:", ", ".join(written))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build-arg", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.inside:
        if os.geteuid():
            raise SystemExit("this needs root: it mounts, and changes its root")
        apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        os.execvp(apart[0], [*apart, sys.executable, *sys.argv, "--inside"])
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_models import build_tiny

    memory = Path(tempfile.mkdtemp(prefix="tokenloom-image-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8g", "tmpfs", memory], check=True)
    try:
        image = build(memory, dict(pair.split("=", 1) for pair in options.build_arg))
        serve(image, build_tiny(memory / "model")[0])
    finally:
        subprocess.run(["umount", "--recursive", "--lazy", memory], check=True)
        memory.rmdir()  # nothing is ever deleted below a mount: that may be the machine's own
    print("built, healthy, answered, stopped")


if __name__ == "__main__":
    main()
