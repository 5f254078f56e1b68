"""A chunk is made of the pictures that came through the gate, if they are its row's, and else of those it brings itself."""

from __future__ import annotations

import dataclasses
import mmap
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from manyhands.common.v1 import common_pb2
from services.inference import local_engine
from services.inference.device_gate import DeviceGate
from services.inference.engine_port import Job, Observed
from services.inference.fused.graphs import GraphPool, Recorded
from services.inference.fused.vision_ahead import VisionAhead
from services.inference.fused_model import FusedModel
from services.inference.local_engine import LocalEngine
from services.inference.picture_gate import PictureGate, gate_bytes
from services.inference.unit_answers import ChunkInWork, answer_chunk
from services.inference.units import UnitKind
from tests.support.prompted_lab import CAMERA, CPU, STATE
from tests.support.unit_lab import (
    SUBTASK,
    FakeGpu,
    answer_of,
    ask,
    make_policy,
    near,
    plain,
    row,
    running,
    sample,
    submit,
    whole_text,
)


@pytest.fixture(scope="module")
def policy():
    return make_policy()


@pytest.fixture
def engine(policy):
    with running(policy) as made:
        yield made


@pytest.fixture
def gate(engine):
    """The front end's side of it."""
    model = engine.models["tiny"]
    size = gate_bytes([model])
    made = PictureGate(mmap.mmap(-1, size), 0, size)
    model.use_gate(DeviceGate(made, CPU))
    return made


def seen_as(asked, seed):
    """The row, with the pictures of another."""
    other = row(seed).sample.observation
    observation = {STATE: asked.sample.observation[STATE], CAMERA: other[CAMERA]}
    return dataclasses.replace(asked, sample=Observed(observation=observation, task=asked.sample.task))


def without_pictures(asked):
    observed = Observed(observation={STATE: asked.sample.observation[STATE]}, task=asked.sample.task)
    return dataclasses.replace(asked, sample=observed)


def through(engine, gate, asked, number, *, seen=None):
    """Its chunk; seen: what lies at the gate, where that is not what the row brings."""
    engine.expect("tiny", without_pictures(asked), number)
    gate.write(engine.models["tiny"], (seen or asked).sample)
    gate.open(number)
    return answer_of(submit(engine, "left", asked, gate=number))


def test_a_chunk_of_pictures_that_came_through_the_gate_is_the_plain_one(engine, policy, gate):
    for number in (1, 2):
        found = through(engine, gate, row(number), number, seen=seen_as(row(number), 9))
        assert near(found.actions, plain(policy, seen_as(row(number), 9))[0])
        assert found.queue_s >= 0


def test_a_row_takes_what_lies_at_its_own_gate_and_only_once(engine, policy, gate):
    through(engine, gate, row(1), 1)
    gate.write(engine.models["tiny"], row(9).sample)
    for number in (0, 1, 2):
        assert near(answer_of(submit(engine, "left", row(2), gate=number)).actions, plain(policy, row(2))[0])


def test_pictures_of_a_gate_that_nobody_opened_are_not_believed(engine, policy, gate):
    engine.expect("tiny", without_pictures(row(1)), 1)
    gate.write(engine.models["tiny"], row(9).sample)
    assert near(answer_of(submit(engine, "left", row(1), gate=1)).actions, plain(policy, row(1))[0])


def test_what_was_seen_with_other_weights_is_seen_again(engine, policy, gate):
    model = engine.models["tiny"]
    good = make_policy()
    with torch.no_grad():
        for parameter in good.network.parameters():
            parameter.add_(0.01)
    engine.expect("tiny", without_pictures(row(1)), 1)
    gate.write(model, row(9).sample)
    gate.open(1)
    model.stage(good)
    engine.between_passes(lambda: model.replace(good, common_pb2.PolicyVersion(model="tiny", number=1), {}))
    assert near(answer_of(submit(engine, "left", row(1), gate=1)).actions, plain(good, row(1))[0])


def test_a_question_about_pictures_that_were_seen_ahead_does_not_see_them_again(engine, policy, gate):
    through(engine, gate, row(1), 1)
    _, heard = ask(engine, SUBTASK, seed=1, owner="left")
    assert whole_text(heard) == "".join(policy.generate([sample(1)], SUBTASK, CPU))
    fused = engine.models["tiny"].fused
    slices = engine.device_time().units["tiny", UnitKind.TEXT_PREFIX].num_units
    assert slices == fused.num_prefix_slices - fused.num_vision_slices


def test_a_device_that_has_work_waits_for_no_pictures(engine, gate, monkeypatch):
    launched = []
    monkeypatch.setattr(engine.models["tiny"], "see_ahead", launched.append)
    engine.expect("tiny", without_pictures(row(1)), 0)
    engine._state.num_outstanding = 1
    engine.expect("tiny", without_pictures(row(1)), 1)
    engine._state.num_outstanding = 0
    engine.expect("tiny", without_pictures(row(1)), 2)
    engine.between_passes(lambda: None)  # Behind all that was handed to the engine's thread.
    assert launched == [2]


def test_pictures_that_cannot_be_seen_ahead_are_seen_when_the_row_comes(engine, policy, gate, monkeypatch):
    def fail(number):
        raise RuntimeError("the device cannot wait")

    monkeypatch.setattr(engine.models["tiny"], "see_ahead", fail)
    assert near(through(engine, gate, row(1), 1, seen=row(9)).actions, plain(policy, row(1))[0])


