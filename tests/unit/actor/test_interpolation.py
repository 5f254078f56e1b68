from __future__ import annotations

import numpy as np
import pytest

from actor.interpolation import interpolate, ticks_per_step
from manyhands.errors import InvalidInput


def test_steps_are_kept_and_ticks_between_lie_on_the_line() -> None:
    steps = np.array([[0.0, 10.0], [3.0, 4.0], [3.0, 4.0]], dtype=np.float32)
    ticks = interpolate(steps, 3)
    assert ticks.dtype == np.float32
    np.testing.assert_allclose(ticks[:4], [[0, 10], [1, 8], [2, 6], [3, 4]], rtol=1e-6)
    assert len(ticks) == 7, "nothing is made up beyond the last step"
    np.testing.assert_array_equal(ticks[::3], steps)


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_at_the_models_own_rate_nothing_changes(steps: int) -> None:
    rows = np.random.default_rng(0).normal(size=(steps, 2)).astype(np.float32)
    assert interpolate(rows, 1) is rows


def test_a_single_step_stays_a_single_tick() -> None:
    assert len(interpolate(np.ones((1, 2), np.float32), 4)) == 1


def test_rates_that_divide() -> None:
    assert ticks_per_step(30.0, 30.0) == 1
    assert ticks_per_step(100.0, 20.0) == 5
    assert ticks_per_step(29.97, 9.99) == 3


@pytest.mark.parametrize(("robot_hz", "model_hz"), [(30.0, 20.0), (10.0, 30.0), (100.0, 33.0)])
def test_rates_that_do_not_divide_are_refused_by_name(robot_hz: float, model_hz: float) -> None:
    with pytest.raises(InvalidInput, match=rf"{robot_hz:g} Hz .* {model_hz:g} Hz") as caught:
        ticks_per_step(robot_hz, model_hz)
    assert caught.value.field == "spec.control_rate_hz"
