"""Gauges of the device, from the engine's load to the page."""

from __future__ import annotations

import math

import prometheus_client
import pytest
import torch

from services.inference import operator_metrics
from services.inference.device_memory import device_memory
from services.inference.device_use import DeviceTime, UnitUse
from services.inference.engine_messages import from_load, to_load
from services.inference.engine_port import EngineLoad
from services.inference.units import UnitKind

LABELS = {"device": "cuda:0"}


def value(name: str, labels: dict[str, str] | None = None) -> float | None:
    return prometheus_client.REGISTRY.get_sample_value(f"manyhands_inference_{name}", labels or {})


def test_memory_of_a_gpu_is_shown_and_vanishes_with_its_engine() -> None:
    load = EngineLoad(waiting_count=3, device="cuda:0", memory_used_bytes=5 << 30, memory_total_bytes=9 << 30)
    operator_metrics.now(in_flight=4, load=from_load(to_load(load), "cuda:0"))
    assert value("device_memory_used_bytes", LABELS) == 5 << 30
    assert value("device_memory_bytes", LABELS) == 9 << 30
    assert (value("queue_length"), value("requests_in_flight")) == (3, 4)
    operator_metrics.now(in_flight=0, load=None)
    assert value("device_memory_used_bytes", LABELS) is None
    assert value("device_memory_bytes", LABELS) is None
    assert value("queue_length") == 0


def test_a_cpu_has_none() -> None:
    operator_metrics.now(in_flight=0, load=EngineLoad(waiting_count=0, device="cpu"))
    assert value("device_memory_bytes", {"device": "cpu"}) is None


def test_capacity_that_is_not_known_is_no_number() -> None:
    metrics = operator_metrics.of_model("unit-test-model")
    metrics.now(sessions=1, version=2, possible_per_s=None, text_share=0.0, asked_per_s=3.0)
    shown = value("possible_chunks_per_second", {"model": "unit-test-model"})
    assert shown is not None
    assert math.isnan(shown)
    metrics.now(sessions=1, version=2, possible_per_s=8.0, text_share=0.25, asked_per_s=3.0)
    assert value("possible_chunks_per_second", {"model": "unit-test-model"}) == 8.0
    assert value("text_share", {"model": "unit-test-model"}) == 0.25


def test_what_a_device_did_is_added_up_by_model_and_kind() -> None:
    did = DeviceTime(
        units={
            ("unit-test-arm", UnitKind.PREFIX): UnitUse(device_s=0.5, num_units=4, num_rows=7),
            ("unit-test-arm", UnitKind.TEXT): UnitUse(),
        },
        gap_s=0.25,
    )

    def shown(kind: str) -> list[float | None]:
        labels = {"model": "unit-test-arm", "kind": kind}
        return [value(f"device_{name}_total", labels) for name in ("seconds", "units", "rows")]

    operator_metrics.device_did(did, "cuda:7")
    assert shown("prefix") == [0.5, 4, 7]
    assert shown("text") == [0, 0, 0], "there before it happened"
    operator_metrics.device_did(did, "cuda:7")
    assert shown("prefix") == [1.0, 8, 14]
    assert value("device_gap_seconds_total", {"device": "cuda:7"}) == 0.5


def test_what_runs_in_no_units_shows_none() -> None:
    operator_metrics.device_did(DeviceTime(), "cpu:5")
    assert value("device_gap_seconds_total", {"device": "cpu:5"}) is None


def test_a_gpu_is_asked_and_one_that_failed_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def answer(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return 30, 100

    monkeypatch.setattr(torch.cuda, "mem_get_info", answer)
    assert device_memory("cuda:1") == (70, 100)
    assert asked == [torch.device("cuda:1")]
    assert device_memory("cpu") == (0, 0)
    assert len(asked) == 1

    def fail(device: torch.device) -> tuple[int, int]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    assert device_memory("cuda") == (0, 0)
