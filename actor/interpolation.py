"""Chunks of a slow model on a faster robot: actions in between are points on the straight line from one step to the next."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from manyhands.errors import InvalidInput


def ticks_per_step(robot_rate_hz: float, model_rate_hz: float) -> int:
    """Control periods of the robot in one step of the model, at least 1.

    Raises:
        InvalidInput: The robot's rate is not a whole multiple of the model's: steps would fall between ticks.
    """
    ratio = robot_rate_hz / model_rate_hz
    whole = round(ratio)
    if whole < 1 or abs(ratio - whole) > 1e-6 * ratio:
        raise InvalidInput(
            f"the robot's {robot_rate_hz:g} Hz is not a whole multiple of the model's {model_rate_hz:g} Hz; "
            "run the robot at such a rate or serve a model trained at the robot's",
            field="spec.control_rate_hz",
        )
    return whole


def interpolate(steps: npt.NDArray[np.float32], factor: int) -> npt.NDArray[np.float32]:
    """Linear interpolation of position vectors.

    Args:
        steps: (S, R) float32, one row per step of the model.
        factor: Ticks per step, >= 1.

    Returns:
        ((S - 1) * factor + 1, R) float32. Row i * factor is steps[i] exactly; nothing is made up beyond the last step.
    """
    if factor == 1 or len(steps) < 2:
        return steps
    weights = (np.arange(factor, dtype=np.float32) / np.float32(factor))[None, :, None]
    start, end = steps[:-1, None, :], steps[1:, None, :]
    between = (start + weights * (end - start)).reshape(-1, steps.shape[1])
    return np.concatenate([between, steps[-1:]]).astype(np.float32, copy=False)
