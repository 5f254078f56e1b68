"""The engine process of either path is killed under chunks and text: what everybody hears meanwhile, and after."""

from __future__ import annotations

import threading
import time

import grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from manyhands.clients.inference import InferenceClient
from manyhands.errors import ManyhandsError, Unreachable
from manyhands.inference.v1 import inference_pb2
from services.inference.service import SERVICE_NAME
from tests.support.fault_lab import NOT_SERVING, SERVING, HealthWatch, Lab, Robot, kill_engine, new_engine, talk, text
from tests.support.waiting import wait_until

RESTARTED_S = 60.0


def listed_services(address: str) -> set[str]:
    """What reflection answers."""
    with grpc.insecure_channel(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = stub.ServerReflectionInfo(iter([request]), timeout=5.0)
        return {service.name for service in answer.list_services_response.service}


class Questioner:
    """Asks one question after the other and keeps what became of each."""

    def __init__(self, lab: Lab, client: InferenceClient, name: str) -> None:
        self.endings: list[tuple[int, inference_pb2.GenerateResponse | ManyhandsError]] = []
        self.failures: list[BaseException] = []
        self.num_pieces = 0
        self._lab, self._client = lab, client
        self._session = lab.open_talk(client, name)
        self._stream = client.act_stream(self._session.session_id)  # Keeps the session, as a robot's does.
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                seed = len(self.endings) % 3
                try:
                    for answer in talk(self._client, self._session, seed):
                        self.num_pieces += 1
                        if answer.finished:
                            self.endings.append((seed, answer))
                except ManyhandsError as error:
                    self.endings.append((seed, error))
                    self._stop.wait(error.retry_after_s or 0.1)
        except BaseException as error:
            self.failures.append(error)

    @property
    def num_whole(self) -> int:
        return sum(not isinstance(ending, ManyhandsError) for _, ending in self.endings)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(20.0)
        self._stream.close()
        assert not self._thread.is_alive()
        assert self.failures == []


def test_robots_and_questions_of_a_killed_engine_go_on_and_health_says_what_is(lab: Lab) -> None:
    before = listed_services(lab.address)
    assert {SERVICE_NAME, "grpc.health.v1.Health"} <= before
    with InferenceClient(lab.address) as client:
        health = HealthWatch(lab.address)
        robots = [Robot(lab, client, f"killed{index}") for index in range(2)]
        questioner = Questioner(lab, client, "asks")
        try:
            wait_until(lambda: all(robot.chunks_since(0) > 5 for robot in robots) and questioner.num_whole > 0)
            seen, pieces = [len(robot.replies) for robot in robots], questioner.num_pieces
            wait_until(lambda: questioner.num_pieces > pieces)  # In the middle of an answer.
            killed = kill_engine(lab.service)
            wait_until(lambda: NOT_SERVING in health.statuses)
            assert listed_services(lab.address) == before, "reflection went with the engine"
            assert len(client.status().sessions) >= 3
            new_engine(lab.service, killed)
            whole = questioner.num_whole
            wait_until(
                lambda: (
                    questioner.num_whole > whole + 1
                    and all(robot.chunks_since(index) > 5 for robot, index in zip(robots, seen, strict=True))
                ),
                RESTARTED_S,
            )
        finally:
            for each in (*robots, questioner):
                each.stop()
            health.close()
    for robot in robots:
        robot.check(every=10)
        assert 1 <= len(robot.refusals) <= RESTARTED_S
        assert {refusal.reason for refusal in robot.refusals} == {"unavailable"}
        assert all(0.0 < refusal.retry_after_s <= 1.0 for refusal in robot.refusals)
    refused = [ending for _, ending in questioner.endings if isinstance(ending, ManyhandsError)]
    assert refused
    assert all(isinstance(error, Unreachable) and error.retry_after_s for error in refused)
    for seed, ending in questioner.endings:
        if not isinstance(ending, ManyhandsError):
            assert ending.finished
            assert ending.full_text == text(seed)
    assert health.statuses == [SERVING, NOT_SERVING, SERVING]


def test_a_killed_engine_is_told_to_its_robot_at_once(lab: Lab) -> None:
    """Not when a deadline passes: the robot is refused within moments and knows how long to hold."""
    with InferenceClient(lab.address) as client, client.act_stream(lab.open_session(client, "told").session_id) as stream:
        lab.ask(stream, 1)
        assert stream.receive(20.0) is not None
        killed = kill_engine(lab.service)
        killed_s = time.monotonic()

        def refused() -> bool:
            lab.ask(stream, 2, deadline_s=30.0)
            reply = stream.receive(20.0)
            assert reply is not None
            return getattr(reply.result, "reason", "") == "unavailable"

        wait_until(refused, timeout_s=2.0)
        assert time.monotonic() - killed_s < 2.0
        new_engine(lab.service, killed)
        lab.wait_until_serving()
