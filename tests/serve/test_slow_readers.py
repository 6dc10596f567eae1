"""Clients that read slowly, or are gone without a word: what they asked for ends, and they are let go."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import sys
import time

import pytest

from fake_engine import FakeEngine
from running import settings
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.errors import GenerationError
from tokenloom.serve.completions_protocol import CompletionRequest
from tokenloom.serve.generation import Generation
from tokenloom.serve.listening import listen

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="these options are Linux's")


async def start(engine: FakeEngine) -> Generation:
    body = CompletionRequest(model="fake", prompt="a")
    return await Generation.start(engine, body, [[1], [2]], SamplingParams(max_tokens=400))


async def test_an_answer_that_nobody_reads_is_ended():
    engine = FakeEngine(settings(limits__max_unread=10))
    engine.start()
    generation = await start(engine)
    while len(engine.aborted) < 2:
        await asyncio.sleep(0)
    read = []
    with pytest.raises(GenerationError, match="too slowly"):
        async for number, _ in generation.outputs():
            read.append(number)
    assert len(read) == 20
    assert engine.running == 0
    await generation.aclose()


async def test_an_answer_that_is_read_as_it_comes_is_not():
    engine = FakeEngine(settings(limits__max_unread=8))
    engine.start()
    generation = await start(engine)
    answers = await generation.finish()
    assert [len(answer.completions[0].token_ids) for answer in answers] == [400, 400]
    assert not engine.aborted
    await generation.aclose()


@LINUX
def test_accepted_connections_are_probed_when_they_are_silent():
    with listen(settings(server__port=0, server__dead_peer_s=30).server) as listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            options = [
                accepted.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
                for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
            ]
    assert options == [15, 5, 3, 30_000]


@LINUX
def test_a_connection_that_takes_nothing_more_is_closed_by_the_system():
    with listen(settings(server__port=0, server__dead_peer_s=1).server) as listener:
        listener.listen()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(listener.getsockname())
            accepted, _ = listener.accept()
            with accepted:
                accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
                accepted.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        accepted.send(b"x" * 4096)
                accepted.settimeout(10)
                began = time.monotonic()
                with pytest.raises(OSError) as error:
                    accepted.recv(1)
                assert error.value.errno == errno.ETIMEDOUT
                assert time.monotonic() - began < 8
