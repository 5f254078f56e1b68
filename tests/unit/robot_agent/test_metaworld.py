"""The Meta-World robot: its tasks, its experts, its limits."""

from __future__ import annotations

import numpy as np
import pytest

from manyhands.errors import InvalidInput
from manyhands.robot.types import EpisodeOutcome
from robot_agent.robot import action_vector
from robot_agent.robots import registry
from robot_agent.robots.metaworld import FRONT, INSTRUCTIONS, STATE

DEMO_TASKS = ("reach", "drawer-open", "button-press-topdown", "door-open")


def test_every_task_of_the_package_has_an_instruction_of_its_own():
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS  # After the robot's module chose how MuJoCo renders.

    assert {f"{task}-v3" for task in INSTRUCTIONS} == set(ALL_V3_ENVIRONMENTS)
    assert len(set(INSTRUCTIONS.values())) == len(INSTRUCTIONS)


def test_all_tasks_share_one_spec():
    digests = {registry.create("metaworld", {"task": task}).spec.digest for task in INSTRUCTIONS}
    assert len(digests) == 1
    assert registry.create("metaworld", {"image_size": 64}).spec.digest not in digests


def test_a_task_that_is_not_in_the_package_is_refused():
    with pytest.raises(InvalidInput, match="drawer-open"):
        registry.create("metaworld", {"task": "fold-laundry"})


@pytest.mark.parametrize("task", DEMO_TASKS)
def test_the_expert_succeeds_within_the_limits(task):
    robot = registry.create("metaworld", {"task": task})
    robot.connect()
    solved = 0
    for seed in range(3):
        robot.reset(seed, INSTRUCTIONS[task])
        for _ in range(150):
            readings = robot.observe(include_images=False)
            robot.apply(action_vector(robot.teleoperators["expert"].action(readings), robot.spec))
            if robot.outcome() is EpisodeOutcome.SUCCESS:
                solved += 1
                break
    robot.disconnect()
    assert solved == 3


def test_the_goal_is_in_the_state_and_differs_by_seed():
    robot = registry.create("metaworld", {"task": "reach"})
    robot.connect()
    names = robot.spec.states[0].element_names
    goals = []
    for seed in range(4):
        robot.reset(seed, "")
        goals.append(robot.observe(include_images=False)[STATE].value[names.index("goal.x") :])
    robot.disconnect()
    assert len({tuple(goal) for goal in goals}) == 4
    assert all((np.abs(goal) > 0).all() for goal in goals)


def test_an_episode_may_be_longer_than_the_packages_limit():
    robot = registry.create("metaworld", {})
    robot.connect()
    for _ in range(520):
        robot.apply(np.zeros(4))
    robot.disconnect()


def test_the_hand_stays_in_its_box():
    robot = registry.create("metaworld", {})
    robot.connect()
    for _ in range(150):
        readings = robot.observe(include_images=False)
        bent = robot.constrain(np.array([1.0, -1.0, 1.0, 0.0]), readings)
        robot.apply(bent)
    np.testing.assert_allclose(bent[:3], 0.0, atol=1e-9)
    outwards = robot.constrain(np.array([-1.0, 1.0, -1.0, 0.5]), readings)
    np.testing.assert_array_equal(outwards, [-1.0, 1.0, -1.0, 0.5])
    robot.disconnect()


def test_the_front_picture_is_the_right_way_up():
    robot = registry.create("metaworld", {"task": "button-press-topdown"})
    robot.connect()
    picture = robot.observe(include_images=True)[FRONT].value.astype(int)
    robot.disconnect()
    red = (picture[..., 0] > 2 * picture[..., 1] + 30) & (picture[..., 0] > 2 * picture[..., 2] + 30)
    rows, columns = np.nonzero(red)
    # The red arm stands on the left, its base lower than the table's far edge; the button's box is right of its base.
    assert len(rows) > 300
    assert columns.mean() < picture.shape[1] / 2
    yellow = (picture[..., 0] > 120) & (picture[..., 1] > 80) & (picture[..., 2] < 40)
    assert np.nonzero(yellow)[1].mean() > columns.mean()


def drive_by_expert(options, *, seed=1, max_ticks=150):
    """The expert's actions up to the end of the episode, which must come before max_ticks."""
    robot = registry.create("metaworld", {"task": "reach", **options})
    robot.connect()
    robot.reset(seed, INSTRUCTIONS["reach"])
    actions = []
    while robot.outcome() is not EpisodeOutcome.SUCCESS:
        actions.append(action_vector(robot.teleoperators["expert"].action(robot.observe(include_images=False)), robot.spec))
        robot.apply(actions[-1])
        assert len(actions) < max_ticks
    robot.disconnect()
    return np.stack(actions)


def test_an_episode_goes_on_after_its_success_for_as_long_as_asked():
    assert len(drive_by_expert({"settle_ticks": 10})) == len(drive_by_expert({})) + 10


def test_a_noisy_expert_is_a_function_of_the_seed_and_still_succeeds():
    clean, noisy = drive_by_expert({}), drive_by_expert({"expert_noise": 0.3})
    length = min(len(clean), len(noisy))
    assert 0.1 < np.abs(clean[:length] - noisy[:length]).mean() < 0.4
    np.testing.assert_array_equal(noisy, drive_by_expert({"expert_noise": 0.3}))
    assert np.abs(noisy).max() <= 1.0
