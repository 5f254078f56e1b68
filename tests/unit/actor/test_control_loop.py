"""The tick in simulated time: a point robot, a policy that answers late, a person who takes over."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from actor.chunk_queue import ChunkQueue
from actor.control_loop import ControlLoop, Episode, PolicySide, RerecordWished
from actor.inference_stream import ChunkAnswer, ChunkRequest, SubtaskHeard
from actor.operator_events import Wish, wish_of
from actor.robot_link import CommandRefused, RobotLost
from actor.schedule import Schedule
from actor.subtask_refresh import SubtaskRefresh
from actor.telemetry import Cursor, Telemetry
from manyhands import codec
from manyhands.actor.v1 import actor_pb2
from manyhands.clients.act_stream import Chunk, Reply, SubtaskAnswer
from manyhands.common.v1 import common_pb2
from manyhands.dataset.v1 import dataset_pb2
from manyhands.robot.types import (
    CommandResult,
    EpisodeOutcome,
    RobotMode,
    RobotObservation,
    RobotStatus,
    TeleopEvent,
    TeleopEventKind,
    ValueHealth,
)
from manyhands.spec import Feature, FeatureKind, Spec

RATE_HZ = 10.0
HORIZON = 8
SPEC = Spec(
    observation=(
        Feature(name="observation.state", kind=FeatureKind.STATE, dtype="float32", shape=(1,)),
        Feature(name="observation.images.front", kind=FeatureKind.IMAGE, dtype="uint8", shape=(8, 8, 3)),
    ),
    action=(Feature(name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(1,)),),
    control_rate_hz=RATE_HZ,
)
STATUS = RobotStatus(
    mode=RobotMode.ACTIVE,
    lease_epoch=1,
    lease_holder="actor/point",
    authority=1,  # type: ignore[arg-type]
    fault="",
    clamped_count=0,
    refused_count=0,
    hold_count=0,
)


class SimulatedClock:
    def __init__(self) -> None:
        self.time_s = 100.0

    def now(self) -> float:
        return self.time_s

    def sleep(self, seconds: float) -> None:
        self.time_s += max(seconds, 1e-5)


class PointRobot:
    """Goes where it is told, at most limit away from zero; success past 1e9 by default."""

    def __init__(self, clock: SimulatedClock) -> None:
        self.clock = clock
        self.position = 0.0
        self.tick = 0
        self.limit = 1e6
        self.success_at = 10**9
        self.commands: list[tuple[float, float]] = []  # (value, age)
        self.holds: list[str] = []
        self.looks: list[bool] = []
        self.person: Callable[[int], float | None] = lambda tick: None
        self.attached = False
        self.health: dict[str, ValueHealth] = {}
        self.refuse: Callable[[int], str] = lambda tick: ""
        self.lose_at = -1

    def reset(self, seed: int, task: str) -> RobotObservation:
        self.position, self.tick = 0.0, 0
        return RobotObservation(message=common_pb2.Observation(), task=task or "go")

    def observe(self, *, include_images: bool, teleoperator: str, image_encoding: int) -> RobotObservation:
        if self.tick == self.lose_at:
            raise RobotLost("gone")
        self.looks.append(include_images)
        self.clock.time_s += 0.002
        values: dict[str, Any] = {"observation.state": np.array([self.position], np.float32)}
        if include_images:
            values["observation.images.front"] = np.zeros((8, 8, 3), np.uint8)
        human = self.person(self.tick) if teleoperator else None
        return RobotObservation(
            message=common_pb2.Observation(values=codec.encode_values(values), tick=self.tick),
            health=self.health,
            teleop_action={"action": np.array([human], np.float32)} if human is not None else {},
            intervening=human is not None,
            status=STATUS,
            outcome=EpisodeOutcome.SUCCESS if self.tick >= self.success_at else EpisodeOutcome.RUNNING,
        )

    def command(self, action: Any, *, age_s: float, version: Any) -> CommandResult:
        if reason := self.refuse(self.tick):
            raise CommandRefused(reason)
        value = float(action["action"][0])
        self.commands.append((value, age_s))
        self.position = float(np.clip(value, -self.limit, self.limit))
        self.tick += 1
        clamped = ("action.0",) if abs(value) > self.limit else ()
        return CommandResult(
            executed_action={"action": np.array([self.position], np.float32)}, clamped_elements=clamped, status=STATUS
        )

    def hold(self, reason: str) -> None:
        self.holds.append(reason)


class LatePolicy:
    """As InferenceStream; a chunk for a request at tick t is t*100 + (0, 1, 2, ...), after delay_s."""

    def __init__(self, clock: SimulatedClock, delay_s: float = 0.15) -> None:
        self.clock = clock
        self.delay_s = delay_s
        self.requests: list[ChunkRequest] = []
        self.pending: tuple[float, ChunkRequest] | None = None
        self.away: Callable[[float], bool] = lambda now_s: False
        self.detail = ""
        self.corrupt: Callable[[Any], Any] = lambda actions: actions
        self.version = 1
        self.think_s = 0.05
        self.says: list[str] = []
        self.thoughts: list[tuple[float, SubtaskHeard]] = []

    @property
    def ready(self) -> bool:
        self.detail = "the service is away" if self.away(self.clock.now()) else ""
        return self.pending is None and not self.detail

    def ask(self, request: ChunkRequest) -> None:
        self.requests.append(request)
        self.pending = (self.clock.now() + self.delay_s, request)
        if request.ask_subtask_for and self.says:
            text = self.says.pop(0)
            answer = SubtaskAnswer(text=text, accepted=bool(text), reason="" if text else "no instruction")
            heard = SubtaskHeard(generation=request.generation, request_id=len(self.requests), answer=answer)
            self.thoughts.append((self.clock.now() + self.think_s, heard))

    def answers(self) -> list[ChunkAnswer | SubtaskHeard]:
        now_s = self.clock.now()
        heard = [thought for due_s, thought in self.thoughts if now_s >= due_s]
        self.thoughts = [(due_s, thought) for due_s, thought in self.thoughts if now_s < due_s]
        return [*heard, *self.chunks()]

    def chunks(self) -> list[ChunkAnswer]:
        if self.pending is None or self.clock.now() < self.pending[0]:
            return []
        arrived_s, request = self.pending
        self.pending = None
        actions = (request.tick * 100 + np.arange(HORIZON, dtype=np.float32))[:, None]
        reply = Reply(
            request_id=len(self.requests),
            version=common_pb2.PolicyVersion(model="m", number=self.version),
            result=Chunk(actions=self.corrupt(actions), model_actions=actions, replan_interval_steps=0),
            round_trip_s=self.delay_s,
            stage_s={"total": 0.1, "queue": 0.02},
            batch_size=1,
        )
        return [ChunkAnswer(request=request, request_id=reply.request_id, reply=reply, refusal="", arrived_s=arrived_s)]


class Frames:
    def __init__(self) -> None:
        self.frames: list[dataset_pb2.Frame] = []

    def frame(self, frame: dataset_pb2.Frame) -> None:
        self.frames.append(frame)


class Pedals:
    """As OperatorEvents: pressed says what is pressed at which of the robot's ticks."""

    def __init__(self, robot: PointRobot) -> None:
        self.robot = robot
        self.pressed: dict[int, Wish] = {}

    def forget(self) -> None:
        pass

    def take(self) -> Wish | None:
        return self.pressed.pop(self.robot.tick, None)


