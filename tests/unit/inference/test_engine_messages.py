"""What an engine says of its capacity comes over the line as it is, and what cannot be is not believed."""

from __future__ import annotations

import math

import pytest

from manyhands.engine.v1 import engine_pb2
from services.inference.capacity import DeviceCapacity
from services.inference.engine_messages import BadFrame, from_capacity, to_capacity

MEASURED = DeviceCapacity(chunks_per_s=66.0, question_s=0.011, text_step_s=0.0017, max_texts=32)


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
