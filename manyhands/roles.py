"""Who may call what: four roles, and the closed table of RPCs that more than an operator may call.

An RPC that is not in the table is for operators only, so a new one starts closed. Reasons are beside each line's group;
the protos say the same in prose ("Needs the learner role").
"""

from __future__ import annotations

import contextvars
import enum
from dataclasses import dataclass

from .errors import NotAllowed


class Role(enum.Enum):
    ROBOT = "robot"  # A robot agent or its actor.
    LEARNER = "learner"
    OPERATOR = "operator"  # A person (or the demo) who runs the fleet: may call everything.
    VIEWER = "viewer"  # Looks, moves nothing; services look at each other as viewers.


@dataclass(frozen=True, kw_only=True)
class Identity:
    """role and name as a certificate or a token says; name is unique within a role."""

    role: Role
    name: str

    def __str__(self) -> str:
        return f"{self.role.value}/{self.name}"


# Plain loopback: whoever can reach the port has an account on this machine.
LOOPBACK_IDENTITY = Identity(role=Role.OPERATOR, name="loopback")

_EVERYONE = frozenset(Role)
_ROBOT = frozenset({Role.ROBOT, Role.OPERATOR})
_LEARNER = frozenset({Role.LEARNER, Role.OPERATOR})
_OPERATOR = frozenset({Role.OPERATOR})

ROLES_BY_METHOD: dict[str, frozenset[Role]] = {
    # Looking is for everyone, and so is stopping: a stop that needs a permission comes too late.
    "/manyhands.robot.v1.RobotService/Describe": _EVERYONE,
    "/manyhands.robot.v1.RobotService/GetObservation": _EVERYONE,
    "/manyhands.robot.v1.RobotService/Observe": _EVERYONE,
    "/manyhands.robot.v1.RobotService/WatchTeleopEvents": _EVERYONE,
    "/manyhands.robot.v1.RobotService/Hold": _EVERYONE,
    "/manyhands.robot.v1.RobotService/EmergencyStop": _EVERYONE,
    # Moving is for the robot's own actor.
    "/manyhands.robot.v1.RobotService/AcquireControl": _ROBOT,
    "/manyhands.robot.v1.RobotService/ReleaseControl": _ROBOT,
    "/manyhands.robot.v1.RobotService/Reset": _ROBOT,
    "/manyhands.robot.v1.RobotService/Command": _ROBOT,
    # StartRun and StopRun of actors are the operator's.
    "/manyhands.actor.v1.ActorService/GetStatus": _EVERYONE,
    "/manyhands.actor.v1.ActorService/Watch": _EVERYONE,
    # Sessions cost GPU time: robots only. SwapWeights is the operator's.
    "/manyhands.inference.v1.InferenceService/OpenSession": _ROBOT,
    "/manyhands.inference.v1.InferenceService/Act": _ROBOT,
    "/manyhands.inference.v1.InferenceService/Generate": _ROBOT,
    "/manyhands.inference.v1.InferenceService/CloseSession": _ROBOT,
    "/manyhands.inference.v1.InferenceService/ListModels": _EVERYONE,
    "/manyhands.inference.v1.InferenceService/GetStatus": _EVERYONE,
    # What is published here moves robots: learners only.
    "/manyhands.weights.v1.WeightsService/FindMissing": _LEARNER,
    "/manyhands.weights.v1.WeightsService/Publish": _LEARNER,
    "/manyhands.weights.v1.WeightsService/Watch": _EVERYONE,
    "/manyhands.weights.v1.WeightsService/Fetch": _EVERYONE,
    "/manyhands.weights.v1.WeightsService/GetManifest": _EVERYONE,
    "/manyhands.weights.v1.WeightsService/ListVersions": _EVERYONE,
    "/manyhands.transitions.v1.TransitionService/Append": _ROBOT,
    # Robots write episodes, everyone reads them.
    "/manyhands.dataset.v1.DatasetService/CreateDataset": _ROBOT,
    "/manyhands.dataset.v1.DatasetService/AppendEpisode": _ROBOT,
    "/manyhands.dataset.v1.DatasetService/Publish": _ROBOT | _LEARNER,
    "/manyhands.dataset.v1.DatasetService/ListDatasets": _EVERYONE,
    "/manyhands.dataset.v1.DatasetService/GetDataset": _EVERYONE,
    "/manyhands.dataset.v1.DatasetService/ListEpisodes": _EVERYONE,
    "/manyhands.dataset.v1.DatasetService/GetSnapshot": _EVERYONE,
    "/manyhands.dataset.v1.DatasetService/ReadShard": _EVERYONE,
    "/manyhands.dataset.v1.DatasetService/Sample": _EVERYONE,
    # StartRun and StopRun of learners are the operator's.
    "/manyhands.learner.v1.LearnerService/GetStatus": _EVERYONE,
    "/manyhands.learner.v1.LearnerService/WatchProgress": _EVERYONE,
}
_STANDARD_SERVICES = ("/grpc.health.v1.Health/", "/grpc.reflection.v1alpha.ServerReflection/")


def roles_for(method: str) -> frozenset[Role]:
    """Roles that may call method ("/package.Service/Rpc")."""
    if method.startswith(_STANDARD_SERVICES):
        return _EVERYONE
    return ROLES_BY_METHOD.get(method, _OPERATOR)


def check_allowed(identity: Identity, method: str) -> None:
    """Raises NotAllowed, naming method, caller and the roles that would do."""
    roles = roles_for(method)
    if identity.role not in roles:
        needed = " or ".join(role.value for role in Role if role in roles)
        raise NotAllowed(
            f"{method} needs the role {needed}; {identity} called. Use a certificate or token of that role "
            "('manyhands lab-certificates' makes them)"
        )


_caller: contextvars.ContextVar[Identity] = contextvars.ContextVar("manyhands_caller", default=LOOPBACK_IDENTITY)


def caller() -> Identity:
    """Who made the call that is being served; LOOPBACK_IDENTITY on plain loopback and outside of calls."""
    return _caller.get()


def set_caller(identity: Identity) -> contextvars.Token[Identity]:
    return _caller.set(identity)
