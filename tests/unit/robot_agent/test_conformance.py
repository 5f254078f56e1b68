"""What every robot in the registry must do. A new robot gets these tests with its line in the registry."""

from __future__ import annotations

import time

import numpy as np
import pytest

from manyhands.errors import InvalidInput, NotFound
from manyhands.robot.types import EpisodeOutcome
from robot_agent.robot import CommandKind, Rest, Robot, action_features, action_vector
from robot_agent.robots import registry
from robot_agent.robots.registry import ROBOTS


@pytest.fixture(scope="module", params=sorted(ROBOTS))
def robot(request):
    made = registry.create(request.param, {})
    made.connect()
    yield made
    made.disconnect()


@pytest.fixture
def at_start(robot: Robot) -> Robot:
    robot.reset(3, "")
    return robot


def state_of(robot: Robot) -> np.ndarray:
    readings = robot.observe(include_images=False)
    return np.concatenate([readings[feature.name].value for feature in robot.spec.states])


def test_it_is_registered_under_its_own_name(robot):
    assert registry.robot_class(robot.type_name) is type(robot)


def test_readings_are_those_of_the_spec_in_order_and_stamped_now(at_start):
    before_ns = time.monotonic_ns()
    everything = at_start.observe(include_images=True)
    assert list(everything) == [feature.name for feature in at_start.spec.observation]
    for feature in at_start.spec.observation:
        reading = everything[feature.name]
        assert reading.valid, reading.reason
        feature.check(reading.value)
        assert before_ns <= reading.captured_ns <= time.monotonic_ns()
    assert list(at_start.observe(include_images=False)) == [feature.name for feature in at_start.spec.states]


def test_pictures_show_something_and_belong_to_the_cameras(at_start):
    assert [camera.name for camera in at_start.cameras] == [feature.name for feature in at_start.spec.images]
    readings = at_start.observe(include_images=True)
    for feature in at_start.spec.images:
        assert readings[feature.name].value.std() > 5, "one colour: is the camera covered?"


def test_every_element_of_the_action_has_a_limit_a_name_and_a_unit(robot):
    names = [name for feature in robot.spec.action for name in feature.element_names]
    assert [limit.name for limit in robot.rules.elements] == names
    for feature in robot.spec.states + robot.spec.action:
        assert len(feature.element_names) == len(feature.element_units) == feature.shape[0]
        assert len(set(feature.element_names)) == len(feature.element_names)
    assert set(robot.rules.required_states) <= {feature.name for feature in robot.spec.states}
    assert robot.rules.required_states, "a robot that moves without looking"


def test_holding_keeps_it_where_it_is(at_start):
    for _ in range(3):
        at_start.apply(at_start.hold_action(at_start.observe(include_images=False)))
    before = state_of(at_start)
    for _ in range(20):
        at_start.apply(at_start.hold_action(at_start.observe(include_images=False)))
    np.testing.assert_allclose(state_of(at_start), before, atol=0.02)


def test_the_hold_action_is_inside_the_limits(at_start):
    hold = at_start.hold_action(at_start.observe(include_images=False))
    assert hold.shape == (len(at_start.rules.elements),)
    for value, limit in zip(hold, at_start.rules.elements, strict=True):
        assert limit.low <= value <= limit.high, limit.name
        if limit.kind is CommandKind.VELOCITY:
            assert abs(value) <= limit.max_velocity


def test_constrain_leaves_the_hold_action_alone(at_start):
    readings = at_start.observe(include_images=False)
    hold = at_start.hold_action(readings)
    np.testing.assert_array_equal(at_start.constrain(hold, readings), hold)


def test_what_is_applied_moves_it(at_start):
    before = state_of(at_start)
    readings = at_start.observe(include_images=False)
    steps = np.array([limit.max_step / 2 for limit in at_start.rules.elements])
    for _ in range(3):
        at_start.apply(at_start.hold_action(readings) + steps)
    assert np.abs(state_of(at_start) - before).max() > 1e-3


def test_a_seed_decides_the_scene(robot):
    if not robot.simulated:
        pytest.skip("a real scene is not drawn from a seed")
    scenes = []
    for seed in (5, 6, 5):
        robot.reset(seed, "")
        states = [state_of(robot)]
        for _ in range(5):
            robot.apply(robot.hold_action(robot.observe(include_images=False)))
            states.append(state_of(robot))
        scenes.append(np.stack(states))
    np.testing.assert_array_equal(scenes[0], scenes[2])
    assert np.abs(scenes[0] - scenes[1]).max() > 1e-3
    assert robot.outcome() is EpisodeOutcome.RUNNING


def test_a_task_that_the_scene_does_not_offer_is_refused(at_start):
    at_start.reset(1, at_start.task)
    if at_start.simulated:
        with pytest.raises(InvalidInput):
            at_start.reset(1, "fold the laundry")


def test_teleoperators_propose_actions_of_the_spec_inside_the_limits(at_start):
    readings = at_start.observe(include_images=False)
    for teleoperator in at_start.teleoperators.values():
        proposal = teleoperator.action(readings)
        for feature in at_start.spec.action:
            feature.check(np.asarray(proposal[feature.name]))
        for value, limit in zip(action_vector(proposal, at_start.spec), at_start.rules.elements, strict=True):
            assert limit.low <= value <= limit.high, limit.name
        assert teleoperator.events() == []


def test_it_offers_what_its_rules_ask_for(robot):
    readings = robot.observe(include_images=False)
    torques = robot.torques(readings)
    if any(np.isfinite(limit.max_torque) for limit in robot.rules.elements):
        assert torques is not None, "a torque limit without a torque sensor"
    if robot.rules.park_after_s is not None or robot.rules.on_exit is Rest.PARK:
        assert robot.park_action(readings) is not None
    lets_go = robot.rules.drop_after_s is not None or Rest.DROP in (robot.rules.on_emergency_stop, robot.rules.on_exit)
    assert not lets_go or type(robot).drop is not Robot.drop


def test_actions_go_to_vectors_and_back(robot):
    vector = np.linspace(-0.5, 0.5, len(robot.rules.elements))
    features = action_features(vector, robot.spec)
    for feature in robot.spec.action:
        feature.check(features[feature.name])
    np.testing.assert_allclose(action_vector(features, robot.spec), vector, atol=1e-7)


@pytest.mark.parametrize("name", sorted(ROBOTS))
def test_disconnecting_twice_is_safe_also_before_connecting(name):
    made = registry.create(name, {})
    made.disconnect()
    made.disconnect()


@pytest.mark.parametrize("name", sorted(ROBOTS))
@pytest.mark.parametrize(("option", "value"), [("no_such_option", 1), ("rate_hz", 0), ("watchdog_s", "soon")])
def test_options_that_cannot_be_are_refused_by_name(name, option, value):
    with pytest.raises(InvalidInput) as caught:
        registry.create(name, {option: value})
    assert caught.value.field == f"options.{option}"


def test_a_robot_that_is_not_in_the_list_is_not_found():
    with pytest.raises(NotFound, match="metaworld"):
        registry.create("os:system", {})
