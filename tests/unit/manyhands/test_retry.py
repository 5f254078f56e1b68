"""A call is repeated where that is safe and worth it, for a bounded time, and never in step with the rest of a fleet."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from manyhands import channel, errors, retry
from manyhands.retry import Backoff
from manyhands.server import CHANNEL_OPTIONS, GrpcServer
from manyhands.weights.v1 import weights_pb2, weights_pb2_grpc

NO_WAIT = Backoff(first_s=0)


def _decide(error: errors.ManyhandsError, **changes: object) -> float | None:
    arguments: dict[str, object] = {
        "attempt": 0, "idempotent": True, "left_s": 10.0, "backoff": Backoff(random=lambda: 1.0)
    } | changes  # fmt: skip
    return retry.wait_before_retry_s(error, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", errors.ManyhandsError.__subclasses__(), ids=lambda kind: kind.__name__)
def test_only_a_lost_link_is_repeated_without_being_asked(kind: type[errors.ManyhandsError]) -> None:
    assert (_decide(kind("x")) is not None) == (kind is errors.Unreachable)
    assert (_decide(kind("x", retry_after_s=1)) is not None) == (kind in (errors.Unreachable, errors.Overloaded))


def test_a_call_that_may_have_happened_is_not_repeated() -> None:
    assert _decide(errors.Unreachable("x"), idempotent=False) is None
    assert _decide(errors.Overloaded("x", retry_after_s=0.1), idempotent=False) is None


def test_no_wait_goes_past_the_end() -> None:
    assert _decide(errors.Overloaded("x", retry_after_s=5), left_s=4.9) is None
    assert _decide(errors.Unreachable("x"), left_s=0.0) is None


def test_a_server_that_says_when_is_not_asked_before() -> None:
    for attempt in range(5):
        wait_s = _decide(errors.Overloaded("x", retry_after_s=1.5), attempt=attempt, backoff=Backoff())
        assert wait_s is not None
        assert wait_s >= 1.5


def test_waits_double_up_to_the_longest_and_are_spread() -> None:
    longest = Backoff(first_s=0.1, longest_s=1.0, random=lambda: 1.0)
    assert [longest.wait_s(attempt) for attempt in range(6)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    assert Backoff(random=lambda: 1.0).wait_s(10_000) == 2.0
    spread = [Backoff(first_s=1).wait_s(0) for _ in range(200)]
    assert min(spread) < 0.2 < 0.8 < max(spread)


class Flaky:
    """Fails with error num_failures times, then answers 42."""

    def __init__(self, error: Exception, num_failures: int) -> None:
        self.error, self.num_failures, self.num_calls = error, num_failures, 0

    def __call__(self, timeout_s: float) -> int:
        assert timeout_s > 0
        self.num_calls += 1
        if self.num_calls <= self.num_failures:
            raise self.error
        return 42

    async def aio(self, timeout_s: float) -> int:
        return self(timeout_s)


def _run_sync(flaky: Flaky, idempotent: bool) -> int:
    return retry.call_with_retry(flaky, timeout_s=5, idempotent=idempotent, backoff=NO_WAIT)


def _run_aio(flaky: Flaky, idempotent: bool) -> int:
    return asyncio.run(retry.call_with_retry_aio(flaky.aio, timeout_s=5, idempotent=idempotent, backoff=NO_WAIT))


@pytest.mark.parametrize("run", [_run_sync, _run_aio])
def test_idempotent_call_comes_through_and_another_does_not(run: Callable[[Flaky, bool], int]) -> None:
    flaky = Flaky(errors.Unreachable("gone"), 3)
    assert run(flaky, True) == 42
    assert flaky.num_calls == 4
    flaky = Flaky(errors.Unreachable("gone"), 3)
    with pytest.raises(errors.Unreachable):
        run(flaky, False)
    assert flaky.num_calls == 1


@pytest.mark.parametrize("run", [_run_sync, _run_aio])
def test_what_is_no_link_failure_comes_out_at_once(run: Callable[[Flaky, bool], int]) -> None:
    flaky = Flaky(errors.InvalidInput("bad"), 3)
    with pytest.raises(errors.InvalidInput):
        run(flaky, True)
    assert flaky.num_calls == 1


def test_all_attempts_and_waits_together_are_bounded() -> None:
    start = time.monotonic()
    with channel.connect("127.0.0.1:1") as link:  # Nobody listens on port 1.
        stub = weights_pb2_grpc.WeightsServiceStub(link)

        def call(timeout_s: float) -> object:
            return stub.FindMissing(weights_pb2.FindMissingRequest(), timeout=timeout_s)

        with pytest.raises(errors.Unreachable):
            retry.call_with_retry(call, timeout_s=0.5, idempotent=True)
    assert time.monotonic() - start < 2.0


class Clock:
    """Time passes only where somebody sleeps or the test says so; stands in for the time module."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, wait_s: float) -> None:
        self.now_s += wait_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(retry, "time", clock)
    return clock


