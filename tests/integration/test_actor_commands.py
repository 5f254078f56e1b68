"""'manyhands record' and 'manyhands rollout' against a running actor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from actor.commands import summary
from manyhands.actor.v1 import actor_pb2
from manyhands.clients.robot import RobotClient
from manyhands.dataset.v1 import dataset_pb2
from tests.support.actor_peers import (
    REPOSITORY,
    MemoryStore,
    Process,
    ScriptedPolicy,
    serve_policy,
    serve_store,
    start_actor,
    start_robot,
)
from tests.support.waiting import wait_until


@dataclass
class Site:
    actor: Process
    store: MemoryStore
    policy: ScriptedPolicy


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    robot = start_robot(tmp_path, rate_hz=60)
    with RobotClient(robot.address) as client:
        spec = client.describe().spec
    (store_server, store), (policy_server, policy) = serve_store(), serve_policy(spec)
    actor = start_actor(tmp_path, robot.address, "--store", store_server.address, "--inference", policy_server.address)
    yield Site(actor, store, policy)
    actor.kill()
    robot.kill()
    store_server.stop()
    policy_server.stop()


def command(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "manyhands", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"},
    )


def test_record_says_what_it_kept(site: Site) -> None:
    words = ["--dataset", "reach", "--teleoperator", "expert", "--episodes", "2", "--max-steps", "60"]
    process = command("record", "--actor", site.actor.address, *words)
    output = process.communicate(timeout=40)[0]
    assert process.returncode == 0, output
    assert "2 of 2 succeeded (95 % interval 34% to 100%): move the arm to the goal" in output
    wait_until(lambda: len(site.store.sealed) == 2)


def test_rollout_can_ask_for_subtasks(site: Site) -> None:
    site.policy.has_text_head, site.policy.says, site.policy.speed = True, ["grasp the cup"], 1e-4
    words = ["--model", "line", "--episodes", "1", "--max-steps", "30", "--subtask-every-chunks", "3"]
    process = command("rollout", "--actor", site.actor.address, *words)
    output = process.communicate(timeout=40)[0]
    assert process.returncode == 0, output
    assert site.policy.requests[1].task == "grasp the cup"
    assert [bool(request.ask_subtask_for) for request in site.policy.requests[:4]] == [True, False, False, True]


def test_rollout_counts_failures_honestly(site: Site) -> None:
    site.policy.speed = 1e-4
    process = command("rollout", "--actor", site.actor.address, "--model", "line", "--episodes", "3", "--max-steps", "20")
    output = process.communicate(timeout=40)[0]
    assert process.returncode == 0, output
    assert "0 of 3 succeeded (95 % interval 0% to 56%)" in output


def test_a_run_that_is_refused_names_the_field_and_ends_with_2(site: Site) -> None:
    process = command("record", "--actor", site.actor.address, "--dataset", "reach", "--teleoperator", "nobody")
    output = process.communicate(timeout=40)[0]
    assert process.returncode == 2
    assert "'nobody' is not attached to left; it has: expert" in output


def test_ctrl_c_stops_the_run_and_keeps_what_was_recorded(site: Site) -> None:
    site.policy.speed = 1e-4
    process = command("rollout", "--actor", site.actor.address, "--model", "line", "--episodes", "0", "--dataset", "reach")
    wait_until(lambda: any(len(episode.frames) > 10 for episode in site.store.episodes.values()))
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=20)[0]
    assert process.returncode == 0, output
    wait_until(lambda: len(site.store.sealed) == 1)


def test_interrupted_episodes_are_no_trials() -> None:
    interrupted = actor_pb2.EpisodeResult(task="t", reason=dataset_pb2.EPISODE_END_INTERRUPTED)
    assert summary([interrupted]) == "no episode came to its end"
    success = actor_pb2.EpisodeResult(task="t", reason=dataset_pb2.EPISODE_END_SUCCESS, success=True)
    assert summary([success, interrupted]).startswith("1 of 1 succeeded")