class Bench:
    """Everything of one loop."""

    def __init__(
        self, *, policy: bool = True, record: bool = True, max_age_s: float = 100.0, interval: int = 4, subtasks: int = 0
    ) -> None:
        self.clock = SimulatedClock()
        self.robot = PointRobot(self.clock)
        self.policy = LatePolicy(self.clock)
        self.frames = Frames()
        self.telemetry = Telemetry()
        self.cursor = Cursor(self.telemetry)
        self.stop = threading.Event()
        self.holds: list[str] = []
        self.operator = Pedals(self.robot)
        side = PolicySide(
            stream=self.policy,  # type: ignore[arg-type]
            queue=ChunkQueue(replan_interval_steps=interval, max_age_s=max_age_s),
            required_observations=("observation.state", "observation.images.front"),
            subtasks=SubtaskRefresh(subtasks),
            on_subtask=lambda: self.subtasks.append(side.subtasks.subtask.text),
        )
        self.subtasks: list[str] = []
        self.loop = ControlLoop(
            robot=self.robot,  # type: ignore[arg-type]
            spec=SPEC,
            schedule=Schedule(RATE_HZ, self.clock),
            clock=self.clock,
            telemetry=self.telemetry,
            policy=side if policy else None,
            recorder=self.frames if record else None,  # type: ignore[arg-type]
            teleoperator="" if policy else "person",
            image_encoding=common_pb2.IMAGE_ENCODING_JPEG,
            stop=self.stop,
            on_hold=self.holds.append,
            operator=self.operator,  # type: ignore[arg-type]
        )

    def run(self, steps: int = 20) -> actor_pb2.EpisodeResult:
        return self.loop.run_episode(Episode(number=0, uuid="u", seed=3, task="", max_steps=steps))

    def chunks(self) -> list[actor_pb2.ChunkEvent]:
        return [event.chunk for event in self.cursor.take(include_tick=False) if event.WhichOneof("event") == "chunk"]


