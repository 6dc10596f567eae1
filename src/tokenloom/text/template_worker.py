"""Chat templates in a process of their own, which is killed when it takes too long.

The sandbox keeps a template from reaching Python; it cannot keep it from multiplying numbers for an hour, nor
from doubling a list until memory ends. A process can be limited in both, whatever the template does.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from typing import Any

from tokenloom.text import template_process

START_SECONDS = 60.0
_MAX_ANSWER_BYTES = 64 << 20


class TemplateFailure(Exception):
    """A template gave no text; the message may be shown to whoever sent the messages."""


class TemplateWorker:
    """One such process, started when first needed and again when it has been killed. Renders one at a time,
    from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._parent = 0

    def render(self, source: str, variables: dict[str, Any], max_seconds: float) -> str:
        """The template's text. Raises TemplateFailure."""
        try:
            request = json.dumps({"source": source, "variables": variables}).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateFailure(f"the messages hold what is not JSON: {error}") from None
        with self._lock:
            answer = json.loads(self._ask(request, max_seconds))
        if "text" not in answer:
            raise TemplateFailure(answer["error"])
        return str(answer["text"])

    def close(self) -> None:
        """End the process, if it runs."""
        process, self._process = self._process, None
        # After a fork it is the parent's.
        if process is not None and self._parent == os.getpid():
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):  # it would write what was left to write
                    pipe.close()

    def _ask(self, request: bytes, max_seconds: float) -> bytes:
        if self._process is None or self._parent != os.getpid() or self._process.poll() is not None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
            return self._line(self._process, max_seconds)
        except TimeoutError:
            self.close()
            raise TemplateFailure(
                f"the model's chat template ran for more than {max_seconds:g} seconds"
            ) from None
        except OSError:
            self.close()
            raise TemplateFailure("the model's chat template broke the process that it ran in") from None

    def _start(self) -> None:
        """Raises OSError (TimeoutError is one) if it does not come up."""
        self.close()
        # No keys or tokens of this process's environment; modules are found where this one finds them.
        environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        if "TZ" in os.environ:
            environment["TZ"] = os.environ["TZ"]
        self._process = subprocess.Popen(
            [sys.executable, template_process.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd="/",
            start_new_session=True,  # Ctrl-C is for us, not for it
        )
        self._parent = os.getpid()
        try:
            said = self._line(self._process, START_SECONDS)
        except OSError:
            self.close()
            raise
        if said != template_process.READY:
            self.close()
            raise OSError("the process for chat templates did not start")

    def _line(self, process: subprocess.Popen[bytes], max_seconds: float) -> bytes:
        """What it says next. Raises TimeoutError, or OSError if it ends or never comes to an end."""
        assert process.stdout is not None
        deadline = time.monotonic() + max_seconds
        pipe, said = process.stdout.fileno(), bytearray()
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        while not said.endswith(b"\n"):
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not poll.poll(left_s * 1000):
                raise TimeoutError
            data = os.read(pipe, 1 << 16)
            said += data
            if not data or len(said) > _MAX_ANSWER_BYTES:
                raise OSError("it ended")
        return bytes(said)


WORKER = TemplateWorker()
atexit.register(WORKER.close)
