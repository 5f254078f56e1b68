"""Everything that must agree before a robot moves: robot, teleoperator, dataset, model. A refusal names the field."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from manyhands import errors
from manyhands.actor.v1 import actor_pb2
from manyhands.clients.dataset import DatasetClient
from manyhands.clients.inference import InferenceClient, Session
from manyhands.clients.robot import RobotDescription
from manyhands.spec import Feature, Spec

from .inference_stream import InferenceStream, SessionPlan
from .interpolation import ticks_per_step

DATASET_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
# Fresh for every process, so that the service can tell a second actor with our robot's name from us.
CLIENT_ID = uuid.uuid4().hex


@dataclass(frozen=True, kw_only=True)
class PolicyAgreement:
    """An open session, not yet streaming."""

    stream: InferenceStream
    session: Session
    ticks_per_step: int


def check_definition(run: actor_pb2.RunDefinition) -> None:
    """Raises InvalidInput for a run that cannot be, whoever is connected."""
    if run.mode not in (actor_pb2.RUN_MODE_TELEOPERATE, actor_pb2.RUN_MODE_POLICY):
        raise errors.InvalidInput("must be TELEOPERATE or POLICY", field="run.mode")
    if run.max_episode_steps <= 0:
        raise errors.InvalidInput(f"({run.max_episode_steps}) must be > 0", field="run.max_episode_steps")
    if run.episode_count < 0:
        raise errors.InvalidInput(f"({run.episode_count}) must be >= 0; 0 means until stopped", field="run.episode_count")
    if run.mode == actor_pb2.RUN_MODE_TELEOPERATE and not run.teleoperator:
        raise errors.InvalidInput("a teleoperated run must say who operates", field="run.teleoperator")
    if run.mode == actor_pb2.RUN_MODE_POLICY:
        if not run.model:
            raise errors.InvalidInput("a run with a policy must name a model that is served", field="run.model")
        if run.replan_interval_steps <= 0:
            raise errors.InvalidInput(f"({run.replan_interval_steps}) must be > 0", field="run.replan_interval_steps")
        if run.subtask_every_chunks < 0:
            raise errors.InvalidInput(
                f"({run.subtask_every_chunks}) must be >= 0; 0 means that the task is acted on",
                field="run.subtask_every_chunks",
            )
    if run.dataset and not DATASET_NAME.fullmatch(run.dataset):
        raise errors.InvalidInput(f"{run.dataset!r} must match {DATASET_NAME.pattern}", field="run.dataset")


def check_robot(run: actor_pb2.RunDefinition, robot: RobotDescription) -> None:
    """The robot has what the run names."""
    if run.teleoperator and run.teleoperator not in robot.teleoperators:
        known = ", ".join(robot.teleoperators) or "none"
        raise errors.InvalidInput(
            f"{run.teleoperator!r} is not attached to {robot.robot_id}; it has: {known}", field="run.teleoperator"
        )
    if run.task and robot.tasks and run.task not in robot.tasks:
        raise errors.InvalidInput(
            f"{run.task!r} is not a task of {robot.robot_id}; it has: {'; '.join(robot.tasks)}", field="run.task"
        )


def agree_with_dataset(name: str, spec: Spec, client: DatasetClient) -> None:
    """Makes the dataset, or checks that an old one has the robot's spec.

    Raises:
        InvalidInput: Names the first feature that differs.
    """
    try:
        info = client.get_dataset(name)
    except errors.NotFound:
        try:
            client.create_dataset(name, spec)
            return
        except errors.AlreadyExists:  # Another robot was faster.
            info = client.get_dataset(name)
    recorded = Spec.from_proto(info.definition.spec)
    if recorded.digest != spec.digest:
        field, difference = first_difference(spec, recorded)
        raise errors.InvalidInput(
            f"differs from dataset {name!r}: {difference}; record this robot into a dataset of its own", field=field
        )


def agree_with_model(
    run: actor_pb2.RunDefinition, robot: RobotDescription, client: InferenceClient, *, deadline_s: float
) -> PolicyAgreement:
    """Opens the session. Raises what the service refuses with; InvalidInput names the feature that does not fit."""
    plan = SessionPlan(
        robot_id=robot.robot_id,
        client_id=CLIENT_ID,
        model=run.model,
        spec=robot.spec,
        replan_interval_steps=run.replan_interval_steps,
    )
    stream = InferenceStream(client, plan, deadline_s=deadline_s)
    try:
        session = stream.handshake()
        factor = ticks_per_step(robot.spec.control_rate_hz, session.model_spec.control_rate_hz)
        if run.replan_interval_steps > session.chunk_horizon * factor:
            raise errors.InvalidInput(
                f"({run.replan_interval_steps}) is over the {session.chunk_horizon * factor} actions of a chunk of "
                f"{run.model!r}",
                field="run.replan_interval_steps",
            )
        if run.subtask_every_chunks and not session.has_text_head:
            raise errors.InvalidInput(
                f"({run.subtask_every_chunks}) needs a model with a text head, and {run.model!r} has none; leave it 0 or "
                "name another model",
                field="run.subtask_every_chunks",
            )
        known = [feature.name for feature in robot.spec.observation]
        for name in session.required_observations:
            if name not in known:
                raise errors.InvalidInput(f"is required by {run.model!r}; the robot observes {', '.join(known)}", field=name)
    except BaseException:
        stream.close()
        raise
    return PolicyAgreement(stream=stream, session=session, ticks_per_step=factor)


def first_difference(robot: Spec, other: Spec) -> tuple[str, str]:
    """(field, what differs) between two specs with different digests, seen from the robot."""
    if robot.control_rate_hz != other.control_rate_hz:
        return "spec.control_rate_hz", f"{robot.control_rate_hz:g} Hz against {other.control_rate_hz:g} Hz"
    for side in ("observation", "action"):
        mine: tuple[Feature, ...] = getattr(robot, side)
        theirs: tuple[Feature, ...] = getattr(other, side)
        names, other_names = [f.name for f in mine], [f.name for f in theirs]
        for feature in mine:
            if feature.name not in other_names:
                return feature.name, f"the robot has it, the other has {', '.join(other_names)}"
        for feature in theirs:
            if feature.name not in names:
                return feature.name, f"is missing; the robot has {', '.join(names)}"
        for ours, its in zip(mine, theirs, strict=True):
            if ours.name != its.name:
                return ours.name, f"order {', '.join(names)} against {', '.join(other_names)}"
            aspects: dict[str, Callable[[Feature], object]] = {
                "shape": lambda f: f.shape,
                "dtype": lambda f: f.dtype,
                "kind": lambda f: f.kind.name,
                "element names": lambda f: f.element_names,
                "units": lambda f: f.element_units,
            }
            for label, read in aspects.items():
                if read(ours) != read(its):
                    return ours.name, f"{label} {read(ours)} against {read(its)}"
    return "spec", "digests differ"
