"""What Prometheus reads after real calls."""

from __future__ import annotations

import asyncio
import socket
import urllib.request
from collections.abc import AsyncIterator

import prometheus_client
import pytest

from manyhands import channel, metrics
from manyhands.errors import ManyhandsError, NotFound, Refused
from manyhands.server import GrpcServer
from manyhands.weights.v1 import weights_pb2, weights_pb2_grpc

SERVICE = "/manyhands.weights.v1.WeightsService"


class Weights(weights_pb2_grpc.WeightsServiceServicer):
    def __init__(self, watch_ended: asyncio.Event) -> None:
        self.watch_ended = watch_ended

    async def FindMissing(self, request: object, context: object) -> weights_pb2.FindMissingResponse:  # noqa: N802
        return weights_pb2.FindMissingResponse()

    async def GetManifest(self, request: object, context: object) -> weights_pb2.GetManifestResponse:  # noqa: N802
        raise NotFound("no version 7; the newest is 3")

    async def Watch(self, request: object, context: object) -> AsyncIterator[weights_pb2.WatchResponse]:  # noqa: N802
        try:
            while True:
                yield weights_pb2.WatchResponse()
                await asyncio.sleep(0.01)
        finally:
            # Once the metrics around this call have seen its end too.
            asyncio.get_running_loop().call_soon(self.watch_ended.set)


def _value(name: str, **labels: str) -> float:
    return prometheus_client.REGISTRY.get_sample_value(name, labels) or 0.0


def _handled(method: str, code: str) -> float:
    return _value("manyhands_rpc_handled_total", method=f"{SERVICE}/{method}", code=code)


async def test_calls_are_counted_by_method_and_outcome() -> None:
    before = {key: _handled(*key) for key in (("FindMissing", "OK"), ("GetManifest", "NOT_FOUND"), ("Watch", "CANCELLED"))}
    seconds_before = _value("manyhands_rpc_seconds_count", method=f"{SERVICE}/FindMissing")
    server, watch_ended = GrpcServer("127.0.0.1:0"), asyncio.Event()
    server.add(
        weights_pb2_grpc.add_WeightsServiceServicer_to_server, Weights(watch_ended), "manyhands.weights.v1.WeightsService"
    )
    await server.start()
    try:
        async with channel.connect_aio(server.address) as link:
            stub = weights_pb2_grpc.WeightsServiceStub(link)
            for _ in range(3):
                await stub.FindMissing(weights_pb2.FindMissingRequest(), timeout=5)
            with pytest.raises(ManyhandsError), channel.translated_errors():
                await stub.GetManifest(weights_pb2.GetManifestRequest(), timeout=5)
            stream = stub.Watch(weights_pb2.WatchRequest())
            await stream.read()
            assert _value("manyhands_rpc_running", method=f"{SERVICE}/Watch") == 1
            stream.cancel()
            await asyncio.wait_for(watch_ended.wait(), timeout=5)
    finally:
        await server.stop(0)
    assert _value("manyhands_rpc_running", method=f"{SERVICE}/Watch") == 0
    after = {key: _handled(*key) - value for key, value in before.items()}
    assert after == {("FindMissing", "OK"): 3, ("GetManifest", "NOT_FOUND"): 1, ("Watch", "CANCELLED"): 1}
    assert _value("manyhands_rpc_seconds_count", method=f"{SERVICE}/FindMissing") - seconds_before == 3


def test_stage_time_is_counted_also_when_the_stage_fails() -> None:
    labels = {"component": "test", "stage": "decode"}
    with metrics.timed_stage("test", "decode"):
        pass
    with pytest.raises(ValueError, match="broken"), metrics.timed_stage("test", "decode"):
        raise ValueError("broken")
    metrics.observe_stage("test", "decode", 100.0)
    assert _value("manyhands_stage_seconds_count", **labels) == 3
    assert _value("manyhands_stage_seconds_sum", **labels) >= 100


def test_page_is_served_and_a_taken_port_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        taken.listen()
        with pytest.raises(Refused, match=rf"127.0.0.1:{port}.*--metrics-port"):
            metrics.serve_metrics(port)
    metrics.serve_metrics(port)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
        assert b"manyhands_rpc_handled" in page.read()


def test_no_port_no_page() -> None:
    metrics.serve_metrics(0)
