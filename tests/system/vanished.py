"""A client whose host vanishes without a word: its answer is dropped, and others go on.

    sudo python tests/system/vanished.py        # Linux, root: a network of its own, and a wire that is cut

The client streams a long answer from another network namespace. Then the wire between them is cut, so that
nothing comes back, no FIN and no RST. The run passes if the server gives the connection up within a few times
`server.dead_peer_s`, with the answer's blocks free, while a client on loopback is answered as before. Twice:
while tokens are on their way, and on a connection that waits for its whole answer.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from soak import report

from server_process import ServerProcess

SPACE, OURS, THEIRS, SERVER = "tl-vanish", "tl-wire0", "tl-wire1", "10.213.77.1"
MODEL = "smollm2-135m-instruct"
DEAD_PEER_S = 4
PATIENCE_S = 4 * DEAD_PEER_S
CLIENT = """
import sys, httpx
with httpx.stream("POST", sys.argv[1], json=eval(sys.argv[2]), timeout=None) as answer:
    answer.raise_for_status()
    for line in answer.iter_lines():
        print(line, flush=True)
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def lay_wire() -> None:
    """A namespace with one address, wired to ours."""
    ip("netns", "add", SPACE)
    ip("link", "add", OURS, "type", "veth", "peer", "name", THEIRS, "netns", SPACE)
    ip("addr", "add", f"{SERVER}/24", "dev", OURS)
    ip("link", "set", OURS, "up")
    ip("-n", SPACE, "addr", "add", "10.213.77.2/24", "dev", THEIRS)
    ip("-n", SPACE, "link", "set", THEIRS, "up")


def take_away() -> None:
    for words in (("link", "del", OURS), ("netns", "del", SPACE)):
        subprocess.run(["ip", *words], check=False, stderr=subprocess.DEVNULL)


def vanish(server: ServerProcess, body: dict[str, Any], tokens: bool) -> dict[str, Any]:
    """One client that is cut off: behind its first tokens, or as soon as its request runs."""
    url = f"http://{SERVER}:{server.port}/v1/chat/completions"
    client = subprocess.Popen(
        ["ip", "netns", "exec", SPACE, sys.executable, "-c", CLIENT, url, repr(body)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert client.stdout is not None
    try:
        if tokens:
            for _ in range(10):
                if not client.stdout.readline():
                    raise SystemExit("the client was not answered")
        else:
            while not server.metrics()["num_requests_running"]:
                time.sleep(0.02)
        ip("link", "set", OURS, "down")
        cut = time.monotonic()
        other = httpx.post(
            f"{server.url}/v1/chat/completions",
            json={"model": MODEL, "messages": body["messages"], "max_tokens": 4},
            timeout=60,
        )
        while (now := server.metrics())["num_requests_running"] and time.monotonic() - cut < PATIENCE_S:
            time.sleep(0.1)
        return {
            "given up after, s": round(time.monotonic() - cut, 1),
            "running": now["num_requests_running"],
            "no block is held": now["kv_blocks_free"] == now["kv_blocks"] - now["kv_blocks_cached"],
            "another client meanwhile": other.status_code,
            "log": server.errors()[:5],
        }
    finally:
        client.kill()
        client.wait()
        ip("link", "set", OURS, "up")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    say = [{"role": "user", "content": "Write a very long story about a lighthouse."}]
    streamed = {"model": MODEL, "messages": say, "stream": True, "max_tokens": 6000, "ignore_eos": True}
    whole = {**streamed, "stream": False}
    settings = [
        "server.host=0.0.0.0",
        f"server.dead_peer_s={DEAD_PEER_S}",
        f'server.allowed_hosts=["{SERVER}"]',
    ]
    take_away()  # of a run that was killed
    with tempfile.TemporaryDirectory(prefix="tokenloom-vanished-") as folder:
        server = ServerProcess(Path(folder), settings)
        try:
            lay_wire()
            server.start()
            runs = {
                "while tokens come": vanish(server, streamed, tokens=True),
                "before the answer": vanish(server, whole, tokens=False),
            }
        finally:
            server.kill()
            take_away()
    passed = all(
        not run["running"]
        and run["no block is held"]
        and run["another client meanwhile"] == 200
        and not run["log"]
        for run in runs.values()
    )
    report({"passed": passed, **runs}, options.json)


if __name__ == "__main__":
    main()
