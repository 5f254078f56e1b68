"""Ports for servers that must be told theirs."""

from __future__ import annotations

import socket


def free_port() -> int:
    """On loopback, free a moment ago."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