def test_a_late_policy_acts_with_the_action_meant_for_the_tick() -> None:
    bench = Bench()
    result = bench.run(steps=12)
    # Asked at tick 0 (robot waits for it), then every 4 ticks, with two ticks executed until each answer is here.
    assert [value for value, _ in bench.robot.commands] == [0, 1, 2, 3, 4, 5, 402, 403, 404, 405, 802, 803]
    assert (result.reason, result.frame_count) == (dataset_pb2.EPISODE_END_TIME_LIMIT, 12)
    assert result.held_tick_count == 2
    assert [request.tick for request in bench.policy.requests] == [0, 4, 8, 12][: len(bench.policy.requests)]
    second = bench.policy.requests[1]
    assert second.committed_prefix is not None
    assert second.committed_prefix[:, 0].tolist() == [4, 5, 6, 7]
    assert second.delay_steps == 2
    events = bench.chunks()
    assert [(e.requested_tick, e.arrived_tick, e.delay_steps, e.used_count) for e in events[:2]] == [
        (0, 0, 0, 0),
        (4, 6, 2, 6),
    ]
    assert events[1].server_queue.nanos == 20_000_000
    assert events[1].server_compute.nanos == 80_000_000
    assert events[1].network.nanos == pytest.approx(50_000_000)


def test_frames_hold_what_was_seen_before_the_action_that_was_executed() -> None:
    bench = Bench()
    bench.robot.limit = 4.5
    bench.run(steps=6)
    frames = bench.frames.frames
    states = [float(codec.decode_values(frame.observation)["observation.state"][0]) for frame in frames]
    actions = [float(codec.decode_values(frame.action)["action"][0]) for frame in frames]
    assert actions == [0, 1, 2, 3, 4, 4.5]
    assert states == [0, 0, 1, 2, 3, 4]
    assert all(frame.source == dataset_pb2.ACTION_SOURCE_POLICY and frame.version.number == 1 for frame in frames)
    assert [len(frame.proposed_action) for frame in frames] == [0, 0, 0, 0, 0, 1], "only where a limit changed it"
    assert float(codec.decode_values(frames[5].proposed_action)["action"][0]) == 5


def test_without_a_service_the_robot_holds_and_goes_on_where_it_stands() -> None:
    bench = Bench()
    bench.policy.away = lambda now_s: 101.0 < now_s < 106.0
    result = bench.run(steps=20)
    assert result.frame_count == 20
    assert 30 < result.held_tick_count < 60
    assert len(bench.robot.holds) >= 1
    assert "the service is away" in bench.holds[0]
    assert bench.holds[-1] == "", "told when it is over"
    assert len(bench.frames.frames) == 20, "a hold is no frame"


def test_no_action_is_executed_whose_observation_is_over_the_bound() -> None:
    bench = Bench(max_age_s=0.45, interval=8)
    bench.run(steps=30)
    assert max(age for _, age in bench.robot.commands) <= 0.45
    ages = [round(age, 1) for _, age in bench.robot.commands]
    assert 0.4 in ages, "and right up to the bound they are"


