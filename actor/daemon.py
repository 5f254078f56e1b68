"""The actor of one robot: one run at a time, one spool for all of them."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from manyhands import errors
from manyhands.actor.v1 import actor_pb2
from manyhands.clients.dataset import DatasetClient
from manyhands.clients.robot import RobotClient
from manyhands.common.v1 import common_pb2
from manyhands.security import SecuritySettings

from .recorder import Recorder
from .run import Run, Surroundings
from .run_state import RunProgress
from .spool import Spool
from .telemetry import Telemetry
from .uploader import Uploader

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ActorOptions:
    """What an actor is started with; see Settings in main.py."""

    robot_address: str
    inference_address: str
    store_address: str
    spool_dir: Path
    spool_limit_bytes: int
    security: SecuritySettings
    image_encoding: common_pb2.ImageEncoding.ValueType
    simulation_speed: float
    max_action_age_s: float
    chunk_deadline_s: float


class Actor:
    """Everything here blocks; the service calls it from worker threads."""

    def __init__(self, options: ActorOptions) -> None:
        """Takes the spool over, mends what a crash left in it, and begins to bring it to the store."""
        self._options = options
        self.telemetry = Telemetry()
        self._lock = threading.Lock()
        self._run: Run | None = None
        self._robot_id = ""
        self._spool = Spool(options.spool_dir, limit_bytes=options.spool_limit_bytes)
        progress = RunProgress.load(options.spool_dir)
        self._spool.recover(progress.decided_ends() if progress is not None else {})
        self._recorder = Recorder(self._spool)
        if progress is not None:
            progress.complete_ending()
            progress.save(options.spool_dir)
            self._run = Run.from_before(progress, self._surroundings(), on_change=self._publish_status)
            self.telemetry.begin_run(progress.results)
        self._uploader: Uploader | None = None
        if options.store_address:
            store = DatasetClient(options.store_address, security_settings=options.security)
            self._uploader = Uploader(self._spool, store, on_change=self._publish_status)
            self._uploader.start()
        self._publish_status()

    def start_run(self, definition: actor_pb2.RunDefinition) -> str:
        """Shakes hands and starts; returns the run's id.

        Raises:
            Refused: A run is in progress, or robot, store or model are not there or refuse; nothing has moved.
            InvalidInput: The run cannot be, or something does not fit; the message names the field.
        """
        with self._lock:
            if self._run is not None:
                if definition.run_id and definition.run_id == self._run.definition.run_id:
                    return definition.run_id
                if not self._run.is_over:
                    raise errors.Refused(
                        f"run {self._run.definition.run_id} is in progress; stop it or wait for its end", field="run"
                    )
                self._run.join(timeout_s=10.0)
            wanted = actor_pb2.RunDefinition()
            wanted.CopyFrom(definition)
            wanted.run_id = wanted.run_id or uuid.uuid4().hex
            self.telemetry.begin_run()
            self._run = Run(RunProgress(definition=wanted), self._surroundings(), on_change=self._publish_status)
            try:
                self._run.prepare()
            except errors.InvalidInput:
                raise
            except errors.ManyhandsError as error:
                raise errors.Refused(str(error), field=error.field) from error
            self._run.start()
            return wanted.run_id

    def resume_run(self) -> bool:
        """Goes on with the run that an earlier process did not end; False when there is none."""
        with self._lock:
            if self._run is None or self._run.progress.finished:
                return False
            progress = self._run.progress
            self._run = Run(progress, self._surroundings(), on_change=self._publish_status)
            logger.info("run %s goes on after %d episodes", progress.definition.run_id, len(progress.results))
            self._run.resume()
            self._publish_status()
        return True

    def stop_run(self, run_id: str, *, discard_episode: bool) -> None:
        """Ends the run after its present tick and waits for that. An id of another run is InvalidInput."""
        run = self._run
        if run is None or run.is_over:
            return
        if run_id and run_id != run.definition.run_id:
            raise errors.InvalidInput(f"{run_id!r} is not the run in progress, {run.definition.run_id!r}", field="run_id")
        run.stop(discard_episode=discard_episode)
        if not run.join(timeout_s=10.0):
            raise errors.TooLate("the run did not end within 10 s; the robot may be resetting. Ask again")

    def status(self) -> actor_pb2.GetStatusResponse:
        """Counts are of the present or last run."""
        run = self._run
        options = self._options
        status = actor_pb2.GetStatusResponse(
            robot_id=self._robot_id,
            state=run.state if run is not None else actor_pb2.RUN_STATE_IDLE,
            detail=self._detail(),
            spooled_frame_count=self._spool.unacked_frame_count,
            robot_address=options.robot_address,
            inference_address=options.inference_address,
            store_address=options.store_address,
        )
        if run is not None:
            status.run.CopyFrom(run.definition)
            status.finished_episode_count = len(run.progress.results)
            status.success_count = run.progress.success_count
            status.subtask = run.subtasks.subtask.text
            status.subtask_count = run.subtasks.num_taken
            status.refused_subtask_count = run.subtasks.subtask.num_refused
        return status

    def learn_robot_id(self) -> None:
        """Asks the robot for its name once it is there; does nothing when it is known."""
        if not self._robot_id:
            try:
                with RobotClient(self._options.robot_address, security_settings=self._options.security) as robot:
                    self._robot_id = robot.describe().robot_id
            except errors.ManyhandsError as error:
                logger.debug("robot not there yet: %s", error)
                return
            self._publish_status()

    def shut_down(self, flush_s: float) -> None:
        """Ends a run after its tick, the robot holds, and the spool gets some time to reach the store."""
        give_up_s = time.monotonic() + flush_s
        if self._run is not None and not self._run.is_over:
            self._run.suspend()
            self._run.join(timeout_s=max(1.0, flush_s))
        self._recorder.close()
        if self._uploader is not None:
            if not self._spool.wait_until_empty(max(0.2, give_up_s - time.monotonic())):
                logger.warning("%d frames stay in the spool until the next start", self._spool.unacked_frame_count)
            self._uploader.close()
        self._spool.close()

    def _detail(self) -> str:
        parts = [self._run.detail if self._run is not None else "", self._uploader.detail if self._uploader else ""]
        return "; ".join(part for part in parts if part)

    def _publish_status(self) -> None:
        self.telemetry.status(self.status())

    def _surroundings(self) -> Surroundings:
        options = self._options
        return Surroundings(
            robot_address=options.robot_address,
            inference_address=options.inference_address,
            store_address=options.store_address,
            security=options.security,
            recorder=self._recorder,
            telemetry=self.telemetry,
            state_dir=options.spool_dir,
            image_encoding=options.image_encoding,
            simulation_speed=options.simulation_speed,
            max_action_age_s=options.max_action_age_s,
            chunk_deadline_s=options.chunk_deadline_s,
        )
