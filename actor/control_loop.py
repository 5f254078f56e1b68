"""The tick: observe, decide, command, record, at the robot's rate. It never waits for a network beyond the robot's own.

Chunks come from a stream with a thread of its own, frames go to a recorder with a thread of its own. When there is nothing
fresh to do the robot holds and the episode waits: held periods are counted, but they are neither executed steps nor recorded
frames, since the robot did not move on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from manyhands import codec, stamps
from manyhands.actor.v1 import actor_pb2
from manyhands.clients.robot import CommandResult, EpisodeOutcome, RobotObservation
from manyhands.common.v1 import common_pb2
from manyhands.dataset.v1 import dataset_pb2
from manyhands.metrics import observe_stage
from manyhands.spec import Spec

from .chunk_queue import Chunk, ChunkQueue
from .decision import Decision, action_size, decide, hold, same
from .inference_stream import ChunkAnswer, ChunkRequest, InferenceStream, SubtaskHeard
from .operator_events import OperatorEvents, Wish
from .recorder import Recorder
from .robot_link import CommandRefused, RobotLink, RobotLost
from .schedule import Clock, Schedule, TickTime
from .subtask_refresh import SubtaskRefresh
from .telemetry import Telemetry

# A pause between two chunks is nobody's news; this long is.
HOLD_SHOWN_AFTER_S = 0.3


@dataclass(frozen=True, kw_only=True)
class PolicySide:
    """What a run with a policy has and one with a teleoperator has not.

    Attributes:
        on_subtask: Told when the text head has answered.
    """

    stream: InferenceStream
    queue: ChunkQueue
    required_observations: tuple[str, ...]
    subtasks: SubtaskRefresh = field(default_factory=lambda: SubtaskRefresh(0))
    on_subtask: Callable[[], None] = lambda: None


class RerecordWished(Exception):
    """The operator wants this episode again; it is to be discarded."""


@dataclass(frozen=True, kw_only=True)
class Episode:
    """What one episode is to be; uuid is empty when it is not recorded."""

    number: int
    uuid: str
    seed: int
    task: str
    max_steps: int


class ControlLoop:
    """Runs episodes one after the other on one thread.

    Args:
        teleoperator: Asked at every tick; empty for none.
        image_encoding: Of recorded pictures.
        stop: Ends the episode after the present tick.
        on_hold: Told why the robot holds, and "" when it goes on.
        operator: Pedals and buttons; None where nobody is at the robot.
    """

    def __init__(
        self,
        *,
        robot: RobotLink,
        spec: Spec,
        schedule: Schedule,
        clock: Clock,
        telemetry: Telemetry,
        policy: PolicySide | None,
        recorder: Recorder | None,
        teleoperator: str,
        image_encoding: common_pb2.ImageEncoding.ValueType,
        stop: threading.Event,
        on_hold: Callable[[str], None],
        operator: OperatorEvents | None = None,
    ) -> None:
        self._robot = robot
        self._spec = spec
        self._schedule = schedule
        self._clock = clock
        self._telemetry = telemetry
        self._policy = policy
        self._recorder = recorder
        self._teleoperator = teleoperator
        self._image_encoding = image_encoding
        self._stop = stop
        self._on_hold = on_hold
        self._operator = operator
        self._action_size = action_size(spec.action)
        self._images = frozenset(feature.name for feature in spec.images)
        self._generation = 0
        self._period = 0
        self._held_since_s: float | None = None
        self._shown_hold = ""

    def run_episode(self, episode: Episode) -> actor_pb2.EpisodeResult:
        """One episode from reset to end; its frames are with the recorder, whose episode the caller has begun and ends.

        Raises:
            RobotLost, RobotStopped: The episode cannot go on; frames so far are real.
            RerecordWished: The operator wants it again.
            Overloaded: The recorder cannot keep what happens.
        """
        self._generation += 1
        if self._policy is not None:
            self._policy.queue.clear()
            self._policy.subtasks.begin_episode()
        reset = self._robot.reset(episode.seed, episode.task)
        task = episode.task or reset.task
        result = actor_pb2.EpisodeResult(
            episode_number=episode.number, episode_uuid=episode.uuid, task=task, seed=episode.seed
        )
        if self._operator is not None:
            self._operator.forget()
        self._schedule.restart()
        was_intervening = False
        last_robot_tick = -1
        tick = 0
        while True:
            time = self._schedule.wait()
            self._period += 1
            observed_s = self._clock.now()
            observation = self._robot.observe(
                include_images=tick < episode.max_steps and self._needs_images(tick),
                teleoperator=self._teleoperator,
                image_encoding=self._image_encoding,
            )
            capture_s = self._clock.now() - observed_s
            observe_stage("actor", "tick_lateness", time.lateness_s)
            observe_stage("actor", "capture", capture_s)
            if observation.tick < last_robot_tick:
                raise RobotLost("the robot agent was restarted in the middle of the episode")
            last_robot_tick = observation.tick
            outcome = self._outcome(observation)
            if outcome is not EpisodeOutcome.RUNNING:
                result.success = outcome is EpisodeOutcome.SUCCESS
                reason = dataset_pb2.EPISODE_END_SUCCESS if result.success else dataset_pb2.EPISODE_END_FAILURE
                break
            if tick >= episode.max_steps:
                reason = dataset_pb2.EPISODE_END_TIME_LIMIT
                break
            if self._stop.is_set():
                reason = dataset_pb2.EPISODE_END_INTERRUPTED
                break
            if self._policy is not None:
                if was_intervening and not observation.intervening:
                    # What was planned or asked before is not for where the person left the robot.
                    self._policy.queue.clear()
                    self._policy.subtasks.lost()
                    self._generation += 1
                was_intervening = observation.intervening
                self._exchange_chunks(self._policy, observation, task, episode.seed, tick, observed_s, capture_s)
            decision = decide(
                observation,
                features=self._spec.action,
                queue=self._policy.queue if self._policy is not None else None,
                tick=tick,
                now_s=self._clock.now(),
                observed_s=observed_s,
                no_chunk_reason=self._policy.stream.detail if self._policy is not None else "",
            )
            decision, executed = self._execute(decision)
            self._publish(episode, tick, time, observation, decision, executed)
            if executed is None:
                result.held_tick_count += 1
                self._show_hold(decision.hold_reason, is_moving=tick > 0)
                continue
            self._show_moving()
            if self._recorder is not None:
                self._recorder.frame(_frame(task, observation, decision, executed))
            if decision.version is not None and (not result.versions or result.versions[-1] != decision.version):
                result.versions.append(decision.version)
            tick += 1
            result.frame_count = tick
        self._show_moving()
        result.reason = reason
        return result

    def _outcome(self, observation: RobotObservation) -> EpisodeOutcome:
        """What the scene or the operator says of the episode. A wish to stop sets the run's stop."""
        wish = self._operator.take() if self._operator is not None else None
        if wish is Wish.RERECORD:
            raise RerecordWished
        if wish is Wish.STOP:
            self._stop.set()
        if wish in (Wish.SUCCESS, Wish.FAILURE):
            return EpisodeOutcome.SUCCESS if wish is Wish.SUCCESS else EpisodeOutcome.FAILURE
        return observation.outcome

    def _needs_images(self, tick: int) -> bool:
        if self._recorder is not None:
            return True
        if self._policy is None or self._images.isdisjoint(self._policy.required_observations):
            return False
        return self._policy.stream.ready and self._policy.queue.wants_chunk(tick, self._clock.now())

    def _execute(self, decision: Decision) -> tuple[Decision, CommandResult | None]:
        if decision.action is None:
            return decision, None
        try:
            return decision, self._robot.command(decision.action, age_s=decision.age_s, version=decision.version)
        except CommandRefused as error:
            if self._policy is not None:
                # The robot's bounds are its own; what it does not take now it will not take later.
                self._policy.queue.clear()
            return hold(f"the robot refuses: {error}"), None

    def _exchange_chunks(
        self,
        policy: PolicySide,
        observation: RobotObservation,
        task: str,
        seed: int,
        tick: int,
        observed_s: float,
        capture_s: float,
    ) -> None:
        for answer in policy.stream.answers():
            if isinstance(answer, SubtaskHeard):
                self._renew(policy, answer)
            elif answer.generation == self._generation:
                self._merge(policy, answer, tick)
        if not observation.valid or not policy.stream.ready or not policy.queue.wants_chunk(tick, self._clock.now()):
            return
        by_name = {value.name: value for value in observation.message.values}
        missing = [name for name in policy.required_observations if name not in by_name]
        if missing:
            return  # Pictures were not asked for at this tick, since no chunk was wanted when it began.
        prefix = None if observation.intervening else policy.queue.leftover(tick)
        question = policy.subtasks.question_for(task)
        if question:
            policy.subtasks.asked()
        policy.stream.ask(
            ChunkRequest(
                generation=self._generation,
                period=self._period,
                observation=common_pb2.Observation(
                    values=[by_name[name] for name in policy.required_observations],
                    captured=observation.message.captured,
                    tick=tick,
                ),
                task=policy.subtasks.acting_on(task),
                tick=tick,
                committed_prefix=prefix,
                delay_steps=policy.queue.delay_steps(tick) if prefix is not None else 0,
                execution_horizon=0,
                # Another chunk for every request, the same ones when the episode is run again.
                noise_seed=(seed * 1_000_003 + tick) % 2**63,
                observed_s=observed_s,
                capture_s=capture_s,
                ask_subtask_for=question,
            )
        )
        policy.queue.requested(tick)

    def _renew(self, policy: PolicySide, heard: SubtaskHeard) -> None:
        if heard.answer is None or heard.generation != self._generation:
            # Also what was asked while an old question was in progress has got no answer.
            policy.subtasks.lost()
            return
        policy.subtasks.answered(heard.answer.text, accepted=heard.answer.accepted)
        policy.on_subtask()

    def _merge(self, policy: PolicySide, answer: ChunkAnswer, tick: int) -> None:
        request, chunk = answer.request, answer.chunk
        # Until it was here; from then to this tick is the schedule's time, and shows in arrived_tick.
        latency_s = answer.arrived_s - request.observed_s
        event = actor_pb2.ChunkEvent(
            request_id=answer.request_id,
            requested_tick=request.tick,
            arrived_tick=tick,
            latency=stamps.to_duration(latency_s),
            capture=stamps.to_duration(request.capture_s),
            refusal=answer.refusal,
            task=request.task,
        )
        if chunk is not None and answer.reply is not None:
            problem = self._problem(chunk.actions)
            if problem:
                event.refusal = problem
            else:
                stage_s = answer.reply.stage_s
                total_s = stage_s.get("total", 0.0)
                queue_s = stage_s.get("queue", 0.0)
                event.network.CopyFrom(stamps.to_duration(max(0.0, (answer.reply.round_trip_s or 0.0) - total_s)))
                event.server_queue.CopyFrom(stamps.to_duration(queue_s))
                event.server_compute.CopyFrom(stamps.to_duration(max(0.0, total_s - queue_s)))
                event.version.CopyFrom(answer.reply.version)
                merge = policy.queue.merge(
                    Chunk(
                        request_id=answer.request_id,
                        first_tick=request.tick,
                        actions=chunk.actions,
                        model_actions=chunk.model_actions,
                        version=answer.reply.version,
                        observed_s=request.observed_s,
                    ),
                    now_tick=tick,
                    waited_ticks=self._period - request.period,
                )
                event.delay_steps = merge.delay_steps
                event.used_count = merge.replaced_used_count
                if not merge.accepted:
                    event.refusal = f"too late: {merge.delay_steps} of its {len(chunk.actions)} actions had passed"
                if chunk.replan_interval_steps:
                    policy.queue.server_interval(chunk.replan_interval_steps)
        if event.refusal:
            policy.queue.request_failed()
            if request.ask_subtask_for:
                policy.subtasks.lost()
        else:
            policy.subtasks.chunk_came()
            observe_stage("actor", "observation_to_chunk", latency_s)
        self._telemetry.chunk(event)

    def _problem(self, actions: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> str:
        if actions.ndim != 2 or actions.shape[1] != self._action_size:
            return f"chunk.actions has shape {actions.shape}; this robot takes (steps, {self._action_size})"
        if not np.isfinite(actions).all():
            return "chunk.actions is not finite; nothing of it is executed"
        return ""

    def _show_hold(self, reason: str, *, is_moving: bool) -> None:
        now_s = self._clock.now()
        if self._held_since_s is None:
            self._held_since_s = now_s
            if is_moving:
                self._robot.hold(reason)
        if now_s - self._held_since_s >= HOLD_SHOWN_AFTER_S and reason != self._shown_hold:
            self._shown_hold = reason
            self._on_hold(reason)

    def _show_moving(self) -> None:
        self._held_since_s = None
        if self._shown_hold:
            self._shown_hold = ""
            self._on_hold("")

    def _publish(
        self,
        episode: Episode,
        tick: int,
        time: TickTime,
        observation: RobotObservation,
        decision: Decision,
        executed: CommandResult | None,
    ) -> None:
        event = actor_pb2.Tick(
            tick=tick,
            episode_number=episode.number,
            source=decision.source,
            queue_length=self._policy.queue.remaining(tick) if self._policy is not None else 0,
            lateness=stamps.to_duration(time.lateness_s),
        )
        for value in observation.message.values:
            if value.WhichOneof("value") == "tensor":
                event.state.extend(codec.decode_tensor(value.tensor, field=value.name).astype(float).tolist())
                break
        if executed is not None:
            for array in executed.executed_action.values():
                event.action.extend(array.astype(float).tolist())
            event.clamped_elements.extend(executed.clamped_elements)
        self._telemetry.tick(event)


def _frame(task: str, observation: RobotObservation, decision: Decision, executed: CommandResult) -> dataset_pb2.Frame:
    """What was seen before the action, and the action as it was executed."""
    frame = dataset_pb2.Frame(
        task=task,
        observation=observation.message.values,
        action=codec.encode_values(executed.executed_action),
        source=decision.source,
        version=decision.version,
    )
    if decision.proposed is not None and not same(decision.proposed, executed.executed_action):
        frame.proposed_action.extend(codec.encode_values(decision.proposed))
    return frame
