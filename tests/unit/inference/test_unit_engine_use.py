"""The engine says what its units took of the device, and what was lost between them."""

from __future__ import annotations

import time
import types

import pytest
import torch

from manyhands.errors import InternalError
from services.inference import launches
from services.inference.fused_model import FusedModel
from services.inference.unit_engine import UnitEngine
from services.inference.unit_results import UnitResults
from services.inference.units import UnitKind
from tests.support.prompted_lab import CPU
from tests.support.unit_lab import (
    DRAWN,
    SUBTASK,
    FakeGpu,
    answer_of,
    ask,
    hold,
    make_policy,
    row,
    running,
    submit,
    whole_text,
)


@pytest.fixture
def engine():
    with running(make_policy()) as made:
        yield made


def all_taken_in(engine):
    end_s = time.monotonic() + 10.0
    while engine._state.num_outstanding:
        assert time.monotonic() < end_s
        time.sleep(0.001)


def on_gpu(engine, monkeypatch, gpu, *, unit_s=0.002, gap_s=0.0005):
    """Units take so long there, and it stands still before each; it runs them when they are launched."""
    model = engine.models["tiny"]

    def launched(launch):
        gpu.stands_still(gap_s)

        def run():
            launch()
            gpu.runs(unit_s)

        return launches.timed(torch.device("cuda"), run)

    monkeypatch.setattr(model, "launched", launched)


def test_the_time_of_units_and_between_them_is_counted_while_there_is_work(engine, monkeypatch):
    gpu = FakeGpu(monkeypatch)
    on_gpu(engine, monkeypatch, gpu)
    num_steps = engine.models["tiny"].num_steps
    for seed in (1, 2):
        answer_of(submit(engine, "left", row(seed)))
        all_taken_in(engine)
    found = engine.device_time()
    prefix, expert = (found.units["tiny", kind] for kind in (UnitKind.PREFIX, UnitKind.EXPERT))
    assert (prefix.num_units, prefix.num_rows, prefix.device_s) == (2, 2, pytest.approx(0.004))
    assert (expert.num_units, expert.num_rows) == (2 * num_steps, 2 * num_steps)
    assert expert.device_s == pytest.approx(2 * num_steps * 0.002)
    # Between the two chunks there was nothing to do, however short that was.
    assert found.gap_s == pytest.approx(2 * num_steps * 0.0005)


def test_when_a_unit_was_done_is_known_although_that_is_noticed_late(monkeypatch):
    gpu, host = FakeGpu(monkeypatch), types.SimpleNamespace(now_s=0.0)
    results = UnitResults(types.SimpleNamespace(clock=lambda: host.now_s), None)

    def done_s(*, took_s, noticed_s, gap_s=0.0):
        gpu.stands_still(gap_s)
        wait = launches.timed(torch.device("cuda"), lambda: gpu.runs(took_s))
        host.now_s = noticed_s
        found_gap_s, found_s = results._when_done(types.SimpleNamespace(wait=wait), wait())
        assert found_gap_s == pytest.approx(gap_s)
        return found_s

    assert done_s(took_s=0.008, noticed_s=5.0) == 5.0
    # Three milliseconds late: tokens were taken in.
    assert done_s(took_s=0.001, gap_s=0.0004, noticed_s=5.0044) == pytest.approx(5.0014, abs=1e-5)
    # The first one had been noticed late itself, by 0.2 ms: this one is there before it should be.
    assert done_s(took_s=0.002, noticed_s=5.0032) == 5.0032
    assert done_s(took_s=0.002, noticed_s=5.0060) == pytest.approx(5.0052, abs=1e-5)
    # Nothing was there for it since: it begins anew.
    results._before = None
    assert done_s(took_s=0.002, noticed_s=7.0) == 7.0


def test_the_time_of_texts_is_counted_drawn_and_not_and_rows_of_a_joint_step_are_told_apart(engine, monkeypatch):
    gpu = FakeGpu(monkeypatch)
    on_gpu(engine, monkeypatch, gpu)
    gate, holding = hold(engine)
    heard = [ask(engine, request, seed=seed)[1] for seed, request in enumerate((SUBTASK, DRAWN))]
    gate.set()
    holding.join()
    for one in heard:
        whole_text(one)
    all_taken_in(engine)
    found = engine.device_time()
    slices, steps = (found.units["tiny", kind] for kind in (UnitKind.TEXT_PREFIX, UnitKind.TEXT))
    assert slices.num_units == slices.num_rows == 2 * engine.models["tiny"].num_prefix_slices
    assert steps.num_units < steps.num_rows <= 2 * steps.num_units
    assert steps.device_s == pytest.approx(0.002 * steps.num_units)
    num_units = sum(use.num_units for use in found.units.values())
    assert found.gap_s == pytest.approx((num_units - 1) * 0.0005)


def test_a_unit_that_failed_took_its_time_all_the_same_where_that_is_known(engine, monkeypatch):
    gpu = FakeGpu(monkeypatch)
    on_gpu(engine, monkeypatch, gpu)
    monkeypatch.setattr(launches, "to_host", lambda _: 1 / 0)
    assert isinstance(submit(engine, "left", row(1)).get(timeout=10.0), InternalError)
    all_taken_in(engine)
    assert engine.device_time().units["tiny", UnitKind.EXPERT].num_units == engine.models["tiny"].num_steps


def test_a_model_without_text_has_no_units_of_text():
    model = FusedModel("tiny", make_policy("pi05"), CPU, max_rows=1, max_texts=1)
    units = UnitEngine({"tiny": model}, max_rows=1, max_texts=1).device_time().units
    assert set(units) == {("tiny", UnitKind.PREFIX), ("tiny", UnitKind.EXPERT)}


def test_what_a_unit_that_failed_took_is_no_gap(engine, monkeypatch):
    gpu, launched = FakeGpu(monkeypatch), []
    on_gpu(engine, monkeypatch, gpu)
    model = engine.models["tiny"]
    launch_on_gpu = model.launched

    def second_fails(launch):
        launched.append(launch_on_gpu(launch))
        return launched[-1] if len(launched) != 2 else lambda: 1 / 0

    monkeypatch.setattr(model, "launched", second_fails)
    gate, holding = hold(engine)
    outcomes, (_, heard) = submit(engine, "left", row(1)), ask(engine, SUBTASK)
    gate.set()
    holding.join()
    assert isinstance(outcomes.get(timeout=10.0), InternalError)
    whole_text(heard)
    all_taken_in(engine)
    found = engine.device_time()
    num_units = sum(use.num_units for use in found.units.values())
    assert num_units == len(launched) - 1 > 2
    # Neither before the first one nor on either side of the one that failed.
    assert found.gap_s == pytest.approx((num_units - 2) * 0.0005)
