"""A real server with the files and fine-tuning routes alone, and a runner that pretends to train."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from openai import OpenAI

from finetune_fakes import FakeRunner, trainable, wait_until
from running import settings
from tokenloom.finetune.service import JobService
from tokenloom.finetune.store import Store
from tokenloom.serve.context import RequestContext
from tokenloom.serve.errors import install_error_handlers
from tokenloom.serve.files import files_router
from tokenloom.serve.fine_tuning import fine_tuning_router
from tokenloom.serve.key_ring import KeyRing
from tokenloom.serve.security import KeyCheck


@dataclass
class Server:
    client: OpenAI
    service: JobService
    runner: FakeRunner
    url: str
    app: FastAPI


@contextlib.contextmanager
def serving(home: Path, keys: KeyRing | None = None, **limits: Any) -> Iterator[Server]:
    store = Store(home, **limits)
    runner = FakeRunner()
    service = JobService(store, runner, trainable())
    service.start()
    app = FastAPI()
    install_error_handlers(app)
    app.include_router(files_router(service))
    app.include_router(fine_tuning_router(service))
    app.add_middleware(KeyCheck, keys=keys or KeyRing(settings()))
    app.add_middleware(RequestContext, count=lambda method, route, status: None, done=lambda record: None)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        wait_until(lambda: server.started)
        with OpenAI(base_url=url, api_key="none", max_retries=0, timeout=20) as client:
            yield Server(client, service, runner, url, app)
    finally:
        server.should_exit = True
        thread.join()
        service.stop()
        store.close()
