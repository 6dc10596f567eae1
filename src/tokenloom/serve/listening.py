"""The socket that the server listens on, and how long it puts up with a client that is gone."""

from __future__ import annotations

import socket

from tokenloom.config import ConfigError, ServerSettings

PROBES = 3


def listen(server: ServerSettings) -> socket.socket:
    """A bound socket. Connections that it accepts are given up by the system once their client has taken
    nothing of what was sent to it, or has not answered probes, for `server.dead_peer_s`; the server then sees
    a client that went away, and ends what it asked for.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _limit_silence(listener, server.dead_peer_s)
    try:
        listener.bind((server.host, server.port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"server.host, server.port: cannot listen on {server.host}:{server.port}: {error}"
        ) from error
    return listener


def _limit_silence(listener: socket.socket, seconds: float) -> None:
    """Accepted sockets inherit all of these where the system has them (Linux: `man 7 tcp`)."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    half, interval = max(1, round(seconds / 2)), max(1, round(seconds / 2 / PROBES))
    for name, value in (
        ("TCP_KEEPIDLE", half),
        ("TCP_KEEPINTVL", interval),
        ("TCP_KEEPCNT", PROBES),
        ("TCP_USER_TIMEOUT", round(seconds * 1e3)),
    ):
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
