"""Channels to services: the same options, credentials and error translation everywhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import grpc

from . import errors
from .security import SecuritySettings, channel_credentials
from .server import CHANNEL_OPTIONS


def connect(address: str, *, security_settings: SecuritySettings | None = None) -> grpc.Channel:
    """A blocking channel to "host:port": plain on loopback without an authority, else TLS with certificate and token.

    Raises:
        Refused: Neither loopback nor an authority.
    """
    credentials = channel_credentials(address, security_settings or SecuritySettings())
    if credentials is None:
        return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    return grpc.secure_channel(address, credentials, options=CHANNEL_OPTIONS)


def connect_aio(address: str, *, security_settings: SecuritySettings | None = None) -> grpc.aio.Channel:
    """An asyncio channel; as connect()."""
    credentials = channel_credentials(address, security_settings or SecuritySettings())
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    return grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS)


@contextlib.contextmanager
def translated_errors() -> Iterator[None]:
    """Inside, what gRPC raises comes out as the library's errors."""
    try:
        yield
    except grpc.RpcError as error:
        raise errors.from_rpc_error(error) from None
