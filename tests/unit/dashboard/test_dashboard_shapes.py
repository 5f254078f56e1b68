"""Messages as the page's JSON, byte ranges and addresses."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from manyhands import codec, stamps
from manyhands.actor.v1 import actor_pb2
from manyhands.common.v1 import common_pb2
from manyhands.errors import Conflict, InvalidInput, NotFound, Refused
from manyhands.inference.v1 import inference_pb2
from manyhands.robot.v1 import robot_pb2
from manyhands.security import SecuritySettings
from services.dashboard import shapes, swaps
from services.dashboard.access import Access
from services.dashboard.web import byte_range


@pytest.mark.parametrize(
    ("header", "size", "expected"),
    [
        ("", 10, (0, 10)),
        ("bytes=0-", 10, (0, 10)),
        ("bytes=3-5", 10, (3, 6)),
        ("bytes=3-999", 10, (3, 10)),
        ("bytes=-4", 10, (6, 10)),
        ("bytes=-40", 10, (0, 10)),
        ("bytes=10-", 10, None),
        ("bytes=5-3", 10, None),
        ("bytes=-0", 10, None),
        ("bytes=-", 10, None),
        ("bytes=0-1,4-5", 10, None),
        ("lines=0-1", 10, None),
        ("bytes=0-", 0, None),
        ("", 0, (0, 0)),
    ],
)
def test_byte_ranges(header: str, size: int, expected: tuple[int, int] | None) -> None:
    assert byte_range(header, size) == expected


def test_values_that_json_cannot_hold_become_gaps() -> None:
    values = codec.encode_values({"observation.state": np.array([1.23456789, math.nan, math.inf], np.float32)})
    shown = shapes.vectors(values)
    assert shown == {"observation.state": [1.23457, None, None]}
    json.dumps(shown, allow_nan=False)


def test_enum_labels_are_words_and_unknown_numbers_stay_visible() -> None:
    status = robot_pb2.RobotStatus(mode=robot_pb2.ROBOT_MODE_EMERGENCY_STOP)
    assert shapes.robot_status(status)["mode"] == "emergency stop"
    # proto3 keeps values of a newer peer.
    newer = robot_pb2.RobotStatus.FromString(b"\x08\x63")
    assert shapes.robot_status(newer)["mode"] == "99"
    assert shapes.version(common_pb2.PolicyVersion()) is None


def test_latency_leaves_refusals_out_and_takes_nearest_ranks() -> None:
    def event(milliseconds: float, refusal: str = "") -> object:
        whole = stamps.to_duration(milliseconds / 1000)
        return shapes.chunk(actor_pb2.ChunkEvent(latency=whole, server_compute=whole, refusal=refusal))

    chunks = [event(value) for value in range(1, 101)] + [event(10_000, refusal="late")]
    summary = shapes.latency(chunks)
    assert summary["count"] == 100
    assert summary["total"] == {"p50_ms": 50.0, "p99_ms": 99.0}
    assert summary["stages"]["compute"] == {"p50_ms": 50.0, "p99_ms": 99.0}
    assert summary["stages"]["queue"] == {"p50_ms": 0.0, "p99_ms": 0.0}
    assert shapes.latency([event(1, refusal="late")]) == {"count": 0, "total": None, "stages": {}}


def test_an_inference_service_that_has_nothing_to_say_yet_is_shown_too() -> None:
    shown = shapes.inference_status(inference_pb2.GetStatusResponse(), now_s=10.0)
    assert (shown["loads"], shown["sessions"], shown["memory_total_bytes"]) == ({}, [], 0)
    json.dumps(shown, allow_nan=False)


def test_capacity_and_refusals_of_a_service_as_the_page_shows_them() -> None:
    refusal = inference_pb2.RefusalRecord(
        reason=inference_pb2.REFUSAL_REASON_UNKNOWN_SESSION,
        message="is from before a restart",
        count=7,
        last_ago=stamps.to_duration(4.0),
        last_request_id=31,
    )
    session = inference_pb2.SessionStatus(robot_id="left", refusals=[refusal])
    load = inference_pb2.ModelLoad(
        model="arm",
        possible_chunks_per_s=math.inf,
        usable_chunks_per_s=8.0,
        asked_chunks_per_s=2.5,
        pinned=True,
        text_share=0.25,
    )
    status = inference_pb2.GetStatusResponse(sessions=[session], loads=[load], device_memory_used_bytes=5)
    shown = shapes.inference_status(status, now_s=10.0)
    assert shown["sessions"][0]["refusals"] == [
        {"reason": "unknown session", "message": "is from before a restart", "count": 7, "t": 6.0, "request_id": 31}
    ]
    assert shown["loads"]["arm"] == {
        "possible_per_s": None, "usable_per_s": 8.0, "text_share": 0.25, "asked_per_s": 2.5, "session_count": 0,
        "pinned": True,
    }  # fmt: skip
    assert shown["memory_used_bytes"] == 5
    json.dumps(shown, allow_nan=False)


REFUSED_BODIES = [
    (None, "confirm"),
    ({"from": 3, "to": 5}, "confirm"),
    ({"confirm": "leg", "from": 3, "to": 5}, "confirm"),
    ({"confirm": "arm", "to": 5}, "from"),
    ({"confirm": "arm", "from": 3, "to": True}, "to"),
    ({"confirm": "arm", "from": 3, "to": 2**63}, "to"),
]


@pytest.mark.parametrize(("body", "field"), REFUSED_BODIES)
def test_a_swap_that_is_not_spelled_out_is_refused_by_field(body: object, field: str) -> None:
    status = {"models": [{"name": "arm", "version": {"number": 3}}]}
    with pytest.raises(InvalidInput) as caught:
        swaps.wanted_swap("arm", body, status)
    assert caught.value.field == field


def test_a_swap_must_be_from_what_serves_now() -> None:
    def wanted(status: object, number: int = 3) -> swaps.WantedSwap:
        return swaps.wanted_swap("arm", {"confirm": "arm", "from": number, "to": 0}, status)

    assert wanted({"models": [{"name": "arm", "version": {"number": 3}}]}).to_number == 0
    assert wanted({"models": [{"name": "arm", "version": None}]}, 0).from_number == 0, "a checkpoint"
    with pytest.raises(Conflict, match="serves v4 now, not v3"):
        wanted({"models": [{"name": "arm", "version": {"number": 4}}]})
    for nothing in (None, {"models": []}, {"models": [{"name": "leg", "version": {"number": 3}}]}):
        with pytest.raises(NotFound, match="is not served"):
            wanted(nothing)


def test_anything_but_loopback_needs_tls_and_tokens() -> None:
    assert Access("127.0.0.1:0", SecuritySettings()).is_loopback
    with pytest.raises(Refused, match="is not loopback and needs TLS"):
        Access("0.0.0.0:8080", SecuritySettings())