STEADY = Backoff(first_s=1.0, longest_s=1.0, random=lambda: 1.0)


def test_patience_lasts_from_the_first_failure_not_from_the_start(clock: Clock) -> None:
    patience = retry.Patience(10.0, backoff=STEADY)
    clock.now_s += 3600.0  # The stream lived for an hour.
    failed_s = clock.now_s
    flaky = Flaky(errors.Unreachable("gone"), 100)

    def run() -> int:
        while True:
            try:
                return flaky(1.0)
            except errors.Unreachable as error:
                patience.wait(error)

    with pytest.raises(errors.Unreachable, match="gone"):
        run()
    assert 8.0 <= clock.now_s - failed_s <= 10.0


def test_progress_gives_all_the_patience_back_and_the_short_waits(clock: Clock) -> None:
    patience = retry.Patience(10.0, backoff=Backoff(first_s=1.0, longest_s=4.0, random=lambda: 1.0))
    for _ in range(20):
        began_s = clock.now_s
        patience.wait(errors.Unreachable("gone"))
        assert clock.now_s - began_s == 1.0
        patience.wait(errors.Unreachable("gone"))
        assert clock.now_s - began_s == 3.0
        patience.progress()


def test_patience_is_with_a_server_that_is_away_or_says_when(clock: Clock) -> None:
    patience = retry.Patience(10.0, backoff=STEADY)
    began_s = clock.now_s
    patience.wait(errors.Overloaded("full", retry_after_s=5.0))
    assert clock.now_s - began_s >= 5.0
    for error in (errors.Overloaded("full"), errors.Corrupt("bad"), errors.TooLate("late"), errors.Cancelled("closed")):
        with pytest.raises(type(error)):
            patience.wait(error)


@pytest.mark.parametrize(("patience_s", "num_calls"), [(0.0, 1), (10.0, 4)])
def test_a_call_with_patience_comes_through_and_one_without_is_made_once(
    clock: Clock, patience_s: float, num_calls: int
) -> None:
    flaky = Flaky(errors.Unreachable("gone"), 3)

    def run() -> int:
        return retry.call_with_patience(lambda: flaky(1.0), patience_s=patience_s, backoff=STEADY)

    if patience_s:
        assert run() == 42
    else:
        with pytest.raises(errors.Unreachable):
            run()
    assert flaky.num_calls == num_calls


async def test_waits_for_a_server_that_starts_late() -> None:
    server = GrpcServer("127.0.0.1:0")  # Has its port, and does not serve yet.
    waiting = asyncio.create_task(retry.wait_until_serving_aio(server.address, timeout_s=20))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    await server.start()
    try:
        await waiting
    finally:
        await server.stop(0)


async def test_client_comes_back_soon_after_a_server_restarted() -> None:
    server = GrpcServer("127.0.0.1:0")
    await server.start()
    address = server.address
    await retry.wait_until_serving_aio(address, timeout_s=5)
    await server.stop(0)
    waiting = asyncio.create_task(retry.wait_until_serving_aio(address, timeout_s=20))
    await asyncio.sleep(1.5)
    server = GrpcServer(address)
    await server.start()
    start = time.monotonic()
    try:
        await waiting
        assert time.monotonic() - start < 2.0
    finally:
        await server.stop(0)


def test_a_long_outage_does_not_lengthen_the_way_back() -> None:
    """gRPC's own waits grow to two minutes: too long to watch here, and for a robot that holds."""
    options = dict(CHANNEL_OPTIONS)
    assert options["grpc.max_reconnect_backoff_ms"] <= 1000
    assert options["grpc.min_reconnect_backoff_ms"] <= 1000


def test_nobody_there_is_said_with_the_reason() -> None:
    with pytest.raises(errors.TooLate, match=r"127.0.0.1:1 does not serve after 0.3 s; last answer: .*refused"):
        retry.wait_until_serving("127.0.0.1:1", timeout_s=0.3)


async def test_a_service_that_the_server_lacks_is_not_serving() -> None:
    server = GrpcServer("127.0.0.1:0")
    await server.start()
    try:
        with pytest.raises(errors.TooLate, match=r"manyhands.robot.v1.RobotService at .* does not serve"):
            await retry.wait_until_serving_aio(server.address, timeout_s=0.3, service="manyhands.robot.v1.RobotService")
    finally:
        await server.stop(0)
