"""What the serving benchmark says of the device during a load, from two readings of the server's metrics page."""

from __future__ import annotations

import prometheus_client
import pytest

from services.inference import operator_metrics
from services.inference.device_use import DeviceTime, UnitUse
from services.inference.units import UnitKind
from tests.benchmarks.serving import device


def page_after(gap_s: float, **uses: tuple[float, int, int]) -> device.Totals:
    units = {
        ("benchmark-test-arm", UnitKind(kind)): UnitUse(device_s=device_s, num_units=num_units, num_rows=num_rows)
        for kind, (device_s, num_units, num_rows) in uses.items()
    }
    operator_metrics.device_did(DeviceTime(units=units, gap_s=gap_s), "benchmark-test")
    return device.totals(prometheus_client.generate_latest().decode())


def test_a_load_is_told_by_what_came_since_its_beginning() -> None:
    before = page_after(7.0, prefix=(3.0, 5, 9), expert=(1.0, 5, 5), text=(1.0, 1, 1))
    after = page_after(0.124, prefix=(2.448, 212, 318), expert=(0.84, 800, 2000), text=(0.0, 0, 0))
    found = device.between(before, after, 4.0)
    assert found["kinds"].keys() == {"prefix", "expert"}, "only what ran"
    assert found["kinds"]["prefix"] == pytest.approx({"ms_per_s": 612.0, "units_per_s": 53.0, "mean_rows": 1.5})
    assert found["between_ms_per_s"] == pytest.approx(31.0)
    assert device.line(found) == "prefix 612 (53 units of 1.5), steps 210 (200 units of 2.5), between units 31"


def test_every_kind_of_unit_has_a_word() -> None:
    assert device.KINDS.keys() == {kind.value for kind in UnitKind}
