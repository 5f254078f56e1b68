"""When the next unit is decided, by what the device still has before it."""

from __future__ import annotations

import time

import pytest
import torch

from services.inference.launches import DeviceLine, gap_s, timed
from tests.support.unit_lab import FakeGpu


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


def test_a_unit_that_was_launched_late_began_late_however_early_the_one_before_it_ended() -> None:
    line = DeviceLine(lead_s=0.001, max_ahead=3)
    line.add(0.008, 5.0)
    line.add(0.008, 5.012)  # The host was late.
    line.done(5.008)  # Noticed only now.
    assert line.free_s(5.012) == pytest.approx(5.020)


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


def test_events_say_what_took_a_gpu_how_long_and_how_long_it_stood_still(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    first = timed(torch.device("cuda"), lambda: gpu.runs(0.008))
    gpu.stands_still(0.0004)
    second = timed(torch.device("cuda"), lambda: gpu.runs(0.001))
    third = timed(torch.device("cuda"), lambda: gpu.runs(0.002))
    assert gpu.waited == []
    assert (first(), second(), third()) == pytest.approx((0.008, 0.001, 0.002))
    assert gpu.waited == pytest.approx([0.008, 0.0094, 0.0114]), "until each was done, and no longer"
    assert gap_s(first, second) == pytest.approx(0.0004)
    assert gap_s(second, third) == pytest.approx(0.0)


def test_no_gap_is_known_before_the_first_unit_nor_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    on_cpu = timed(torch.device("cpu"), lambda: None)
    on_gpu = timed(torch.device("cuda"), lambda: gpu.runs(0.008))
    assert [gap_s(before, after) for before, after in ((None, on_gpu), (on_cpu, on_gpu), (on_cpu, on_cpu))] == [None] * 3


def test_what_a_gpu_began_before_it_was_launched_whole_counts_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    began = torch.cuda.Event(enable_timing=True)
    began.record(None)
    gpu.runs(0.002)

    def launch() -> torch.cuda.Event:
        gpu.runs(0.006)
        return began

    assert timed(torch.device("cuda"), launch)() == pytest.approx(0.008)
