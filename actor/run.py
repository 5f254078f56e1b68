"""One run: the handshake, its episodes one after the other, and what is remembered of them."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from manyhands import errors
from manyhands.actor.v1 import actor_pb2
from manyhands.clients.dataset import DatasetClient
from manyhands.clients.inference import InferenceClient
from manyhands.clients.robot import Authority, RobotClient, RobotDescription
from manyhands.common.v1 import common_pb2
from manyhands.dataset.v1 import dataset_pb2
from manyhands.security import SecuritySettings

from . import handshake
from .chunk_queue import ChunkQueue
from .control_loop import ControlLoop, Episode, PolicySide, RerecordWished
from .operator_events import OperatorEvents
from .recorder import Recorder
from .robot_link import LEASE_TTL_S, RobotLink, RobotLost
from .run_state import RunProgress
from .schedule import MonotonicClock, Schedule
from .spool import EpisodeMeta
from .subtask_refresh import SubtaskRefresh
from .telemetry import Telemetry

logger = logging.getLogger(__name__)

# A teleoperator that fails this often in a row will not succeed by being asked again.
MOST_DISCARDS_IN_A_ROW = 50
LONGEST_BACKOFF_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What runs of one actor share.

    Attributes:
        state_dir: Where progress is kept.
        simulation_speed: Factor on the control rate of a simulated robot.
        max_action_age_s: Of the observation behind an executed action.
        chunk_deadline_s: What a chunk request is worth waiting for.
    """

    robot_address: str
    inference_address: str
    store_address: str
    security: SecuritySettings
    recorder: Recorder
    telemetry: Telemetry
    state_dir: Path
    image_encoding: common_pb2.ImageEncoding.ValueType
    simulation_speed: float
    max_action_age_s: float
    chunk_deadline_s: float


