"""When the next unit is decided, by what the device still has before it."""

from __future__ import annotations

import time

import pytest
import torch

from services.inference.launches import DeviceLine, timed


def test_a_free_device_is_not_kept_waiting() -> None:
    line = DeviceLine(lead_s=0.001, max_ahead=3)
    assert line.patience_s(5.0) == 0.0
    assert line.free_s(5.0) == 5.0


def test_the_next_unit_is_decided_shortly_before_the_device_is_free() -> None:
    line = DeviceLine(lead_s=0.001, max_ahead=3)
    line.add(0.010, 5.0)
    assert line.free_s(5.002) == pytest.approx(5.010)
    assert line.patience_s(5.002) == pytest.approx(0.007)
    assert line.patience_s(5.0095) == 0.0
    line.add(0.004, 5.0095)  # Behind the one that runs.
    assert line.free_s(5.0095) == pytest.approx(5.014)


def test_what_was_expected_wrongly_is_put_right_when_a_unit_is_done() -> None:
    line = DeviceLine(lead_s=0.001, max_ahead=3)
    line.add(0.010, 5.0)
    line.add(0.004, 5.0)
    line.done(5.020)  # Twice as long as expected.
    assert line.free_s(5.020) == pytest.approx(5.024)
    line.done(5.021)
    assert not line
    assert line.free_s(5.5) == 5.5


def test_a_device_gets_no_more_ahead_than_it_may_have() -> None:
    line = DeviceLine(lead_s=1.0, max_ahead=2)
    line.add(0.010, 5.0)
    assert line.patience_s(5.0) == 0.0
    line.add(0.010, 5.0)
    assert line.patience_s(5.0) is None
    line.done(5.010)
    assert line.patience_s(5.010) == 0.0


def test_work_on_the_cpu_is_done_when_it_was_launched() -> None:
    took_s = timed(torch.device("cpu"), lambda: time.sleep(0.02))()
    assert 0.02 <= took_s < 1.0
