"""What every typed client can do, whichever service it talks to: wait for its server, and say whom it waited for."""

from __future__ import annotations

import asyncio
import re

import pytest

from manyhands.channel import Client
from manyhands.clients.actor import ActorClient
from manyhands.clients.dataset import DatasetClient
from manyhands.clients.inference import InferenceClient
from manyhands.clients.learner import LearnerClient
from manyhands.clients.robot import RobotClient
from manyhands.clients.weights import WeightsClient
from manyhands.errors import TooLate
from manyhands.server import GrpcServer

CLIENTS: dict[str, type[Client]] = {
    "robot agent": RobotClient,
    "actor": ActorClient,
    "dataset store": DatasetClient,
    "inference service": InferenceClient,
    "learner": LearnerClient,
    "weights service": WeightsClient,
}


@pytest.mark.parametrize("server", CLIENTS)
def test_nobody_there_is_said_by_name_and_address(server: str) -> None:
    words = re.escape(f"no {server} answered on 127.0.0.1:1 within 0.05 s; is it running?")
    with CLIENTS[server]("127.0.0.1:1") as client, pytest.raises(TooLate, match=words):
        client.wait_until_ready(timeout_s=0.05)


async def test_a_server_that_starts_late_is_waited_for_also_at_the_second_try() -> None:
    server = GrpcServer("127.0.0.1:0")  # Has its port, and does not serve yet.
    with WeightsClient(server.address) as client:
        with pytest.raises(TooLate):
            await asyncio.to_thread(client.wait_until_ready, 0.2)
        waiting = asyncio.create_task(asyncio.to_thread(client.wait_until_ready, 20.0))
        await server.start()
        try:
            await waiting
        finally:
            await server.stop(0)
