"""Pictures of a lone robot go through the gate whole, the device's end believes them then and only then, and no gate that
somebody may wait at stays closed."""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch

from services.inference.device_gate import PATIENCE_S, DeviceGate
from services.inference.engine_port import Answer, Job, Observed, Row
from services.inference.engine_rows import EngineRows
from services.inference.picture_gate import PictureGate, gate_bytes, whole_pages
from services.inference.shared_ring import Doorbell, RingReader, RingShape, RingWriter, map_memory
from services.inference.slot_layout import Request, SlotLayout
from tests.support.fake_engine import description

MODEL = description(16)
CAMERAS = [image.name for image in MODEL.used_spec.images]


def a_gate() -> PictureGate:
    size = gate_bytes([MODEL])
    return PictureGate(mmap.mmap(-1, mmap.PAGESIZE + size), mmap.PAGESIZE, size)


def row(seed: int, *, lacks: str = "") -> Row:
    drawn = np.random.default_rng(seed)
    observation: dict[str, Any] = {"observation.state": drawn.normal(size=14).astype(np.float32)}
    observation |= {name: drawn.integers(0, 256, (16, 16, 3), dtype=np.uint8) for name in CAMERAS if name != lacks}
    return Row(
        sample=Observed(observation=observation, task="reach"), prefix=None, delay_steps=0, execution_horizon=0, seed=seed
    )


def pictures_of(asked: Row) -> np.ndarray:
    return np.concatenate([asked.sample.observation[name].reshape(-1) for name in CAMERAS])


def test_pictures_lie_one_behind_the_other_in_the_order_of_the_spec() -> None:
    gate, asked = a_gate(), row(1)
    assert gate.memory.nbytes % mmap.PAGESIZE == 0
    assert gate.write(MODEL, asked.sample)
    assert np.array_equal(gate.pictures[: 3 * 16 * 16 * 3], pictures_of(asked))
    assert not gate.write(MODEL, row(2, lacks=CAMERAS[1]).sample)


def test_a_gate_is_open_from_the_moment_on_and_a_later_one_is_not() -> None:
    gate = a_gate()
    assert [gate.is_open(number) for number in (0, 1)] == [True, False]
    gate.open(3)
    assert [gate.is_open(number) for number in (1, 3, 4)] == [True, True, False]


def test_the_devices_end_takes_pictures_from_an_open_gate_only() -> None:
    gate = a_gate()
    device = DeviceGate(gate, torch.device("cpu"))
    device.wait(5, 100.0)
    assert not device.has_brought(5)
    assert not device.has_brought(0)
    gate.write(MODEL, row(1).sample)
    gate.open(5)
    assert device.has_brought(5)
    shape = torch.Size((3, 16, 16, 3))
    assert np.array_equal(device.pictures(shape).numpy().reshape(-1), pictures_of(row(1)))


def test_a_gate_that_is_left_closed_is_opened_and_what_lies_there_belongs_to_nobody() -> None:
    gate = a_gate()
    device = DeviceGate(gate, torch.device("cpu"))
    device.open_left(1e9)
    assert not gate.is_open(1)
    device.wait(1, 100.0)
    device.open_left(100.0 + PATIENCE_S / 2)
    assert not gate.is_open(1)
    device.open_left(100.0 + 2 * PATIENCE_S)
    assert gate.is_open(1)
    assert not device.has_brought(1)
    device.wait(2, 200.0)
    gate.open(2)
    device.open_left(200.0 + 2 * PATIENCE_S)
    assert device.has_brought(2), "the front end opened it"


class Ends:
    """The front end's side of the rings, and the engine's, in one process."""

    def __init__(self) -> None:
        self.broken: list[Exception] = []
        self.rows = EngineRows(self.broken.append)
        told = self.rows.lay_out([MODEL], 1, with_gate=True)
        requests = RingShape(slot_count=told.request_slot_count, slot_bytes=told.request_slot_bytes)
        answers = RingShape(slot_count=told.answer_slot_count, slot_bytes=told.answer_slot_bytes)
        memory_fd, *bells = self.rows.files
        gate_at = whole_pages(requests.num_bytes + answers.num_bytes)
        memory = map_memory(memory_fd, gate_at + told.gate_bytes)
        self._layout = SlotLayout([MODEL])
        self._reader = RingReader(memory, 0, requests, Doorbell(filled_fd=bells[0], free_fd=bells[1]), 1)
        self._writer = RingWriter(memory, requests.num_bytes, answers, Doorbell(filled_fd=bells[2], free_fd=bells[3]), 1)
        self.gate = PictureGate(memory, gate_at, told.gate_bytes)

    def heard(self) -> list[Request]:
        return [self._layout.read_request(body) for body in self._reader.take()]

    def gates_of_rows(self) -> list[int]:
        return [request.gate for request in self.heard() if not request.is_ahead]

    def answer(self, token: int) -> None:
        body = self._writer.reserve()
        assert body is not None
        chunk = np.zeros((MODEL.horizon, 14), dtype=np.float32)
        answer = Answer(
            actions=chunk,
            model_actions=np.zeros((MODEL.horizon, MODEL.model_action_size), dtype=np.float32),
            version=MODEL.version,
            queue_s=0.0,
            prefix_s=0.0,
            sample_s=0.0,
            postprocess_s=0.0,
            batch_size=1,
        )
        self._layout.write_answer(body, token, "fake", answer)
        self._writer.publish()
        self.rows._take_answers()

    def submit(self, asked: Row, gate: int, owner: str = "left") -> Future[Any]:
        outcome: Future[Any] = Future()
        now_s = time.monotonic()
        job = Job(model="fake", row=asked, done=outcome.set_result, gate=gate)
        self.rows.submit(owner=owner, request_id=1, arrived_s=now_s, deadline_s=now_s + 9.0, job=job)
        return outcome


