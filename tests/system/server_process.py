"""A `tokenloom serve` of its own for the scripts beside this file: started, watched, killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

START_S = 300


class ServerProcess:
    """The server on a free port of 127.0.0.1, with its state in `home` and what it says in `home/server.log`.

    Args:
        settings: `key=value` as `--set` takes them.
    """

    def __init__(self, home: Path, settings: list[str]) -> None:
        self.home, self.settings = home, settings
        home.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server is killed with the script

    def start(self) -> float:
        """Start it and wait until it takes requests; seconds that took."""
        command = [sys.executable, "-m", "tokenloom", "serve", "--port", str(self.port)]
        for setting in self.settings:
            command += ["--set", setting]
        began = time.monotonic()
        with (self.home / "server.log").open("ab") as log:
            environment = {**os.environ, "TOKENLOOM_HOME": str(self.home)}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        while time.monotonic() - began < START_S:
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended with {self.process.returncode}:\n{self.log_tail()}")
            try:
                if httpx.get(f"{self.url}/ready", timeout=5).status_code == 200:
                    return time.monotonic() - began
            except httpx.TransportError:
                time.sleep(0.05)
        self.kill()
        raise SystemExit(f"the server was not ready within {START_S} s:\n{self.log_tail()}")

    def kill(self) -> None:
        """SIGKILL, if it runs."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self, timeout_s: float = 90) -> int:
        """SIGTERM; the exit status. Kills it, and says -9, if it takes longer."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return -signal.SIGKILL

    def metrics(self) -> dict[str, float]:
        """The engine's own numbers by name without prefix: `num_requests_running`, ..."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        return {
            sample.name.removeprefix("tokenloom:"): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if set(sample.labels) <= {"model_name"}
        }

    def rss_bytes(self) -> int:
        """Memory that the process holds; Linux only."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024

    def log_tail(self, lines: int = 30) -> str:
        """The last lines that the server wrote."""
        return "\n".join((self.home / "server.log").read_text(errors="replace").splitlines()[-lines:])

    def errors(self) -> list[str]:
        """Lines of its log that say that something broke."""
        text = (self.home / "server.log").read_text(errors="replace")
        return [line for line in text.splitlines() if " ERROR " in line or line.startswith("Traceback")]
