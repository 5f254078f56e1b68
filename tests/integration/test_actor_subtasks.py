"""An actor process that acts on what the text head says, through gibberish, silence and a server that is gone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from manyhands import errors
from manyhands.actor.v1 import actor_pb2
from manyhands.clients.actor import ActorClient, roll_out
from manyhands.clients.inference import InferenceClient
from manyhands.clients.robot import RobotClient
from tests.support.actor_peers import (
    MemoryStore,
    ScriptedPolicy,
    Server,
    serve_policy,
    serve_store,
    start_actor,
    start_robot,
)
from tests.support.inference_lab import InProcessService, MutteringPolicy, make_policy
from tests.support.waiting import wait_until

TASK = "move the arm to the goal"


@dataclass
class Site:
    actor: ActorClient
    robot: RobotClient
    store: MemoryStore
    policy_server: Server
    policy: ScriptedPolicy

    @property
    def told(self) -> list[tuple[str, str]]:
        """Of each request: what its chunk acts on, and what it asks about."""
        return [(request.task, request.ask_subtask_for) for request in self.policy.requests]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    robot = start_robot(tmp_path, rate_hz=60)
    client = RobotClient(robot.address)
    (store_server, store), (policy_server, policy) = serve_store(), serve_policy(client.describe().spec)
    policy.has_text_head, policy.speed = True, 0.002
    actor = start_actor(tmp_path, robot.address, "--store", store_server.address, "--inference", policy_server.address)
    yield Site(ActorClient(actor.address), client, store, policy_server, policy)
    actor.kill()
    robot.kill()
    store_server.stop()
    policy_server.stop()
    assert store.problems == []


def run(**changes: object) -> actor_pb2.RunDefinition:
    arguments = {
        "episode_count": 1,
        "max_episode_steps": 90,
        "replan_interval_steps": 8,
        "dataset": "reach",
        "subtask_every_chunks": 2,
        **changes,
    }
    return roll_out("line", **arguments)  # type: ignore[arg-type]


def test_chunks_follow_the_last_good_subtask_and_operators_see_it(site: Site) -> None:
    site.policy.says = ["grasp the cup", "", "lift it", ""]
    site.actor.start_run(run())
    chunks, subtasks = [], []
    for event in site.actor.watch():
        if event.WhichOneof("event") == "chunk":
            chunks.append(event.chunk)
        elif event.WhichOneof("event") == "status":
            subtasks.append(event.status.subtask)
            if event.status.state == actor_pb2.RUN_STATE_FINISHED:
                break
    told = site.told
    assert [bool(question) for _, question in told] == [True, False] * (len(told) // 2) + [True] * (len(told) % 2)
    assert {question for _, question in told} == {"", TASK}, "never about a subtask"
    tasks = [task for task, _ in told]
    assert list(dict.fromkeys(tasks)) == [TASK, "grasp the cup", "lift it"]
    assert tasks[1:4] == ["grasp the cup"] * 3, "gibberish in between changed nothing"
    assert [chunk.task for chunk in chunks] == tasks[: len(chunks)]
    assert [text for text in dict.fromkeys(subtasks) if text] == ["grasp the cup", "lift it"]
    status = site.actor.status()
    assert (status.subtask, status.subtask_count, status.refused_subtask_count) == ("lift it", 2, 2)
    wait_until(lambda: len(site.store.sealed) == 1)
    assert {frame.task for frame in site.store.sealed[0].frames} == {TASK}, "frames name the robot's own task"


def test_a_text_head_that_says_nothing_holds_nothing_up(site: Site) -> None:
    site.policy.thinks = True
    site.actor.start_run(run(dataset=""))
    [result] = site.actor.wait(timeout_s=30).results
    assert result.frame_count == 90
    assert result.held_tick_count < 20
    assert {task for task, _ in site.told} == {TASK}


def test_a_server_that_is_gone_in_the_middle_of_a_question_is_asked_again_for_the_subtask_in_force(site: Site) -> None:
    site.policy.says = ["grasp the cup"]
    site.actor.start_run(run(dataset="", max_episode_steps=400, subtask_every_chunks=4))
    wait_until(lambda: site.actor.status().subtask == "grasp the cup")
    site.policy.thinks = True
    wait_until(lambda: sum(bool(question) for _, question in site.told) == 2)
    wait_until(lambda: not site.told[-1][1], what="a chunk after the question")
    site.policy_server.stop()
    asked = len(site.told)
    site.policy.restarted()
    site.policy.thinks, site.policy.says = False, ["lift it"]
    site.policy_server.start()
    wait_until(lambda: site.actor.status().subtask == "lift it")
    assert site.told[asked] == ("grasp the cup", TASK), "the first request carries the subtask and asks again"
    site.actor.stop_run()


def test_a_model_without_a_text_head_is_refused_before_any_motion(site: Site) -> None:
    site.policy.has_text_head = False
    with pytest.raises(errors.InvalidInput, match="'line' has none") as refused:
        site.actor.start_run(run())
    assert refused.value.field == "run.subtask_every_chunks"
    with pytest.raises(errors.InvalidInput, match=r"\(-1\) must be >= 0") as refused:
        site.actor.start_run(run(subtask_every_chunks=-1))
    assert refused.value.field == "run.subtask_every_chunks"
    assert site.robot.describe().status.lease_epoch == 0
    site.actor.start_run(run(subtask_every_chunks=0, max_episode_steps=10, dataset=""))
    assert site.actor.wait(timeout_s=30).state == actor_pb2.RUN_STATE_FINISHED
    assert {question for _, question in site.told} == {""}


def test_the_actor_and_the_real_service_agree(tmp_path: Path) -> None:
    """Every chunk and every subtask from a model that mutters, through the service's own front end."""
    run = roll_out("tiny", episode_count=1, max_episode_steps=10_000, replan_interval_steps=4, subtask_every_chunks=2)
    with contextlib.ExitStack() as site:
        robot = start_robot(tmp_path, rate_hz=60)
        site.callback(robot.kill)
        with RobotClient(robot.address) as client:
            policy = make_policy(policy_class=MutteringPolicy, spec=client.describe().spec)
        assert isinstance(policy, MutteringPolicy)
        policy.answers = ["grasp the cup", *["the the the the"] * 100]
        service = site.enter_context(InProcessService(policy))
        inference = site.enter_context(InferenceClient(service.address))
        process = start_actor(tmp_path, robot.address, "--inference", service.address)
        site.callback(process.kill)
        actor = site.enter_context(ActorClient(process.address))
        actor.start_run(run)
        seen = wait_until(lambda: (s := inference.status().sessions[0]).refused_subtask_count >= 3 and s)
        wait_until(lambda: actor.status().refused_subtask_count >= seen.refused_subtask_count)
        status = actor.status()
        actor.stop_run()
    assert (status.subtask, status.subtask_count) == ("grasp the cup", 1)
    assert (seen.last_subtask, seen.subtask_count) == ("grasp the cup", 1)
    assert seen.chunk_count >= 6
    assert [request.previous_text for _, request in policy.asked[:3]] == ["", "grasp the cup", "grasp the cup"]
    assert {given.task for given, _ in policy.asked} == {TASK}
