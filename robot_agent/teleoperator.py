"""Sources of human or scripted actions attached to a robot: leader arms, gamepads, pedals, experts."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import TYPE_CHECKING

from manyhands.robot.types import TeleopEventKind

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .robot import Readings


class Teleoperator(abc.ABC):
    """Called from the agent's robot thread only, so it must not block: read devices in a thread of its own.

    Only action() is needed; a device without pedals or files to open leaves the rest.
    """

    def connect(self) -> None:  # noqa: B027
        """Opens the device. Raises Refused when it is missing: an agent never starts without a configured device."""

    @abc.abstractmethod
    def action(self, readings: Readings) -> Mapping[str, npt.NDArray[np.generic]]:
        """What the person (or script) would do now: arrays by action feature, inside the robot's bounds."""

    @property
    def intervening(self) -> bool:
        """The person wants, or has, the authority: a pedal is down, the leader arm is gripped."""
        return False

    def events(self) -> list[TeleopEventKind]:
        """What happened since the last call, oldest first."""
        return []

    def begin_episode(self, seed: int) -> None:  # noqa: B027
        """After every reset; scripts start over here."""

    def disconnect(self) -> None:  # noqa: B027
        """Closes the device; safe to call twice."""
