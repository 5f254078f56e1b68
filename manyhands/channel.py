"""Channels to services: the same options, credentials and error translation everywhere, and what every typed client has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import ClassVar, Self

import grpc

from . import errors
from .security import SecuritySettings, channel_credentials
from .server import CHANNEL_OPTIONS


def connect(
    address: str, *, security_settings: SecuritySettings | None = None, options: Sequence[tuple[str, int]] = ()
) -> grpc.Channel:
    """A blocking channel to "host:port": plain on loopback without an authority, else TLS with certificate and token.

    Args:
        options: Of gRPC, besides those of every channel.

    Raises:
        Refused: Neither loopback nor an authority.
    """
    credentials = channel_credentials(address, security_settings or SecuritySettings())
    all_options = [*CHANNEL_OPTIONS, *options]
    if credentials is None:
        return grpc.insecure_channel(address, options=all_options)
    return grpc.secure_channel(address, credentials, options=all_options)


def connect_aio(address: str, *, security_settings: SecuritySettings | None = None) -> grpc.aio.Channel:
    """An asyncio channel; as connect()."""
    credentials = channel_credentials(address, security_settings or SecuritySettings())
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    return grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS)


class Client:
    """One connection to one server, closed with the client; any number of threads may use it. Base of the typed clients.

    Attributes:
        SERVER: Whom a message names when nobody answers, as "robot agent".
        OPTIONS: As connect()'s.

    Args:
        address: "host:port".
    """

    SERVER: ClassVar[str]
    OPTIONS: ClassVar[Sequence[tuple[str, int]]] = ()

    def __init__(self, address: str, *, security_settings: SecuritySettings | None = None) -> None:
        self.address = address
        self._channel = connect(address, security_settings=security_settings, options=self.OPTIONS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def wait_until_ready(self, timeout_s: float = 10.0) -> None:
        """Blocks until the server accepts connections; TooLate after timeout_s."""
        ready = grpc.channel_ready_future(self._channel)
        try:
            ready.result(timeout=timeout_s)
        except grpc.FutureTimeoutError:
            # It would go on watching the connection for as long as the client lives.
            ready.cancel()
            raise errors.TooLate(
                f"no {self.SERVER} answered on {self.address} within {timeout_s:g} s; is it running?"
            ) from None


@contextlib.contextmanager
def translated_errors() -> Iterator[None]:
    """Inside, what gRPC raises comes out as the library's errors."""
    try:
        yield
    except grpc.RpcError as error:
        raise errors.from_rpc_error(error) from None