def test_a_chunk_that_is_not_finite_never_reaches_the_robot() -> None:
    bench = Bench()
    spoiled = iter([False, True, False])

    def corrupt(actions: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if next(spoiled, False):
            actions = actions.copy()
            actions[3] = np.nan
        return actions

    bench.policy.corrupt = corrupt
    bench.run(steps=16)
    assert all(np.isfinite(value) for value, _ in bench.robot.commands)
    assert any("not finite" in event.refusal for event in bench.chunks())


def test_a_chunk_for_another_robot_is_refused_by_its_shape() -> None:
    bench = Bench()
    first = iter([True])
    bench.policy.corrupt = lambda actions: np.zeros((8, 3), np.float32) if next(first, False) else actions
    bench.run(steps=4)
    assert bench.chunks()[0].refusal == "chunk.actions has shape (8, 3); this robot takes (steps, 1)"


def test_a_person_takes_over_and_both_actions_are_recorded() -> None:
    bench = Bench()
    bench.loop._teleoperator = "person"
    bench.robot.person = lambda tick: -1.0 if 6 <= tick < 10 else None
    bench.run(steps=16)
    values = [value for value, _ in bench.robot.commands]
    assert values[6:10] == [-1.0] * 4
    taken_over = bench.frames.frames[6:10]
    assert all(frame.source == dataset_pb2.ACTION_SOURCE_TELEOPERATOR for frame in taken_over)
    proposed = [float(codec.decode_values(frame.proposed_action)["action"][0]) for frame in taken_over]
    assert proposed[:2] == [402.0, 403.0], "what the policy wanted at the same ticks"
    after = [request for request in bench.policy.requests if request.tick >= 10]
    assert values[10] == after[0].tick * 100, "planned from where the person left the robot, from its first action on"
    assert after[0].committed_prefix is None


def test_a_value_that_is_not_fresh_is_not_acted_on() -> None:
    bench = Bench(policy=False)
    bench.robot.person = lambda tick: 1.0
    bench.robot.health = {"observation.images.front": ValueHealth(valid=False, age_s=0.9, reason="camera unplugged")}
    threading.Timer(0.2, bench.stop.set).start()
    result = bench.run(steps=10)
    assert (result.frame_count, bench.robot.commands) == (0, [])
    assert result.reason == dataset_pb2.EPISODE_END_INTERRUPTED
    assert bench.holds[0] == "observation.images.front is not fresh: camera unplugged"


def test_success_ends_the_episode_after_its_last_frame() -> None:
    bench = Bench(policy=False)
    bench.robot.person = lambda tick: float(tick)
    bench.robot.success_at = 7
    result = bench.run(steps=50)
    assert (result.success, result.reason, result.frame_count) == (True, dataset_pb2.EPISODE_END_SUCCESS, 7)
    assert len(bench.frames.frames) == 7
    assert result.task == "go", "the robot's own where the run names none"


def test_a_refused_command_is_a_hold_and_not_a_frame() -> None:
    bench = Bench(policy=False)
    refusals = iter(["too old", "too old"])
    bench.robot.person = lambda tick: float(tick)
    bench.robot.refuse = lambda tick: next(refusals, "") if tick == 3 else ""
    result = bench.run(steps=6)
    assert (result.frame_count, result.held_tick_count, len(bench.frames.frames)) == (6, 2, 6)
    assert [value for value, _ in bench.robot.commands] == [0, 1, 2, 3, 4, 5]


def test_pictures_are_asked_for_only_when_somebody_wants_them() -> None:
    bench = Bench(record=False)
    bench.run(steps=12)
    assert sum(bench.robot.looks) == len(bench.policy.requests)
    recorded = Bench(record=True)
    recorded.run(steps=12)
    assert recorded.robot.looks == [True] * (len(recorded.robot.looks) - 1) + [False], "the last look is for the outcome"


def test_a_lost_robot_ends_the_episode() -> None:
    bench = Bench(policy=False)
    bench.robot.person = lambda tick: 1.0
    bench.robot.lose_at = 4
    with pytest.raises(RobotLost):
        bench.run(steps=10)
    assert len(bench.frames.frames) == 4


def test_the_same_seed_asks_the_same_noise_and_each_tick_another() -> None:
    first, second = Bench(), Bench()
    first.run(steps=12)
    second.run(steps=12)
    seeds = [request.noise_seed for request in first.policy.requests]
    assert seeds == [request.noise_seed for request in second.policy.requests]
    assert len(set(seeds)) == len(seeds)


def test_versions_that_acted_are_named_in_order() -> None:
    bench = Bench()
    bench.policy.version = 1

    def swap(actions: Any) -> Any:
        bench.policy.version += 1
        return actions

    bench.policy.corrupt = swap
    result = bench.run(steps=12)
    assert [version.number for version in result.versions] == sorted({frame.version.number for frame in bench.frames.frames})
    assert len(result.versions) >= 2


@pytest.mark.parametrize(
    ("wish", "success", "reason"),
    [
        (Wish.SUCCESS, True, dataset_pb2.EPISODE_END_SUCCESS),
        (Wish.FAILURE, False, dataset_pb2.EPISODE_END_FAILURE),
        (Wish.STOP, False, dataset_pb2.EPISODE_END_INTERRUPTED),
    ],
)
def test_a_pedal_ends_the_episode(wish: Wish, success: bool, reason: int) -> None:
    bench = Bench(policy=False)
    bench.robot.person = lambda tick: 1.0
    bench.operator.pressed = {5: wish}
    result = bench.run(steps=20)
    assert (result.success, result.reason, result.frame_count) == (success, reason, 5)
    assert bench.stop.is_set() == (wish is Wish.STOP)


def test_a_pedal_asks_for_the_episode_again() -> None:
    bench = Bench(policy=False)
    bench.robot.person = lambda tick: 1.0
    bench.operator.pressed = {5: Wish.RERECORD}
    with pytest.raises(RerecordWished):
        bench.run(steps=20)


def test_what_the_agent_itself_reports_is_nobodys_wish() -> None:
    def event(kind: TeleopEventKind, source: str) -> TeleopEvent:
        return TeleopEvent(number=1, kind=kind, source=source, stamp=common_pb2.Stamp())

    assert wish_of(event(TeleopEventKind.SUCCESS, "pedal")) is Wish.SUCCESS
    assert wish_of(event(TeleopEventKind.SUCCESS, "scene")) is None
    assert wish_of(event(TeleopEventKind.STOP, "emergency stop")) is None
    assert wish_of(event(TeleopEventKind.INTERVENTION_START, "pedal")) is None


def told(bench: Bench) -> list[tuple[str, str]]:
    """Of each request: what its chunk acts on, and what it asks about."""
    return [(request.task, request.ask_subtask_for) for request in bench.policy.requests]


def test_chunks_are_asked_for_the_subtask_and_frames_keep_the_task() -> None:
    bench = Bench(subtasks=2)
    bench.policy.says = ["grasp", "", "lift"]
    bench.run(steps=24)
    assert told(bench)[:6] == [("go", "go"), ("grasp", ""), ("grasp", "go"), ("grasp", ""), ("grasp", "go"), ("lift", "")]
    assert bench.subtasks == ["grasp", "grasp", "lift"], "told of each answer, refused ones too"
    assert [event.task for event in bench.chunks()][:6] == [task for task, _ in told(bench)][:6]
    assert {frame.task for frame in bench.frames.frames} == {"go"}


def test_a_text_head_that_thinks_for_long_makes_no_tick_wait() -> None:
    quick, slow = Bench(subtasks=1), Bench(subtasks=1)
    slow.policy.says, slow.policy.think_s = ["grasp"], 1e9
    assert slow.run(steps=24) == quick.run(steps=24)
    assert slow.robot.commands == quick.robot.commands
    assert {task for task, _ in told(slow)} == {"go"}


def test_an_answer_from_before_a_person_took_over_is_not_acted_on() -> None:
    bench = Bench(subtasks=100)
    bench.loop._teleoperator = "person"
    bench.robot.person = lambda tick: -1.0 if 2 <= tick < 6 else None
    bench.policy.says, bench.policy.think_s = ["grasp", "lift"], 1.0
    bench.run(steps=24)
    after = [request for request in bench.policy.requests if request.tick >= 6]
    assert (after[0].task, after[0].ask_subtask_for) == ("go", "go"), "asked again from where the person left the robot"
    assert bench.subtasks == ["lift"]


def test_a_question_that_was_lost_with_its_stream_is_asked_again() -> None:
    bench = Bench(subtasks=100)
    bench.policy.thoughts = [(100.9, SubtaskHeard(generation=1, request_id=1, answer=None))]
    bench.run(steps=16)
    assert [bool(question) for _, question in told(bench)] == [True, False, True, False], "the third is made after 100.9 s"


def test_a_request_that_is_refused_asks_again() -> None:
    bench = Bench(subtasks=100)
    spoiled = iter([True])
    bench.policy.corrupt = lambda actions: actions * np.nan if next(spoiled, False) else actions
    bench.run(steps=8)
    assert [bool(question) for _, question in told(bench)][:3] == [True, True, False]


def test_an_episode_begins_with_its_task() -> None:
    bench = Bench(subtasks=100)
    bench.policy.says = ["grasp", "lift"]
    bench.run(steps=8)
    first = len(told(bench))
    bench.run(steps=8)
    assert told(bench)[first] == ("go", "go")
    assert bench.subtasks == ["grasp", "lift"]
