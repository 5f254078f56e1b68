"""An error crosses a real server and a real channel whole, and nothing that was not meant to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from manyhands import channel, errors
from manyhands.errors import InvalidInput, ManyhandsError, Overloaded
from manyhands.server import GrpcServer
from manyhands.weights.v1 import weights_pb2, weights_pb2_grpc

KINDS = ManyhandsError.__subclasses__()


class Raising(weights_pb2_grpc.WeightsServiceServicer):
    """Raises what it is told to, in a unary and in a streaming call, after one message."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def FindMissing(self, request: object, context: object) -> weights_pb2.FindMissingResponse:  # noqa: N802
        raise self.error

    async def Watch(self, request: object, context: object) -> AsyncIterator[weights_pb2.WatchResponse]:  # noqa: N802
        yield weights_pb2.WatchResponse()
        raise self.error


async def _serve(error: Exception) -> GrpcServer:
    server = GrpcServer("127.0.0.1:0")
    server.add(weights_pb2_grpc.add_WeightsServiceServicer_to_server, Raising(error), "manyhands.weights.v1.WeightsService")
    await server.start()
    return server


async def _raised_by(error: Exception) -> list[ManyhandsError]:
    """What a client gets for error: from a unary and a streaming asyncio call, and from a blocking one."""
    server = await _serve(error)
    got: list[ManyhandsError] = []
    try:
        async with channel.connect_aio(server.address) as link:
            stub = weights_pb2_grpc.WeightsServiceStub(link)
            with pytest.raises(ManyhandsError) as unary, channel.translated_errors():
                await stub.FindMissing(weights_pb2.FindMissingRequest(), timeout=5)
            got.append(unary.value)
            stream = stub.Watch(weights_pb2.WatchRequest(), timeout=5)
            assert await stream.read() == weights_pb2.WatchResponse()
            with pytest.raises(ManyhandsError) as streaming, channel.translated_errors():
                await stream.read()
            got.append(streaming.value)

        def call_blocking() -> None:
            with channel.connect(server.address) as link, channel.translated_errors():
                weights_pb2_grpc.WeightsServiceStub(link).FindMissing(weights_pb2.FindMissingRequest(), timeout=5)

        with pytest.raises(ManyhandsError) as blocking:
            await asyncio.to_thread(call_blocking)
        got.append(blocking.value)
    finally:
        await server.stop(0)
    return got


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
async def test_every_kind_arrives_as_itself(kind: type[ManyhandsError]) -> None:
    sent = kind("rate_hz (0) must be > 0; see the robot's spec", field="rate_hz", retry_after_s=1.25)
    for got in await _raised_by(sent):
        assert type(got) is kind
        assert (got.message, got.field, got.retry_after_s) == (sent.message, "rate_hz", 1.25)


async def test_a_traceback_stays_on_the_server(caplog: pytest.LogCaptureFixture) -> None:
    for got in await _raised_by(RuntimeError("secret path /srv/keys")):
        assert type(got) is errors.InternalError
        assert "secret" not in str(got)
        assert "RuntimeError" not in str(got)
        incident = got.message.rpartition(" ")[2]
        # The log has what the client has not, under the number that the client was told.
        record = next(record for record in caplog.records if incident in record.getMessage())
        assert record.exc_info is not None
        assert "secret path" in str(record.exc_info[1])


async def test_a_message_too_long_for_headers_is_shortened_not_lost() -> None:
    sent = InvalidInput("zu groß: " + "ü" * 20_000, field="observation." + "x" * 5_000)
    for got in await _raised_by(sent):
        assert type(got) is InvalidInput
        assert got.message.startswith("zu groß: ü")
        assert got.message.endswith("...")


async def test_a_name_that_utf8_cannot_hold_still_arrives() -> None:
    for got in await _raised_by(errors.NotFound("no file caf\udce9.parquet")):
        assert type(got) is errors.NotFound
        assert "parquet" in got.message


def test_every_status_has_one_error() -> None:
    codes = [kind.code for kind in KINDS]
    assert len(set(codes)) == len(codes)
    unused = set(grpc.StatusCode) - set(codes)
    assert unused == {grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN}


def test_text_names_the_field_once() -> None:
    assert str(InvalidInput("must be > 0", field="rate_hz")) == "rate_hz: must be > 0"
    assert str(InvalidInput("rate_hz (0) must be > 0", field="rate_hz")) == "rate_hz (0) must be > 0"


def test_an_unknown_status_is_still_an_error_of_the_tree() -> None:
    status = errors.to_status(Overloaded("busy", retry_after_s=2))
    status.code = 77
    assert type(errors.from_status(status)) is ManyhandsError


def test_the_field_is_named_unless_the_message_does() -> None:
    assert str(errors.InvalidInput("robot is required", field="robot")) == "robot is required"
    assert str(errors.InvalidInput("is for lerobot's folders", field="robot")) == "robot: is for lerobot's folders"
