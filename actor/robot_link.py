"""The robot as the control loop sees it: a lease that is taken again when it ran out, and only two ways to fail.

The agent has the last word on every command (rule 1); this side never repeats one that may have been executed.
"""

from __future__ import annotations

import uuid

from manyhands import errors
from manyhands.clients.robot import Authority, CommandResult, RobotClient, RobotDescription, RobotMode, RobotObservation
from manyhands.common.v1 import common_pb2
from manyhands.robot.types import Arrays

# The agent holds this long after our last command at the latest, and a restarted actor can take over.
LEASE_TTL_S = 1.5


class RobotLost(errors.Unreachable):
    """No answer from the agent, or it forgot the episode: the episode in progress cannot go on."""


class CommandRefused(errors.Refused):
    """The agent did not execute the command; the robot holds. The message says why."""


class RobotStopped(errors.Refused):
    """Emergency stop: the run is over, somebody must look."""


class RobotLink:
    """One run's authority over one robot.

    Args:
        client: Of the agent; belongs to the caller.
        holder: Name of the lease.
        authority: POLICY or HUMAN.
    """

    def __init__(self, client: RobotClient, *, holder: str, authority: Authority) -> None:
        self._client = client
        self._holder = holder
        self._authority = authority
        # One for the life of the link: asking again answers the live lease, or a new one where it ran out.
        self._request_id = uuid.uuid4().hex

    def describe(self) -> RobotDescription:
        return self._client.describe()

    def acquire(self) -> None:
        """Takes the lease. Refused names another holder or an emergency stop."""
        self._client.acquire(self._holder, self._authority, ttl_s=LEASE_TTL_S, request_id=self._request_id)

    def release(self) -> None:
        """Gives the lease back; the robot holds. Never raises: an agent that does not hear it lets the lease run out."""
        try:
            self._client.release()
        except errors.ManyhandsError:
            pass

    def reset(self, seed: int, task: str) -> RobotObservation:
        """Start of an episode. Raises RobotLost, RobotStopped, or Refused when another one holds the lease."""
        try:
            # The lease may have run out between two episodes; asking anew is cheap and tells who else has it.
            self.acquire()
            return self._client.reset(seed, task)
        except (errors.Unreachable, errors.TooLate) as error:
            raise RobotLost(f"robot agent on {self._client.address}: {error}") from None
        except errors.Refused:
            self._raise_if_stopped()
            raise

    def observe(
        self, *, include_images: bool, teleoperator: str, image_encoding: common_pb2.ImageEncoding.ValueType
    ) -> RobotObservation:
        """The newest observation. Raises RobotLost or RobotStopped."""
        try:
            observation = self._client.get_observation(
                include_images=include_images, teleoperator=teleoperator, image_encoding=image_encoding
            )
        except (errors.Unreachable, errors.TooLate) as error:
            raise RobotLost(f"robot agent on {self._client.address}: {error}") from None
        if observation.status is not None and observation.status.mode is RobotMode.EMERGENCY_STOP:
            raise RobotStopped("the robot is in emergency stop; see why, clear it at the robot and start the run again")
        return observation

    def command(self, action: Arrays, *, age_s: float, version: common_pb2.PolicyVersion | None) -> CommandResult:
        """One action. Raises RobotLost, RobotStopped or CommandRefused.

        A lease that ran out during a hold is taken again, once: the refused command was not executed, and the new epoch
        counts its commands anew.
        """
        try:
            try:
                return self._client.command(action, age_s=age_s, version=version)
            except errors.Refused as error:
                if error.field not in ("", "epoch"):
                    raise
                self.acquire()
                return self._client.command(action, age_s=age_s, version=version)
        except (errors.Unreachable, errors.TooLate) as error:
            raise RobotLost(f"robot agent on {self._client.address}: {error}") from None
        except (errors.Refused, errors.InvalidInput) as error:
            self._raise_if_stopped()
            raise CommandRefused(str(error), field=error.field) from None

    def hold(self, reason: str) -> None:
        """Holds the present position. Never raises: without commands the agent's watchdog does the same."""
        try:
            self._client.hold(reason)
        except errors.ManyhandsError:
            pass

    def _raise_if_stopped(self) -> None:
        try:
            mode = self._client.describe().status.mode
        except errors.ManyhandsError:
            return
        if mode is RobotMode.EMERGENCY_STOP:
            raise RobotStopped("the robot is in emergency stop; see why, clear it at the robot and start the run again")
