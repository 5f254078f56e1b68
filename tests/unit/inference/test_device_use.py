"""What a device did is added up by model and kind, and what was lost between units beside it."""

from __future__ import annotations

import pytest

from services.inference.device_use import LONGEST_GAP_S, DeviceTime, DeviceUse, UnitUse
from services.inference.units import UnitKind

PREFIX, EXPERT = ("arm", UnitKind.PREFIX), ("arm", UnitKind.EXPERT)


def test_units_are_added_up_by_model_and_kind() -> None:
    use = DeviceUse([PREFIX, EXPERT, ("hand", UnitKind.PREFIX)])
    assert set(use.so_far().units.values()) == {UnitUse()}, "all are there from the start"
    use.add(*PREFIX, num_rows=2, device_s=0.015, gap_s=0.0)
    use.add(*EXPERT, num_rows=3, device_s=0.001, gap_s=0.00025)
    use.add(*PREFIX, num_rows=1, device_s=0.008, gap_s=0.0005)
    use.add("hand", UnitKind.PREFIX, num_rows=1, device_s=0.004, gap_s=0.0)
    found = use.so_far()
    assert found.units[PREFIX] == UnitUse(device_s=pytest.approx(0.023), num_units=2, num_rows=3)
    assert found.units[EXPERT] == UnitUse(device_s=0.001, num_units=1, num_rows=3)
    assert found.units["hand", UnitKind.PREFIX] == UnitUse(device_s=0.004, num_units=1, num_rows=1)
    assert found.gap_s == pytest.approx(0.00075)


def test_a_device_without_work_is_none_that_waits() -> None:
    use = DeviceUse([PREFIX])
    for gap_s in (LONGEST_GAP_S, 0.040, 3600.0):
        use.add(*PREFIX, num_rows=1, device_s=0.008, gap_s=gap_s)
    use.add(*PREFIX, num_rows=1, device_s=0.008, gap_s=0.9 * LONGEST_GAP_S)
    assert use.so_far().gap_s == pytest.approx(0.9 * LONGEST_GAP_S)
    assert use.so_far().units[PREFIX].num_units == 4


def test_what_was_read_stays_and_what_came_since_is_told_apart() -> None:
    use = DeviceUse([PREFIX, EXPERT])
    use.add(*PREFIX, num_rows=2, device_s=0.25, gap_s=0.001)
    before = use.so_far()
    use.add(*PREFIX, num_rows=4, device_s=0.5, gap_s=0.002)
    assert before.units[PREFIX] == UnitUse(device_s=0.25, num_units=1, num_rows=2)
    since = use.so_far().since(before)
    assert since.units == {PREFIX: UnitUse(device_s=0.5, num_units=1, num_rows=4), EXPERT: UnitUse()}
    assert since.gap_s == pytest.approx(0.002)
    assert before.since(DeviceTime()) == before, "an engine begins with nothing"


@pytest.mark.parametrize("less", [{"device_s": 0.5}, {"num_units": 1}, {"num_rows": 1}])
def test_nothing_becomes_less(less: dict[str, float]) -> None:
    whole = {"device_s": 1.0, "num_units": 2, "num_rows": 2}
    before = DeviceTime(units={PREFIX: UnitUse(**whole)}, gap_s=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="less"):
        DeviceTime(units={PREFIX: UnitUse(**(whole | less))}, gap_s=0.5).since(before)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="less"):
        DeviceTime(units=before.units, gap_s=0.4).since(before)


def test_a_gap_that_a_clock_says_was_negative_takes_nothing_away() -> None:
    use = DeviceUse([("m", UnitKind.TEXT)])
    use.add("m", UnitKind.TEXT, num_rows=1, device_s=0.001, gap_s=0.0004)
    before = use.so_far()
    use.add("m", UnitKind.TEXT, num_rows=1, device_s=0.001, gap_s=-1e-7)
    assert use.so_far().since(before).gap_s == 0.0
