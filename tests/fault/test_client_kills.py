"""A robot's actor is killed in the middle of everything. Its neighbours notice nothing, its name is free soon, and nobody
works for the dead. And two that want the same name at once."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import psutil
import pytest
from grpc import RpcError

from manyhands.clients.act_stream import Chunk
from manyhands.clients.inference import InferenceClient
from manyhands.errors import AlreadyExists
from tests.support.fault_lab import TEXT_MODEL, Lab, Robot, engine_of
from tests.support.inference_lab import next_reply
from tests.support.waiting import wait_until

IDLE_TIMEOUT_S = 4.0


@contextmanager
def going(lab: Lab, model: str, robot: str) -> Iterator[subprocess.Popen[str]]:
    """A robot's process that has got a chunk, and text of a model with a text head."""
    command = [sys.executable, "-m", "tests.support.robot_program", lab.address, model, robot]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_going(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "GOING\n"


def connected(client: InferenceClient, robot: str) -> bool | None:
    """Whether its stream is open; None when it has no session."""
    return next((session.connected for session in client.status().sessions if session.robot_id == robot), None)


def test_a_killed_client_costs_its_neighbours_nothing_and_leaves_its_name(lab: Lab) -> None:
    with InferenceClient(lab.address) as client, going(lab, lab.model, "killed") as killed:
        neighbours = [Robot(lab, client, f"neighbour{index}") for index in range(2)]
        wait_going(killed)
        assert connected(client, "killed")
        seen = [len(robot.replies) for robot in neighbours]
        killed.kill()
        killed_s = time.monotonic()
        wait_until(lambda: not connected(client, "killed"), 2.0)
        refusals: list[AlreadyExists] = []

        def taken() -> bool:
            try:
                lab.open_session(client, "killed")
            except AlreadyExists as error:
                refusals.append(error)
                return False
            return True

        wait_until(taken, IDLE_TIMEOUT_S + 3.0)
        assert time.monotonic() - killed_s > IDLE_TIMEOUT_S - 1.0, "its name was given away while it might have come back"
        assert all(error.retry_after_s and error.field == "robot_id" for error in refusals)
        for robot, before in zip(neighbours, seen, strict=True):
            assert robot.chunks_since(before) > 10
            robot.stop()
            assert robot.refusals == []
            robot.check(every=20)


def test_nobody_works_for_a_killed_client(lab: Lab) -> None:
    """Its texts would take seconds of the engine: they are given up, with the chunk it waited for."""
    with InferenceClient(lab.address) as client, going(lab, TEXT_MODEL, "chatty") as killed:
        wait_going(killed)
        found = engine_of(lab.service)
        assert found is not None
        engine = psutil.Process(found.pid)
        killed.kill()
        killed.wait()
        wait_until(lambda: not connected(client, "chatty"), 2.0)
        before = used_s(engine)
        wait_until(lambda: is_idle(engine))
        assert used_s(engine) - before < 0.5


def test_a_robot_that_leaves_its_stream_in_the_middle_is_answered_on_the_next_one(lab: Lab) -> None:
    """What the old stream gives up and what the new one asks go to the engine by different ways."""
    with InferenceClient(lab.address) as client:
        session = lab.open_session(client, "hasty")
        for seed in range(100):
            with client.act_stream(session.session_id) as left:
                lab.ask(left, seed)
                left.receive(0.0005 * (seed % 20))  # Closed at any moment of its chunk's way.
            with client.act_stream(session.session_id) as stream:
                lab.ask(stream, seed)
                result = next_reply(stream, 5.0).result
                assert isinstance(result, Chunk)
        lab.check_chunk(result.actions, seed)


def used_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def is_idle(process: psutil.Process) -> bool:
    before, until_s = used_s(process), time.monotonic() + 0.3
    wait_until(lambda: time.monotonic() > until_s)
    return used_s(process) - before <= 0.04


def test_of_robots_that_open_the_same_name_at_once_one_is_served_and_the_others_hear_why(lab: Lab) -> None:
    num_clients = 8
    sessions: dict[int, str] = {}
    refusals: list[AlreadyExists] = []
    unexpected: list[BaseException] = []
    together = threading.Barrier(num_clients)
    with ExitStack() as stack:
        clients = [stack.enter_context(InferenceClient(lab.address)) for _ in range(num_clients)]

        def open_one(index: int) -> None:
            together.wait(20.0)
            try:
                sessions[index] = lab.open_session(clients[index], "twin").session_id
            except AlreadyExists as error:
                refusals.append(error)
            except (Exception, RpcError) as error:
                unexpected.append(error)

        threads = [threading.Thread(target=open_one, args=(index,)) for index in range(num_clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20.0)
        assert unexpected == []
        assert (len(sessions), len(refusals)) == (1, num_clients - 1)
        for refusal in refusals:
            assert refusal.field == "robot_id"
            assert "'twin'" in str(refusal)
            assert refusal.retry_after_s is not None
            assert 0.0 < refusal.retry_after_s <= IDLE_TIMEOUT_S + 0.1
        ((winner, session_id),) = sessions.items()
        with clients[winner].act_stream(session_id) as stream:
            for seed in range(1, 6):
                lab.ask(stream, seed)
                result = next_reply(stream).result
                assert isinstance(result, Chunk)
                lab.check_chunk(result.actions, seed)
            # A stream is what makes it a robot that moves: the second hears that it must stop the first.
            with pytest.raises(AlreadyExists, match="stream is open"):
                lab.open_session(clients[(winner + 1) % num_clients], "twin")
            lab.ask(stream, 7)
            assert isinstance(next_reply(stream).result, Chunk)