class Run:
    """prepare(), then start(); stop() or suspend(), then join().

    Attributes:
        state: A RunState.
        detail: Why it holds or failed; empty when all is well.
        subtasks: What the text head says to do.
    """

    def __init__(self, progress: RunProgress, around: Surroundings, *, on_change: Callable[[], None]) -> None:
        self.progress = progress
        self.definition = progress.definition
        self.state: actor_pb2.RunState.ValueType = actor_pb2.RUN_STATE_HOLDING
        self.detail = "shaking hands"
        self.subtasks = SubtaskRefresh(progress.definition.subtask_every_chunks)
        self._around = around
        self._on_change = on_change
        self._stop = threading.Event()
        self._discard = False
        self._suspended = False
        self._robot_client: RobotClient | None = None
        self._robot: RobotDescription | None = None
        self._link: RobotLink | None = None
        self._policy: handshake.PolicyAgreement | None = None
        self._operator: OperatorEvents | None = None
        self._thread: threading.Thread | None = None

    @classmethod
    def from_before(cls, progress: RunProgress, around: Surroundings, *, on_change: Callable[[], None]) -> Run:
        """A run of an earlier process, for its results; it does not go on."""
        run = cls(progress, around, on_change=on_change)
        run.state = actor_pb2.RUN_STATE_FINISHED if progress.finished else actor_pb2.RUN_STATE_FAILED
        run.detail = "" if progress.finished else "the actor was restarted; with --resume-run it would have gone on"
        return run

    @property
    def is_over(self) -> bool:
        return self.state in (actor_pb2.RUN_STATE_FINISHED, actor_pb2.RUN_STATE_FAILED)

    def prepare(self) -> None:
        """The handshake: nothing has moved when it raises, and nothing is left open."""
        try:
            self._prepare()
        except BaseException as error:
            self._close()
            self._set(actor_pb2.RUN_STATE_FAILED, str(error))
            raise

    def start(self) -> None:
        self.progress.save(self._around.state_dir)
        self._set(actor_pb2.RUN_STATE_RUNNING, "")
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._thread.start()

    def resume(self) -> None:
        """As prepare() and start(), for a run from before a restart: waits in the background until everyone is there."""
        self._thread = threading.Thread(target=self._prepare_for_ever_and_run, name="control", daemon=True)
        self._thread.start()

    def stop(self, *, discard_episode: bool = False) -> None:
        """Ends the run after the present tick."""
        self._discard = self._discard or discard_episode
        self._stop.set()

    def suspend(self) -> None:
        """As stop(), but the run is to go on when the actor is started again."""
        self._suspended = True
        self._stop.set()

    def join(self, timeout_s: float) -> bool:
        """Whether the run is over."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            return not self._thread.is_alive()
        return True

    def _prepare(self) -> None:
        run, around = self.definition, self._around
        handshake.check_definition(run)
        self._robot_client = RobotClient(around.robot_address, security_settings=around.security)
        self._robot = self._robot_client.describe()
        handshake.check_robot(run, self._robot)
        if run.dataset:
            if not around.store_address:
                raise errors.Refused("recording needs a store; start the actor with --store", field="run.dataset")
            around.recorder.check_room()
            with DatasetClient(around.store_address, security_settings=around.security) as store:
                handshake.agree_with_dataset(run.dataset, self._robot.spec, store)
        if run.mode == actor_pb2.RUN_MODE_POLICY:
            if not around.inference_address:
                raise errors.Refused("a policy needs a service; start the actor with --inference", field="run.model")
            client = InferenceClient(around.inference_address, security_settings=around.security)
            self._policy = handshake.agree_with_model(run, self._robot, client, deadline_s=around.chunk_deadline_s)
        authority = Authority.POLICY if self._policy is not None else Authority.HUMAN
        self._link = RobotLink(self._robot_client, holder=f"actor/{self._robot.robot_id}", authority=authority)
        self._acquire_patiently(self._link)

    def _acquire_patiently(self, link: RobotLink) -> None:
        # The lease of an actor that was killed lives this long; then the robot is free.
        give_up_s = time.monotonic() + 2 * LEASE_TTL_S
        while True:
            try:
                link.acquire()
                return
            except errors.Refused as error:
                is_held = error.field == "holder"
                if not is_held or time.monotonic() > give_up_s or self._stop.wait(0.2):
                    raise

    def _prepare_for_ever_and_run(self) -> None:
        backoff_s = 0.2
        while not self._stop.is_set():
            try:
                self._prepare()
                self.start_here()
                return
            except errors.InvalidInput as error:
                self._close()
                self._finish(actor_pb2.RUN_STATE_FAILED, str(error))
                return
            except errors.ManyhandsError as error:
                self._close()
                self._set(actor_pb2.RUN_STATE_HOLDING, f"the run cannot go on yet: {error}")
                self._stop.wait(backoff_s)
                backoff_s = min(backoff_s * 2, LONGEST_BACKOFF_S)
        self._finish(actor_pb2.RUN_STATE_FINISHED, "stopped")

    def start_here(self) -> None:
        """Runs on the caller's thread."""
        self._set(actor_pb2.RUN_STATE_RUNNING, "")
        self._run()

    def _run(self) -> None:
        try:
            self._run_episodes(self._make_loop())
            stopped = self._stop.is_set()
            self._finish(actor_pb2.RUN_STATE_FINISHED, "stopped" if stopped else "")
        except errors.ManyhandsError as error:
            logger.error("run %s failed: %s", self.definition.run_id, error)
            self._finish(actor_pb2.RUN_STATE_FAILED, str(error))
        except Exception:
            logger.exception("run %s failed", self.definition.run_id)
            self._finish(actor_pb2.RUN_STATE_FAILED, "a fault of the actor; its log has the traceback")

    def _make_loop(self) -> ControlLoop:
        around, robot = self._around, self._robot
        assert robot is not None
        assert self._link is not None
        policy = None
        if self._policy is not None:
            session = self._policy.session
            queue = ChunkQueue(
                replan_interval_steps=self.definition.replan_interval_steps,
                max_age_s=around.max_action_age_s,
                ticks_per_step=self._policy.ticks_per_step,
            )
            queue.server_interval(session.replan_interval_steps)
            policy = PolicySide(
                stream=self._policy.stream,
                queue=queue,
                required_observations=session.required_observations,
                subtasks=self.subtasks,
                on_subtask=self._on_change,
            )
            self._policy.stream.start()
        if robot.teleoperators:
            assert self._robot_client is not None
            self._operator = OperatorEvents(self._robot_client)
            self._operator.start()
        clock = MonotonicClock()
        speed = around.simulation_speed if robot.simulated else 1.0
        return ControlLoop(
            robot=self._link,
            spec=robot.spec,
            schedule=Schedule(robot.spec.control_rate_hz * speed, clock),
            clock=clock,
            telemetry=around.telemetry,
            policy=policy,
            recorder=around.recorder if self.definition.dataset else None,
            teleoperator=self.definition.teleoperator,
            image_encoding=around.image_encoding,
            stop=self._stop,
            on_hold=self._held,
            operator=self._operator,
        )

    def _run_episodes(self, loop: ControlLoop) -> None:
        assert self._robot is not None
        progress, run = self.progress, self.definition
        discards_in_a_row = 0
        while not self._stop.is_set() and (run.episode_count == 0 or len(progress.results) < run.episode_count):
            episode = Episode(
                number=len(progress.results),
                uuid=str(uuid.uuid4()) if run.dataset else "",
                seed=run.first_seed + progress.attempt_count,
                task=run.task,
                max_steps=run.max_episode_steps,
            )
            try:
                if run.dataset:
                    self._around.recorder.begin(self._meta(episode))
                result = loop.run_episode(episode)
            except RobotLost as error:
                self._cut_short(str(error))
                self._wait_for_robot(str(error))
                continue
            except RerecordWished:
                self._around.recorder.discard("the operator wants it again")
                continue
            except BaseException as error:
                self._cut_short(str(error))
                raise
            discards_in_a_row = 0 if self._conclude(result) else discards_in_a_row + 1
            if discards_in_a_row >= MOST_DISCARDS_IN_A_ROW:
                raise errors.Refused(
                    f"{discards_in_a_row} episodes in a row were no success and discarded; see the task and "
                    f"{run.teleoperator or run.model}, or give more max_episode_steps",
                    field="run.discard_failures",
                )

    def _meta(self, episode: Episode) -> EpisodeMeta:
        assert self._robot is not None
        return EpisodeMeta(
            dataset=self.definition.dataset,
            episode_uuid=episode.uuid,
            robot_id=self._robot.robot_id,
            spec_digest=self._robot.spec.digest.hex(),
            discard_incomplete=self.definition.discard_failures,
        )

    def _conclude(self, result: actor_pb2.EpisodeResult) -> bool:
        """Keeps or discards what was recorded; returns False for an episode that was discarded for its failure."""
        progress, recorder, state_dir = self.progress, self._around.recorder, self._around.state_dir
        if result.reason == dataset_pb2.EPISODE_END_INTERRUPTED:
            if self._discard or self.definition.discard_failures:
                recorder.discard("the run was stopped")
            elif recorder.end(dataset_pb2.EPISODE_END_INTERRUPTED):
                self._around.telemetry.episode(result)
            return True
        if self.definition.discard_failures and not result.success:
            recorder.discard("no success")
            progress.attempt_count += 1
            progress.save(state_dir)
            return False
        # In this order a crash at any point neither counts an episode twice nor forgets one: see RunProgress.
        recorder.flush()
        progress.begin_ending(result)
        progress.save(state_dir)
        recorder.end(result.reason)
        progress.complete_ending()
        progress.save(state_dir)
        self._around.telemetry.episode(result)
        self._on_change()
        return True

    def _cut_short(self, reason: str) -> None:
        """What was seen until now is real; it is kept as interrupted, unless only successes are wanted."""
        try:
            if self.definition.discard_failures or self._discard:
                self._around.recorder.discard(reason)
            else:
                self._around.recorder.end(dataset_pb2.EPISODE_END_INTERRUPTED)
        except errors.ManyhandsError as error:
            logger.error("the episode stays open in the spool until the actor is started again: %s", error)

    def _wait_for_robot(self, reason: str) -> None:
        assert self._link is not None
        assert self._robot is not None
        self._set(actor_pb2.RUN_STATE_HOLDING, reason)
        backoff_s = 0.2
        while not self._stop.wait(backoff_s):
            try:
                found = self._link.describe()
                if found.spec.digest != self._robot.spec.digest or found.robot_id != self._robot.robot_id:
                    raise errors.InvalidInput(
                        f"another robot answers on {self._around.robot_address} now ({found.robot_id}); start a new run",
                        field="robot",
                    )
                self._link.acquire()
                self._set(actor_pb2.RUN_STATE_RUNNING, "")
                return
            except errors.InvalidInput:
                raise
            except errors.ManyhandsError as error:
                self._set(actor_pb2.RUN_STATE_HOLDING, str(error))
                backoff_s = min(backoff_s * 2, LONGEST_BACKOFF_S)

    def _held(self, reason: str) -> None:
        self._set(actor_pb2.RUN_STATE_HOLDING if reason else actor_pb2.RUN_STATE_RUNNING, reason)

    def _finish(self, state: actor_pb2.RunState.ValueType, detail: str) -> None:
        self._close()
        if not self._suspended:
            self.progress.finished = True
            try:
                self.progress.save(self._around.state_dir)
            except OSError as error:
                logger.error("the end of the run could not be noted: %s", error)
        self._set(state, detail)

    def _close(self) -> None:
        """The robot first: it must not wait for a service that does not answer."""
        if self._operator is not None:
            self._operator.close()
            self._operator = None
        if self._link is not None:
            self._link.release()
            self._link = None
        if self._policy is not None:
            self._policy.stream.close()
            self._policy = None
        if self._robot_client is not None:
            self._robot_client.close()
            self._robot_client = None

    def _set(self, state: actor_pb2.RunState.ValueType, detail: str) -> None:
        if (state, detail) != (self.state, self.detail):
            if detail:
                logger.info("run %s: %s: %s", self.definition.run_id, actor_pb2.RunState.Name(state), detail)
            self.state, self.detail = state, detail
            self._on_change()
