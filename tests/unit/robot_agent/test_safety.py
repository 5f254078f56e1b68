"""The safety core with a simulated clock: who may move the robot, what is executed, what happens when nobody commands."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhands.errors import AlreadyExists, InvalidInput, Refused
from manyhands.robot.types import Authority, RobotMode
from robot_agent.robot import CommandKind, ElementLimit, Reading, Rest, SafetyRules, Vector
from robot_agent.safety import Duty, Judgement, SafetyCore

STATE = "observation.state"
RULES = SafetyRules(
    elements=(
        ElementLimit(name="pan.pos", kind=CommandKind.POSITION, low=-2.0, high=2.0, max_step=0.1),
        ElementLimit(
            name="lift.pos", kind=CommandKind.POSITION, low=-1.0, high=1.0, max_step=0.5, max_velocity=4.0, max_torque=3.0
        ),
        ElementLimit(name="gripper.vel", kind=CommandKind.VELOCITY, low=-1.0, high=1.0, max_step=0.25, max_velocity=0.8),
    ),
    required_states=(STATE,),
    max_state_age_s=0.1,
    max_command_age_s=0.5,
    watchdog_s=0.2,
)
RATE_HZ = 20.0


class SimulatedClock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


@dataclass
class FakeMemory:
    epoch: int = 0
    stop: str | None = None
    writes: list[str] = field(default_factory=list)

    def last_epoch(self) -> int:
        return self.epoch

    def save_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.writes.append(f"epoch {epoch}")

    def stop_reason(self) -> str | None:
        return self.stop

    def latch_stop(self, reason: str) -> None:
        self.stop = reason
        self.writes.append(f"stop {reason}")


@pytest.fixture
def clock() -> SimulatedClock:
    return SimulatedClock()


@pytest.fixture
def memory() -> FakeMemory:
    return FakeMemory()


class Bench:
    """A core, the robot it judges for, and the actor that commands it."""

    def __init__(self, clock, memory, rules: SafetyRules = RULES) -> None:
        self.clock = clock
        self.core = SafetyCore(rules, control_rate_hz=RATE_HZ, memory=memory, clock=clock)
        self.position: Vector = np.zeros(3)
        self.torque: Vector | None = None
        self.sequence = 0
        self.epoch = 0

    def acquire(self, holder="actor/left", authority=Authority.POLICY, ttl_s=1.0, request_id="") -> int:
        self.epoch = self.core.acquire(holder, authority, ttl_s, request_id)
        self.sequence = 0
        return self.epoch

    def reading(self, **changes) -> Reading:
        fresh = Reading(value=self.position, captured_ns=round(self.clock() * 1e9))
        return dataclasses.replace(fresh, **changes)

    def command(self, *wanted: float, age_s=0.0, sequence=None, epoch=None, readings=None) -> Judgement:
        self.sequence = self.sequence + 1 if sequence is None else sequence
        judgement = self.core.judge(
            epoch=self.epoch if epoch is None else epoch,
            sequence=self.sequence,
            wanted=np.array(wanted),
            age_s=age_s,
            readings={STATE: self.reading()} if readings is None else readings,
            measured=lambda: np.array([self.position[0], self.position[1], 0.0]),
            torques=lambda: self.torque,
        )
        self.position = judgement.executed.copy()
        return judgement


@pytest.fixture
def bench(clock, memory) -> Bench:
    return Bench(clock, memory)


# Limits.


def test_a_command_inside_every_limit_is_executed_as_it_is(bench):
    bench.acquire()
    judgement = bench.command(0.05, -0.1, 0.2)
    np.testing.assert_array_equal(judgement.executed, [0.05, -0.1, 0.2])
    assert judgement.clamped == ()
    assert bench.core.status().clamped_count == 0


def test_range_step_and_velocity_limits_name_what_they_changed(bench):
    bench.acquire()
    # 0.1 is pan's step; 4 rad/s at 20 Hz is 0.2 for lift, under its step of 0.5; the gripper's velocity may change by 0.25.
    judgement = bench.command(5.0, -0.5, 0.24)
    np.testing.assert_allclose(judgement.executed, [0.1, -0.2, 0.24])
    assert judgement.clamped == ("pan.pos", "lift.pos")
    assert bench.core.status().clamped_count == 1


def test_positions_stop_at_the_range_and_velocities_at_theirs(bench):
    bench.acquire()
    for _ in range(50):
        judgement = bench.command(9.0, 9.0, 9.0)
    np.testing.assert_allclose(judgement.executed, [2.0, 1.0, 0.8])


def test_a_command_may_not_run_ahead_of_a_robot_that_is_stuck(bench):
    bench.acquire()
    for _ in range(10):
        judgement = bench.command(1.0, 0.0, 0.0)
        bench.position = np.zeros(3)  # Something blocks it.
    assert judgement.executed[0] == pytest.approx(0.1)


def test_a_robot_that_was_pushed_away_is_brought_back_step_by_step(bench):
    bench.acquire()
    bench.command(0.0, 0.0, 0.0)
    bench.position = np.array([1.0, 0.0, 0.0])
    steps = [
        bench.core.judge(
            epoch=bench.epoch,
            sequence=number,
            wanted=np.zeros(3),
            age_s=0.0,
            readings={STATE: bench.reading()},
            measured=lambda: np.array([1.0, 0.0, 0.0]),
            torques=lambda: None,
        ).executed[0]
        for number in range(10, 13)
    ]
    np.testing.assert_allclose(steps, [0.1, 0.2, 0.3])  # Towards where it is, never more than a step from the last.


def test_over_its_torque_limit_an_element_stays_where_it_is(bench):
    bench.acquire()
    bench.torque = np.array([0.0, 3.5, 0.0])
    judgement = bench.command(0.05, 0.1, 0.0)
    np.testing.assert_allclose(judgement.executed, [0.05, 0.0, 0.0])
    assert judgement.clamped == ("lift.pos",)


def test_a_torque_that_cannot_be_read_counts_as_too_much(bench):
    bench.acquire()
    bench.torque = np.array([math.nan, math.nan, math.nan])
    np.testing.assert_allclose(bench.command(0.05, 0.1, 0.0).executed, [0.05, 0.0, 0.0])


def test_the_robots_workspace_has_the_last_word(clock, memory):
    bench = Bench(clock, memory)
    bench.core = SafetyCore(
        RULES,
        control_rate_hz=RATE_HZ,
        memory=memory,
        clock=clock,
        constrain=lambda action, readings: np.minimum(action, 0.02),
    )
    bench.acquire()
    judgement = bench.command(0.05, 0.01, 0.0)
    np.testing.assert_allclose(judgement.executed, [0.02, 0.01, 0.0])
    assert judgement.clamped == ("pan.pos",)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_by_name(bench, bad):
    bench.acquire()
    with pytest.raises(InvalidInput) as caught:
        bench.command(0.0, bad, 0.0)
    assert caught.value.field == "lift.pos"
    assert bench.core.status().refused_count == 1


def test_an_action_of_another_length_is_refused(bench):
    bench.acquire()
    with pytest.raises(InvalidInput):
        bench.command(0.0, 0.0)


wanted_values = st.floats(allow_nan=True, allow_infinity=True) | st.floats(-3, 3)
moments = st.tuples(
    st.tuples(wanted_values, wanted_values, wanted_values),
    st.floats(-0.3, 0.3),  # How far something pushes the robot.
    st.sampled_from([0.0, 0.05, 0.3, 2.0]),  # Seconds until the next command.
    st.sampled_from([None, 0.0, 5.0, math.nan]),  # Torque.
)


@given(st.lists(moments, min_size=1, max_size=30))
def test_whatever_comes_what_is_executed_is_finite_in_range_and_one_step_away(commands):
    clock = SimulatedClock()
    bench = Bench(clock, FakeMemory())
    max_step = np.array([0.1, 0.2, 0.25])
    last: Vector | None = None
    for wanted, push, pause_s, torque in commands:
        clock.advance(pause_s)
        if bench.core.duty() is not Duty.NOTHING:
            last = None  # It holds: the next step counts from where it is.
        if bench.core.status().lease_holder == "":
            bench.acquire()
            last = None
        bench.position[:2] = np.clip(bench.position[:2] + push, [-2.0, -1.0], [2.0, 1.0])
        bench.torque = None if torque is None else np.full(3, torque)
        reference = last if last is not None else np.array([*bench.position[:2], 0.0])
        try:
            executed = bench.command(*wanted).executed
        except InvalidInput:
            assert not np.isfinite(wanted).all()
            continue
        assert np.isfinite(executed).all()
        assert (executed >= [-2.0, -1.0, -0.8]).all()
        assert (executed <= [2.0, 1.0, 0.8]).all()
        assert (np.abs(executed - reference) <= max_step + 1e-12).all()
        last = executed


# Stale is invalid.


def test_a_stale_state_is_invalid_and_stops_commands(bench, clock):
    bench.acquire()
    old = bench.reading()
    clock.advance(0.11)
    assert not bench.core.health({STATE: old})[STATE].valid
    with pytest.raises(Refused) as caught:
        bench.command(0.0, 0.0, 0.0, readings={STATE: old})
    assert caught.value.field == STATE
    assert "0.11" in caught.value.message
    bench.command(0.0, 0.0, 0.0)  # A fresh one is fine.


def test_a_device_that_did_not_answer_and_a_missing_reading_stop_commands(bench):
    bench.acquire()
    with pytest.raises(Refused, match="motor 3 is silent"):
        bench.command(0.0, 0.0, 0.0, readings={STATE: bench.reading(valid=False, reason="motor 3 is silent")})
    with pytest.raises(Refused, match="was not read"):
        bench.command(0.0, 0.0, 0.0, readings={})


def test_a_measured_position_that_is_not_a_number_stops_commands(bench):
    bench.acquire()
    bench.position = np.array([0.0, math.nan, 0.0])
    with pytest.raises(Refused) as caught:
        bench.command(0.0, 0.0, 0.0)
    assert caught.value.field == "lift.pos"


@pytest.mark.parametrize(("age_s", "error"), [(0.51, Refused), (-0.1, InvalidInput), (math.nan, InvalidInput)])
def test_a_command_on_an_old_observation_is_refused(bench, age_s, error):
    bench.acquire()
    with pytest.raises(error) as caught:
        bench.command(0.0, 0.0, 0.0, age_s=age_s)
    assert caught.value.field == "age"
    bench.command(0.0, 0.0, 0.0, age_s=0.5)


# The lease.


def test_one_holder_at_a_time_and_the_refusal_names_it(bench, clock):
    bench.acquire("actor/left", ttl_s=1.0)
    clock.advance(0.4)
    with pytest.raises(Refused, match="actor/left") as caught:
        bench.core.acquire("actor/right", Authority.POLICY, 1.0, "")
    assert caught.value.retry_after_s == pytest.approx(0.6)


def test_the_same_request_gets_the_same_lease_and_a_namesake_does_not(bench):
    epoch = bench.acquire("actor/left", request_id="one")
    bench.clock.advance(0.9)
    assert bench.core.acquire("actor/left", Authority.POLICY, 1.0, "one") == epoch
    bench.clock.advance(0.9)
    bench.command(0.0, 0.0, 0.0)  # Asking again renewed it.
    with pytest.raises(Refused):
        bench.core.acquire("actor/left", Authority.POLICY, 1.0, "two")
    with pytest.raises(Refused):
        bench.core.acquire("actor/left", Authority.POLICY, 1.0, "")
    bench.core.release(epoch)
    bench.acquire("actor/left", request_id="")
    with pytest.raises(Refused):  # Without an id nothing shows that it is the same request.
        bench.core.acquire("actor/left", Authority.POLICY, 1.0, "")


def test_every_epoch_is_higher_and_on_disk_before_it_is_answered(clock, memory):
    first = Bench(clock, memory).acquire()
    restarted = Bench(clock, memory)
    second = restarted.acquire()
    restarted.core.release(second)
    third = restarted.acquire()
    assert first < second < third
    assert memory.writes == [f"epoch {epoch}" for epoch in (first, second, third)]


def test_an_expired_or_released_lease_cannot_command(bench, clock):
    old = bench.acquire(ttl_s=1.0)
    clock.advance(0.9)
    bench.command(0.0, 0.0, 0.0)  # Renews it.
    clock.advance(0.9)
    bench.command(0.0, 0.0, 0.0)
    clock.advance(1.0)
    with pytest.raises(Refused, match="no lease"):
        bench.command(0.0, 0.0, 0.0)
    assert bench.core.status().lease_holder == ""
    new = bench.acquire("actor/right")
    with pytest.raises(Refused, match="actor/right"):
        bench.command(0.0, 0.0, 0.0, epoch=old)
    bench.core.release(old)  # Changes nothing.
    assert bench.core.status().lease_holder == "actor/right"
    bench.core.release(new)
    assert bench.core.status().mode is RobotMode.IDLE


def test_refused_commands_do_not_keep_a_lease_alive(bench, clock):
    bench.acquire(ttl_s=1.0)
    for _ in range(4):
        clock.advance(0.3)
        with pytest.raises((InvalidInput, Refused)):
            bench.command(math.nan, 0.0, 0.0)
    assert bench.core.status().lease_holder == ""


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, 60.1, math.nan, math.inf])
def test_a_lease_without_a_sane_end_is_refused(bench, ttl_s):
    with pytest.raises(InvalidInput) as caught:
        bench.core.acquire("actor/left", Authority.POLICY, ttl_s, "")
    assert caught.value.field == "ttl"


def test_a_lease_names_its_holder_and_authority(bench):
    with pytest.raises(InvalidInput):
        bench.core.acquire("", Authority.POLICY, 1.0, "")
    with pytest.raises(InvalidInput):
        bench.core.acquire("actor/left", Authority.NONE, 1.0, "")


def test_a_sequence_that_does_not_grow_is_refused_and_moves_nothing(bench):
    bench.acquire()
    bench.command(0.05, 0.0, 0.0, sequence=5)
    for replayed in (5, 4, 0, -1):
        with pytest.raises(AlreadyExists):
            bench.command(0.1, 0.0, 0.0, sequence=replayed)
    assert bench.position[0] == 0.05
    bench.command(0.1, 0.0, 0.0, sequence=9)  # Gaps are fine.


def test_a_hand_over_is_limited_from_where_the_robot_is(bench):
    bench.acquire("actor/left")
    for _ in range(8):
        bench.command(2.0, 0.0, 0.8)
    bench.core.release(bench.epoch)
    bench.position = np.array([0.3, 0.0, 0.0])  # It was moved by hand meanwhile; its last command was 0.8.
    bench.acquire("operator", Authority.HUMAN)
    judgement = bench.command(2.0, 0.0, 0.8)
    # One step from 0.3, and a velocity that starts from rest.
    np.testing.assert_allclose(judgement.executed, [0.4, 0.0, 0.25])
    assert bench.core.status().authority is Authority.HUMAN


# Rest.


def test_silence_leads_to_a_hold_and_the_next_command_ends_it(bench, clock):
    bench.acquire(ttl_s=10.0)
    assert bench.core.status().mode is RobotMode.HOLDING  # Nothing was commanded yet.
    bench.command(0.0, 0.0, 0.0)
    assert (bench.core.duty(), bench.core.status().mode) == (Duty.NOTHING, RobotMode.ACTIVE)
    clock.advance(0.19)
    assert bench.core.duty() is Duty.NOTHING
    clock.advance(0.02)
    assert (bench.core.duty(), bench.core.status().mode) == (Duty.HOLD, RobotMode.HOLDING)
    assert bench.core.duty() is Duty.HOLD
    assert bench.core.status().hold_count == 1
    bench.command(0.0, 0.0, 0.0)
    assert (bench.core.duty(), bench.core.status().mode) == (Duty.NOTHING, RobotMode.ACTIVE)


def test_the_first_step_after_a_hold_counts_from_where_the_robot_is(bench, clock):
    bench.acquire(ttl_s=10.0)
    bench.command(0.0, 0.0, 0.25)
    clock.advance(1.0)
    bench.core.duty()
    bench.position = np.array([0.5, 0.0, 0.0])
    np.testing.assert_allclose(bench.command(0.6, 0.0, 0.5).executed, [0.6, 0.0, 0.25])


def test_a_lost_lease_holds_then_parks_then_drops_as_the_rules_say(clock, memory):
    rules = dataclasses.replace(RULES, park_after_s=2.0, drop_after_s=5.0)
    bench = Bench(clock, memory, rules)
    bench.acquire(ttl_s=1.0)
    bench.command(0.0, 0.0, 0.0)
    duties = []
    for _ in range(7):
        clock.advance(1.0)
        duties.append(bench.core.duty())
    assert duties == [Duty.HOLD, Duty.HOLD, Duty.PARK, Duty.PARK, Duty.PARK, Duty.DROP, Duty.DROP]
    assert bench.core.status().mode is RobotMode.IDLE
    assert bench.core.status().hold_count == 1


def test_without_park_or_drop_it_holds_for_ever(bench, clock):
    bench.acquire(ttl_s=1.0)
    bench.command(0.0, 0.0, 0.0)
    clock.advance(1e6)
    assert bench.core.duty() is Duty.HOLD


def test_parking_approaches_in_limited_steps(clock, memory):
    bench = Bench(clock, memory)
    positions = []
    for _ in range(3):
        bench.core.duty()
        bench.position = bench.core.approach(np.array([1.0, 0.0, 0.0]), bench.position, None, {})
        positions.append(bench.position[0])
    np.testing.assert_allclose(positions, [0.1, 0.2, 0.3])


def test_hold_needs_no_lease_and_ends_with_the_next_command(bench):
    bench.acquire()
    bench.command(0.0, 0.0, 0.0)
    bench.core.hold()
    assert (bench.core.duty(), bench.core.status().mode) == (Duty.HOLD, RobotMode.HOLDING)
    assert bench.core.status().hold_count == 0  # Asked for, not lost.
    bench.command(0.0, 0.0, 0.0)
    assert bench.core.status().mode is RobotMode.ACTIVE


def test_a_reset_needs_the_lease_and_starts_the_watchdog_anew(bench, clock):
    with pytest.raises(Refused):
        bench.core.begin_episode(1)
    bench.acquire(ttl_s=1.0)
    bench.command(0.1, 0.0, 0.0)
    clock.advance(0.9)
    bench.core.begin_episode(bench.epoch)
    assert bench.core.duty() is Duty.NOTHING  # The first observation may take a while to answer.
    clock.advance(0.9)
    bench.command(0.0, 0.0, 0.0)  # The reset renewed the lease.
    assert bench.core.status().hold_count == 0


def test_after_a_silence_steps_count_from_where_the_robot_is_even_if_nobody_looked(bench, clock):
    bench.acquire(ttl_s=10.0)
    bench.command(0.0, 0.0, 0.25)
    clock.advance(0.3)  # Over the watchdog; the agent was too busy to call duty().
    np.testing.assert_allclose(bench.command(0.0, 0.0, 0.5).executed, [0.0, 0.0, 0.25])
    assert bench.core.status().hold_count == 1


def test_taking_over_while_it_parks_counts_from_where_it_is(bench):
    target = np.array([0.0, 0.0, -0.8])
    bench.core.approach(target, np.zeros(3), None, {})
    bench.core.approach(target, np.zeros(3), None, {})  # Half speed by now.
    bench.acquire()
    np.testing.assert_allclose(bench.command(0.0, 0.0, 0.2).executed, [0.0, 0.0, 0.2])


# Emergency stop and faults.


def test_an_emergency_stop_latches_over_restarts_until_it_is_cleared_at_the_robot(clock, memory):
    bench = Bench(clock, memory)
    bench.acquire()
    bench.command(0.0, 0.0, 0.0)
    bench.core.stop("smoke")
    assert memory.stop is None  # In force before the disk is asked.
    assert bench.core.duty() is Duty.HOLD
    bench.core.remember_stop()
    assert memory.stop == "smoke"
    for stopped in (bench, Bench(clock, memory)):
        stopped.epoch = bench.epoch
        assert (stopped.core.duty(), stopped.core.status().mode) == (Duty.HOLD, RobotMode.EMERGENCY_STOP)
        assert "smoke" in stopped.core.status().fault
        with pytest.raises(Refused, match="clear-stop"):
            stopped.command(0.0, 0.0, 0.0, sequence=99)
        with pytest.raises(Refused, match="smoke"):
            stopped.acquire()
        with pytest.raises(Refused):
            stopped.core.begin_episode(stopped.epoch)
    memory.stop = None  # The local act.
    bench.core.duty()
    assert bench.core.status().mode is RobotMode.IDLE
    with pytest.raises(Refused, match="no lease"):
        bench.command(0.0, 0.0, 0.0, sequence=100)  # The stop ended the lease.
    bench.acquire()
    bench.command(0.0, 0.0, 0.0)


def test_a_second_stop_keeps_the_first_reason(bench, memory):
    for reason in ("smoke", "noise"):
        bench.core.stop(reason)
        bench.core.remember_stop()
    assert memory.writes == ["stop smoke"]


def test_a_stop_is_in_force_even_if_the_disk_refuses_to_remember_it(bench, memory):
    def full(reason: str) -> None:
        raise OSError("no space")

    bench.acquire()
    memory.latch_stop = full
    bench.core.stop("smoke")
    with pytest.raises(OSError):
        bench.core.remember_stop()
    assert bench.core.duty() is Duty.HOLD
    assert bench.core.status().mode is RobotMode.EMERGENCY_STOP
    with pytest.raises(Refused):
        bench.command(0.0, 0.0, 0.0)


def test_a_stop_lets_go_of_torque_only_where_the_rules_say_so(clock, memory):
    bench = Bench(clock, memory, dataclasses.replace(RULES, on_emergency_stop=Rest.DROP))
    bench.core.stop("smoke")
    assert bench.core.duty() is Duty.DROP
    with pytest.raises(InvalidInput):
        dataclasses.replace(RULES, on_emergency_stop=Rest.PARK)


def test_after_a_fault_nothing_is_executed(bench):
    bench.acquire()
    bench.core.fail("motor 2 overheated")
    with pytest.raises(Refused, match="motor 2"):
        bench.command(0.0, 0.0, 0.0)
    status = bench.core.status()
    assert (status.mode, status.fault) == (RobotMode.FAULT, "motor 2 overheated")


def test_in_fault_it_does_not_set_out_for_its_park_pose_but_lets_go_in_time(clock, memory):
    bench = Bench(clock, memory, dataclasses.replace(RULES, park_after_s=1.0, drop_after_s=5.0))
    bench.core.fail("motor 2 overheated")
    clock.advance(2.0)
    assert bench.core.duty() is Duty.HOLD
    clock.advance(4.0)
    assert bench.core.duty() is Duty.DROP


@pytest.mark.parametrize(
    "change", [{"low": 2.0}, {"high": math.inf}, {"max_step": 0.0}, {"max_velocity": -1.0}, {"max_torque": 0.0}]
)
def test_limits_that_do_not_limit_are_refused(change):
    with pytest.raises(InvalidInput, match="pan"):
        dataclasses.replace(RULES.elements[0], **change)
