"""What a command may ask of the robot, element by element. Pure.

Shapes: N elements of the action, over all its features, in the order of the spec.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .robot import CommandKind, ElementLimit, Vector


class Limiter:
    """Bends commands into an element's range, step, velocity and torque limits.

    The step is measured twice. From the last executed command it never exceeds max_step, whatever else holds. From where the
    robot is, a POSITION element may be at most max_step ahead; one that was pushed farther away comes back step by step.
    """

    def __init__(self, elements: Sequence[ElementLimit], control_rate_hz: float) -> None:
        self.names = tuple(element.name for element in elements)
        self._low = np.array([element.low for element in elements])
        self._high = np.array([element.high for element in elements])
        self._positional = np.array([element.kind is CommandKind.POSITION for element in elements])
        velocity = np.array([element.max_velocity for element in elements])
        step = np.array([element.max_step for element in elements])
        self.max_step: Vector = np.where(self._positional, np.minimum(step, velocity / control_rate_hz), step)
        # The velocity limit of a VELOCITY element is one of range.
        self._low = np.where(self._positional, self._low, np.maximum(self._low, -velocity))
        self._high = np.where(self._positional, self._high, np.minimum(self._high, velocity))
        self._max_torque = np.array([element.max_torque for element in elements])

    def limit(self, wanted: Vector, last: Vector, measured: Vector, torques: Vector | None) -> Vector:
        """All (N,). wanted is finite; measured is the robot's hold action; torques None where there is no sensor."""
        action = np.clip(wanted, self._low, self._high)
        if torques is not None:
            # A torque that cannot be read counts as too much: comparing a NaN is False.
            free = np.abs(torques) < self._max_torque
            action = np.where(self._positional & ~(free | np.isinf(self._max_torque)), measured, action)
        ahead = np.where(self._positional, np.clip(action, measured - self.max_step, measured + self.max_step), action)
        return np.clip(ahead, last - self.max_step, last + self.max_step)

    def changed(self, wanted: Vector, executed: Vector) -> list[str]:
        """Names of the elements that differ by more than float32 rounding."""
        tolerance = 1e-6 * np.maximum(1.0, np.abs(wanted))
        return [name for name, different in zip(self.names, np.abs(wanted - executed) > tolerance, strict=True) if different]
