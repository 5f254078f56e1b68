"""How a service process lives: says READY when it serves, shows itself to tools, drains and ends when told."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from manyhands import channel
from manyhands.errors import Overloaded, Refused
from manyhands.server import GrpcServer
from manyhands.weights.v1 import weights_pb2, weights_pb2_grpc
from tests.support.waiting import wait_until

SERVICE = "manyhands.weights.v1.WeightsService"
PROGRAM = """
import asyncio
import gc
from manyhands.server import GrpcServer
from manyhands.weights.v1 import weights_pb2, weights_pb2_grpc

class Weights(weights_pb2_grpc.WeightsServiceServicer):
    async def Watch(self, request, context):  # Never ends by itself, as a watcher does.
        yield weights_pb2.WatchResponse()
        await asyncio.Event().wait()

    async def FindMissing(self, request, context):
        await asyncio.sleep(0.5)
        return weights_pb2.FindMissingResponse(sha256=[b"done"])

async def drain():
    print("DRAINED, permanent:", gc.get_freeze_count(), flush=True)

async def main():
    server = GrpcServer("127.0.0.1:0", max_calls=8)
    server.add(weights_pb2_grpc.add_WeightsServiceServicer_to_server, Weights(), "manyhands.weights.v1.WeightsService")
    await server.run_until_signalled(drain=drain)

asyncio.run(main())
"""


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) as running:
        try:
            yield running
        finally:
            running.kill()


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    word, address = process.stdout.readline().split()
    assert word == "READY"
    return address


def test_calls_beyond_the_limit_are_refused_until_others_end(process: subprocess.Popen[str]) -> None:
    with channel.connect(_address(process)) as link:
        stub = weights_pb2_grpc.WeightsServiceStub(link)
        watches = [stub.Watch(weights_pb2.WatchRequest()) for _ in range(8)]
        for watch in watches:
            next(watch)
        with pytest.raises(Overloaded), channel.translated_errors():
            stub.FindMissing(weights_pb2.FindMissingRequest(), timeout=10)
        watches[0].cancel()

        def is_answered() -> bool:
            try:
                with channel.translated_errors():
                    return list(stub.FindMissing(weights_pb2.FindMissingRequest(), timeout=10).sha256) == [b"done"]
            except Overloaded:
                return False

        wait_until(is_answered)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_drains_and_ends_in_time_although_a_watcher_stays(
    number: signal.Signals, process: subprocess.Popen[str]
) -> None:
    with channel.connect(_address(process)) as link:
        stub = weights_pb2_grpc.WeightsServiceStub(link)
        watch = stub.Watch(weights_pb2.WatchRequest())
        assert next(watch) == weights_pb2.WatchResponse()
        running = stub.FindMissing.future(weights_pb2.FindMissingRequest(), timeout=10)
        health = health_pb2_grpc.HealthStub(link).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert next(health).status == health_pb2.HealthCheckResponse.SERVING
        start = time.monotonic()
        process.send_signal(number)
        assert next(health).status == health_pb2.HealthCheckResponse.NOT_SERVING
        # What was asked before the signal is answered.
        assert list(running.result().sha256) == [b"done"]
        assert process.wait(timeout=10) == 0
        assert time.monotonic() - start < 5
        with pytest.raises(grpc.RpcError):
            next(watch)
    assert process.stdout is not None
    assert "DRAINED" in process.stdout.read()


def test_no_collection_looks_at_what_a_server_starts_with(process: subprocess.Popen[str]) -> None:
    _address(process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=10)
    # Modules and messages: a collection that visits them holds up every stream.
    assert int(said.split("permanent:")[1]) > 10_000


def test_tools_see_the_services(process: subprocess.Popen[str]) -> None:
    with channel.connect(_address(process)) as link:
        services = set(ProtoReflectionDescriptorDatabase(link).get_services())
    assert {SERVICE, "grpc.health.v1.Health"} <= services


async def test_two_servers_never_share_a_port() -> None:
    first = GrpcServer("127.0.0.1:0")
    await first.start()
    try:
        with pytest.raises(Refused, match="manyhands doctor"):
            GrpcServer(first.address)
    finally:
        await first.stop(0)