def test_a_model_whose_pictures_are_made_to_fit_or_that_knows_empty_cameras_uses_no_gate(policy, monkeypatch):
    with running(make_policy(num_empty_cameras=1)) as engine:
        assert not engine.models["tiny"].waits_at_gate
    with running(policy) as engine:
        model = engine.models["tiny"]
        assert model.waits_at_gate
        monkeypatch.setattr(model.fused, "settings", dataclasses.replace(model.fused.settings, pictures_fit=False))
        assert not model.waits_at_gate


def test_what_was_seen_ahead_is_there_until_another_unit_runs(gate, monkeypatch):
    gpu = FakeGpu(monkeypatch)
    pool = GraphPool(CPU)
    vision = Recorded(lambda pictures: pictures.sum(), {"pictures": torch.zeros(1, 2, 2, 3, dtype=torch.uint8)}, pool)
    other = Recorded(lambda: None, {}, pool)
    pool.stream = SimpleNamespace(device=None)
    ahead = VisionAhead(DeviceGate(gate, CPU), lambda: vision, pool)
    for number, others in ((1, 0), (2, 1), (3, 0)):
        gpu.is_behind = False
        gpu.runs(0.5)
        gate.pictures[:12] = number
        ahead.launch(number)
        assert vision.outputs == 12 * number, "it is launched before the gate is open"
        gpu.is_behind = True
        gate.open(number)
        for _ in range(others):
            other.run()
        seen = ahead.take(number)
        assert (seen is None) is bool(others)
        assert ahead.take(number) is None
    assert seen.tokens == 36
    assert seen.began.at_s == pytest.approx(1.5)
    gpu.is_behind = False
    ahead.launch(4)
    gate.open(4)
    ahead.forget()
    assert ahead.take(4) is None


def test_rows_that_never_come_do_not_fill_the_device(gate, monkeypatch):
    gpu = FakeGpu(monkeypatch)
    pool = GraphPool(CPU)
    vision = Recorded(lambda pictures: pictures.sum(), {"pictures": torch.zeros(1, 2, 2, 3, dtype=torch.uint8)}, pool)
    pool.stream = SimpleNamespace(device=None)
    ahead = VisionAhead(DeviceGate(gate, CPU), lambda: vision, pool)
    ahead.launch(1)
    gpu.is_behind = True
    for number in range(2, 20):
        gate.open(number - 1)
        ahead.launch(number)
    assert pool.num_runs == 1
    gate.open(20)
    assert [ahead.take(number) for number in (1, 19)] == [None, None]
    gpu.is_behind = False
    ahead.launch(21)
    assert pool.num_runs == 2
    gate.open(21)
    assert ahead.take(21) is not None


def test_what_could_not_be_launched_is_not_taken_for_what_was_before(gate, monkeypatch):
    FakeGpu(monkeypatch)
    pool = GraphPool(CPU)
    vision = Recorded(lambda pictures: pictures.sum(), {"pictures": torch.zeros(1, 2, 2, 3, dtype=torch.uint8)}, pool)
    pool.stream = SimpleNamespace(device=None)
    ahead = VisionAhead(DeviceGate(gate, CPU), lambda: vision, pool)
    ahead.launch(1)
    monkeypatch.setattr(ahead._gate, "pictures", lambda shape: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ahead.launch(2)
    gate.open(2)
    assert ahead.take(2) is None


@pytest.mark.parametrize("is_pinned", [True, False], ids=["pinned", "not pinned"])
def test_an_engine_in_its_process_uses_the_gate_where_the_driver_pins_it(policy, monkeypatch, is_pinned):
    local = LocalEngine({"tiny": FusedModel("tiny", policy, CPU, max_rows=4, max_texts=4)}, max_batch=4)
    size = gate_bytes([local.models["tiny"]])
    gate = PictureGate(mmap.mmap(-1, size), 0, size)
    if not is_pinned:

        def refuse(gate, device):
            raise RuntimeError("the driver does not pin it")

        monkeypatch.setattr(local_engine, "DeviceGate", refuse)
    assert local.waits_at_gate
    local.use_gate(gate)
    assert local.uses_gate is is_pinned
    local.start()
    local.expect("tiny", without_pictures(row(1)), gate=1)
    gate.write(local.models["tiny"], row(9).sample)
    gate.open(1)
    expected = seen_as(row(1), 9) if is_pinned else row(1)
    assert near(answer_of(submit(local, "left", row(1), gate=1)).actions, plain(policy, expected)[0])
    local.expect("tiny", without_pictures(row(2)), gate=2)
    local.engine_of("tiny").between_passes(lambda: None)  # Behind what waits at the gate.
    local.open_left(1e12)
    assert gate.is_open(2) is is_pinned
    local.stop()


def test_a_device_that_began_before_its_row_was_submitted_let_it_wait_no_time(policy, engine):
    """Two clocks are compared; below 0 the front end would take the engine for broken."""
    told = []
    payload = ChunkInWork(job=Job(model="tiny", row=row(1), done=told.append), row=None, began_s=4.9999, prefix_s=0.001)
    work = SimpleNamespace(payload=payload, arrived_s=5.0)
    launched = SimpleNamespace(version=engine.models["tiny"].version, unit=SimpleNamespace(size=1))
    assert answer_chunk(work, (np.zeros((2, 2)), np.zeros((2, 2))), launched, 5.01, 5.011)
    assert told[0].queue_s == 0.0
