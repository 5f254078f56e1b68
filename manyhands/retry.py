"""Deadlines and retries of typed clients: bounded in time, jittered, and only where the contract allows a repeat.

A short call is one line: call_with_retry(lambda t: stub.GetDataset(request, timeout=t), timeout_s=5, idempotent=True), whose
one bound holds for attempts and waits together. What lasts, or takes longer the more bytes it carries, cannot be bounded so:
there, Patience bounds only how long the server may be away.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from grpc_health.v1 import health_pb2, health_pb2_grpc

from . import channel, errors
from .security import SecuritySettings

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Backoff:
    """Waits between attempts: "full jitter", uniform in [0, min(longest_s, first_s * 2**attempt)], so that a fleet that lost
    one server does not come back in step (Brooker, "Exponential backoff and jitter", AWS Architecture Blog, 2015)."""

    first_s: float = 0.05
    longest_s: float = 2.0
    random: Callable[[], float] = field(default=random.random, repr=False)

    def wait_s(self, attempt: int) -> float:
        """attempt counts from 0."""
        return self.random() * min(self.longest_s, self.first_s * 2.0 ** min(attempt, 30))


def wait_before_retry_s(
    error: errors.ManyhandsError, *, attempt: int, idempotent: bool, left_s: float, backoff: Backoff
) -> float | None:
    """Seconds to wait before the next attempt, or None where error must be raised.

    Only UNAVAILABLE, and RESOURCE_EXHAUSTED that names a time, are worth another attempt; only an idempotent call may have
    one (after UNAVAILABLE nobody knows whether the server did it); and there must be time left after the wait.
    """
    if not idempotent:
        return None
    if isinstance(error, errors.Overloaded) and error.retry_after_s is not None:
        # Not before the server's time; a little after it, spread.
        wait_s = error.retry_after_s + backoff.wait_s(attempt)
    elif isinstance(error, errors.Unreachable):
        wait_s = max(error.retry_after_s or 0.0, backoff.wait_s(attempt))
    else:
        return None
    return wait_s if wait_s < left_s else None


class _Attempts:
    """Those that fit into bound_s from now on."""

    def __init__(self, bound_s: float, *, idempotent: bool, backoff: Backoff | None) -> None:
        self._end_s = time.monotonic() + bound_s
        self._idempotent = idempotent
        self._backoff = backoff or Backoff()
        self._num_failed = 0

    def left_s(self) -> float:
        """For the deadline of an attempt; above 0."""
        return max(self._end_s - time.monotonic(), 0.001)

    def wait_s(self, error: errors.ManyhandsError) -> float:
        """After an attempt that failed with error: seconds until the next one, or raises error when there is none."""
        wait_s = wait_before_retry_s(
            error,
            attempt=self._num_failed,
            idempotent=self._idempotent,
            left_s=self._end_s - time.monotonic(),
            backoff=self._backoff,
        )
        if wait_s is None:
            raise error
        self._num_failed += 1
        return wait_s


def call_with_retry(call: Callable[[float], T], *, timeout_s: float, idempotent: bool, backoff: Backoff | None = None) -> T:
    """call(seconds left), again as wait_before_retry_s says; timeout_s bounds everything, waits too.

    Raises:
        ManyhandsError: What the last attempt raised, translated.
    """
    attempts = _Attempts(timeout_s, idempotent=idempotent, backoff=backoff)
    while True:
        try:
            with channel.translated_errors():
                return call(attempts.left_s())
        except errors.ManyhandsError as error:
            time.sleep(attempts.wait_s(error))


async def call_with_retry_aio(
    call: Callable[[float], Awaitable[T]], *, timeout_s: float, idempotent: bool, backoff: Backoff | None = None
) -> T:
    """As call_with_retry, for asyncio stubs."""
    attempts = _Attempts(timeout_s, idempotent=idempotent, backoff=backoff)
    while True:
        try:
            with channel.translated_errors():
                return await call(attempts.left_s())
        except errors.ManyhandsError as error:
            await asyncio.sleep(attempts.wait_s(error))


class Patience:
    """With what is idempotent and has no one deadline: the server may be away for patience_s at a time.

    The time counts from the first failure since the last progress(), so a stream that lived for hours has all of it when it
    breaks. patience_s 0 means one attempt. For one thread.
    """

    def __init__(self, patience_s: float, *, backoff: Backoff | None = None) -> None:
        self._patience_s = patience_s
        self._backoff = backoff
        self._attempts: _Attempts | None = None

    def progress(self) -> None:
        """The server gave something that need not be asked for again."""
        self._attempts = None

    def wait(self, error: errors.ManyhandsError) -> None:
        """Sleeps until the next attempt, or raises error when there is no patience left or no attempt is worth it."""
        if self._attempts is None:
            self._attempts = _Attempts(self._patience_s, idempotent=True, backoff=self._backoff)
        time.sleep(self._attempts.wait_s(error))


def call_with_patience(call: Callable[[], T], *, patience_s: float, backoff: Backoff | None = None) -> T:
    """call(), which is idempotent and brings its own deadlines, again while the server is away, at most patience_s.

    Raises:
        ManyhandsError: What the last attempt raised, translated.
    """
    patience = Patience(patience_s, backoff=backoff)
    while True:
        try:
            with channel.translated_errors():
                return call()
        except errors.ManyhandsError as error:
            patience.wait(error)


def wait_until_serving(
    address: str, *, timeout_s: float, service: str = "", security_settings: SecuritySettings | None = None
) -> None:
    """Returns once the standard health service at address says SERVING for service ("" for the whole server).

    Raises:
        TooLate: Not within timeout_s; the message has the last answer.
        Unauthenticated, NotAllowed: The server is there and does not want us.
    """
    end = time.monotonic() + timeout_s
    request = health_pb2.HealthCheckRequest(service=service)
    answer = "no answer"
    with channel.connect(address, security_settings=security_settings) as link:
        stub = health_pb2_grpc.HealthStub(link)
        while (left_s := end - time.monotonic()) > 0:
            try:
                with channel.translated_errors():
                    # wait_for_ready would hide why a connection fails.
                    status = stub.Check(request, timeout=min(left_s, 2.0)).status
            except (errors.Unreachable, errors.TooLate, errors.NotFound) as error:
                answer = str(error)
            else:
                if status == health_pb2.HealthCheckResponse.SERVING:
                    return
                answer = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
            time.sleep(max(0.0, min(0.05, end - time.monotonic())))
    raise errors.TooLate(
        f"{service or 'the server'} at {address} does not serve after {timeout_s:g} s; last answer: {answer}"
    )


async def wait_until_serving_aio(
    address: str, *, timeout_s: float, service: str = "", security_settings: SecuritySettings | None = None
) -> None:
    """As wait_until_serving, without blocking the loop."""
    await asyncio.to_thread(
        wait_until_serving, address, timeout_s=timeout_s, service=service, security_settings=security_settings
    )