@pytest.fixture
async def ends() -> Iterator[Ends]:  # type: ignore[misc]
    made = Ends()
    yield made
    made.rows.close()


async def test_a_lone_rows_pictures_are_at_its_gate_before_the_row_comes(ends: Ends) -> None:
    gate = ends.rows.expect("fake", row(1), with_gate=True)
    [ahead] = ends.heard()
    assert ahead.is_ahead
    assert ahead.gate == gate > 0
    assert not ends.gate.is_open(gate)
    ends.submit(row(1), gate)
    assert ends.gate.is_open(gate)
    assert np.array_equal(ends.gate.pictures[: 3 * 16 * 16 * 3], pictures_of(row(1)))
    [request] = ends.heard()
    assert request.gate == gate


async def test_a_gate_is_closed_only_where_asked_for_and_where_nothing_is_in_flight(ends: Ends) -> None:
    assert ends.rows.expect("fake", row(1), with_gate=False) == 0
    gate = ends.rows.expect("fake", row(1), with_gate=True)
    assert ends.rows.expect("fake", row(2), with_gate=True) == 0, "one is closed"
    outcome = ends.submit(row(1), gate)
    assert ends.rows.expect("fake", row(3), with_gate=True) == 0, "a row is in flight"
    [token] = [request.token for request in ends.heard() if not request.is_ahead]
    ends.answer(token)
    assert outcome.done()
    assert ends.rows.expect("fake", row(4), with_gate=True) > gate


async def test_nobody_waits_behind_the_gate_of_another(ends: Ends) -> None:
    gate = ends.rows.expect("fake", row(1), with_gate=True)
    ends.submit(row(2), 0, owner="right")
    assert ends.gate.is_open(gate)
    ends.submit(row(1), gate)
    assert [request.gate for request in ends.heard() if not request.is_ahead] == [0, 0], (
        "its pictures were not there in time"
    )


async def test_a_gate_that_could_not_be_told_of_is_not_closed(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(ends.rows, "_write_unasked", lambda request: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ends.rows.expect("fake", row(1), with_gate=True)
    assert ends.rows.expect("fake", row(1), with_gate=True) > 0


async def test_a_ring_that_breaks_while_a_row_is_told_ahead_leaves_no_gate(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ends.rows, "_write_unasked", lambda request: ends.rows.close())
    gate = ends.rows.expect("fake", row(1), with_gate=True)
    ends.rows.give_up(gate)
    ends.rows = EngineRows(lambda error: None)  # For the fixture to close.


async def test_an_engine_that_cannot_wait_is_given_no_more_gates(ends: Ends) -> None:
    gate = ends.rows.expect("fake", row(1), with_gate=True)
    ends.rows.use_no_gate()
    assert ends.gate.is_open(gate)
    assert ends.rows.expect("fake", row(1), with_gate=True) == 0
    ends.rows.rehearse("fake", row(1))


async def test_a_row_that_lacks_a_picture_opens_its_gate_and_goes_the_other_way(ends: Ends) -> None:
    gate = ends.rows.expect("fake", row(1), with_gate=True)
    ends.heard()
    ends.submit(row(1, lacks=CAMERAS[2]), gate)
    assert ends.gate.is_open(gate)
    [request] = ends.heard()
    assert request.gate == 0


async def test_a_gate_that_is_given_up_is_opened_and_another_one_is_not(ends: Ends) -> None:
    gate = ends.rows.expect("fake", row(1), with_gate=True)
    for other in (0, gate - 1, gate + 1):
        ends.rows.give_up(other)
        assert not ends.gate.is_open(gate)
    ends.rows.give_up(gate)
    assert ends.gate.is_open(gate)
    again = ends.rows.expect("fake", row(1), with_gate=True)
    assert again > gate
    assert not ends.gate.is_open(again)
    ends.submit(row(1), gate)
    assert [request.gate for request in ends.heard() if not request.is_ahead] == [0], (
        "a row that comes too late takes no other's"
    )


async def test_a_row_whose_engine_ended_at_the_gate_is_refused_and_a_new_engines_gate_is_not_taken_for_it(
    ends: Ends,
) -> None:
    gate = ends.rows.expect("fake", row(1), with_gate=True)
    other = Ends()
    others = other.rows.expect("fake", row(1), with_gate=True)
    assert gate != others
    other.submit(row(1), gate)
    assert other.gates_of_rows() == [0]
    other.rows.close()
    assert other.rows.expect("fake", row(1), with_gate=True) == 0
    other.rows.give_up(others)


async def test_an_engine_that_ends_finds_no_gate_closed(ends: Ends) -> None:
    gate = ends.rows.expect("fake", row(1), with_gate=True)
    ends.rows.leave_gate()
    assert ends.gate.is_open(gate)
    last = ends.rows.expect("fake", row(1), with_gate=True)
    ends.rows.close()
    assert ends.gate.is_open(last)
    ends.rows = EngineRows(lambda error: None)  # For the fixture to close.


async def test_an_engine_that_waits_at_no_gate_is_given_none() -> None:
    rows = EngineRows(lambda error: None)
    assert rows.lay_out([MODEL], 1, with_gate=False).gate_bytes == 0
    assert rows.expect("fake", row(1), with_gate=True) == 0
    rows.close()
