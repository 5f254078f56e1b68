"""The simulated arm: what tests and benchmarks rely on."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from manyhands.robot.types import EpisodeOutcome
from robot_agent.robot import action_vector
from robot_agent.robots.arm import FALLEN, HOME, ArmOptions, SimulatedArm

WITHOUT_SIMULATORS = """
import sys
for name in ("torch", "mujoco", "metaworld", "gymnasium"):
    sys.modules[name] = None
import robot_agent.main, manyhands.clients.robot
from robot_agent.robots import registry
arm = registry.create("arm", {})
arm.connect()
print(len(arm.observe(include_images=True)))
"""


@pytest.fixture
def arm() -> SimulatedArm:
    made = SimulatedArm(ArmOptions())
    made.connect()
    return made


def test_the_agent_and_the_arm_need_neither_torch_nor_a_simulator():
    result = subprocess.run([sys.executable, "-c", WITHOUT_SIMULATORS], capture_output=True, text=True, timeout=30)
    assert (result.returncode, result.stdout) == (0, "3\n"), result.stderr


@pytest.mark.parametrize("seed", range(20))
def test_the_goal_seeker_arrives_at_every_goal(arm, seed):
    arm.reset(seed, "")
    assert arm.outcome() is EpisodeOutcome.RUNNING
    for _ in range(60):
        arm.apply(action_vector(arm.teleoperators["expert"].action(arm.observe(include_images=False)), arm.spec))
    assert arm.outcome() is EpisodeOutcome.SUCCESS


def test_torque_grows_with_the_way_to_the_target_and_a_held_arm_has_none(arm):
    arm.apply(arm.position + 0.2)
    assert (arm.torques(arm.observe(include_images=False)) > 0.1).all()
    for _ in range(30):
        arm.apply(arm.hold_action(arm.observe(include_images=False)))
    np.testing.assert_allclose(arm.torques(arm.observe(include_images=False)), 0.0, atol=1e-5)


def test_without_torque_it_falls_and_the_next_command_takes_hold(arm):
    arm.drop()
    np.testing.assert_array_equal(arm.position, FALLEN)
    arm.apply(HOME)
    assert np.abs(arm.position - HOME).max() < np.abs(FALLEN - HOME).max()


def test_the_pictures_show_where_arm_and_goal_are(arm):
    def reds(name: str) -> tuple[float, float]:
        pixels = arm.observe(include_images=True)[name].value
        rows, columns = np.nonzero((pixels == (220, 40, 40)).all(axis=2))
        return rows.mean(), columns.mean()

    arm.reset(0, "")
    arm.goal = HOME + 0.5
    for name, joint in (("observation.images.front", 1), ("observation.images.wrist", 0)):
        before = reds(name)
        arm.position = arm.position.copy()
        arm.position[joint] += 0.8
        assert reds(name) != before
