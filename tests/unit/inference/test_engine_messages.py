"""What front end and engine tell each other comes over the line as it is, and what cannot be is not believed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from manyhands.engine.v1 import engine_pb2
from manyhands.security import SecuritySettings
from services.inference.capacity import DeviceCapacity
from services.inference.device_use import DeviceTime, UnitUse
from services.inference.engine_messages import (
    BadFrame,
    from_capacity,
    from_load,
    from_security,
    to_capacity,
    to_load,
    to_security,
)
from services.inference.engine_port import EngineLoad
from services.inference.units import UnitKind

MEASURED = DeviceCapacity(chunks_per_s=66.0, question_s=0.011, text_step_s=0.0017, max_texts=32)
DID = DeviceTime(
    units={
        ("arm", kind): UnitUse(device_s=0.5 * number, num_units=2 * number, num_rows=3 * number)
        for number, kind in enumerate(UnitKind)
    },
    gap_s=0.0625,
)
LOAD = EngineLoad(waiting_count=3, device="cuda:1", memory_used_bytes=5, memory_total_bytes=8, device_time=DID)


@pytest.mark.parametrize("capacity", [None, DeviceCapacity(chunks_per_s=3.0), MEASURED])
def test_a_capacity_comes_back_equal(capacity: DeviceCapacity | None) -> None:
    assert from_capacity(to_capacity("arm", capacity)) == capacity


def test_an_engine_that_knows_nothing_of_text_has_no_figures_of_it() -> None:
    assert from_capacity(engine_pb2.Capacity(model="arm", chunks_per_s=3.0)) == DeviceCapacity(chunks_per_s=3.0)


@pytest.mark.parametrize("field", ["chunks_per_s", "question_s", "text_step_s"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_what_cannot_be_is_named(field: str, value: float) -> None:
    message = to_capacity("arm", MEASURED)
    setattr(message, field, value)
    with pytest.raises(BadFrame, match=f"{field} of 'arm'"):
        from_capacity(message)


@pytest.mark.parametrize("load", [LOAD, EngineLoad(waiting_count=0, device="cuda:1")])
def test_a_load_comes_back_equal(load: EngineLoad) -> None:
    assert from_load(engine_pb2.Load.FromString(to_load(load).SerializeToString()), "cuda:1") == load


@pytest.mark.parametrize(
    "use", [{"kind": "nap"}, {"device_s": -1.0}, {"device_s": math.nan}, {"unit_count": -1}, {"row_count": -1}]
)
def test_units_that_cannot_be_are_not_believed(use: dict[str, float]) -> None:
    message = to_load(LOAD)
    for name, value in use.items():
        setattr(message.units[1], name, value)
    with pytest.raises(BadFrame, match="'arm'"):
        from_load(message, "cuda:1")


@pytest.mark.parametrize("gap_s", [-1.0, math.nan, math.inf])
def test_a_gap_that_cannot_be_is_not_believed(gap_s: float) -> None:
    message = to_load(LOAD)
    message.gap_s = gap_s
    with pytest.raises(BadFrame, match="gap_s"):
        from_load(message, "cuda:1")


@pytest.mark.parametrize(
    "files", [{}, {"certificate": "a.pem", "key": "a.key", "authority": "ca.pem", "token_file": "token"}]
)
def test_what_it_takes_to_call_somebody_comes_out_as_it_went_in(files: dict[str, str]) -> None:
    settings = SecuritySettings(**{name: Path(file) for name, file in files.items()})
    assert from_security(to_security(settings)) == settings
