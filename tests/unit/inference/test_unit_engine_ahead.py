"""The engine runs ahead of its device, and what it was told comes out of that in order, once, and of one version."""

from __future__ import annotations

import copy
import dataclasses
import functools
import queue
import threading
import time

import numpy as np
import pytest
import torch

from manyhands.common.v1 import common_pb2
from manyhands.errors import InternalError, Refused, TooLate
from policies import text
from policies.policy import TextKind, TextRequest
from services.inference import launches, unit_results
from services.inference.engine_port import Observed
from services.inference.fused_model import FusedModel
from services.inference.unit_engine import UnitEngine
from tests.support.prompted_lab import CPU
from tests.support.unit_lab import (
    DRAWN,
    MAX_AHEAD,
    SUBTASK,
    Clock,
    SlowDevice,
    Stall,
    answer_of,
    ask,
    hold,
    let_go_until,
    make_policy,
    near,
    plain,
    row,
    running,
    running_ahead,
    sample,
    submit,
    wait_for,
    whole_text,
)


@pytest.fixture(scope="module")
def policy():
    return make_policy()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def ahead(policy, monkeypatch, clock):
    with running_ahead(policy, monkeypatch, clock) as engine_and_device:
        yield engine_and_device


def test_units_are_launched_while_the_device_is_behind_and_no_more_than_it_may_have(ahead, policy):
    engine, device = ahead
    outcomes = submit(engine, "left", row(1))
    device.has_launched("run_prefix", *["run_expert"] * (MAX_AHEAD - 1))
    device.let_go()
    device.has_launched("run_prefix", *["run_expert"] * MAX_AHEAD)
    assert outcomes.empty(), "a chunk is answered when the device has it"
    num_steps = engine.models["tiny"].num_steps
    device.let_go(num_steps)
    assert near(answer_of(outcomes).actions, plain(policy, row(1))[0])


def test_a_robot_is_answered_before_anything_else_is_done_and_nobody_is_woken_meanwhile(ahead, monkeypatch):
    """One who is woken takes the interpreter."""
    engine, device = ahead
    outcomes = submit(engine, "left", row(1))
    device.let_go(engine.models["tiny"].num_steps)
    device.has_launched("run_prefix", *["run_expert"] * engine.models["tiny"].num_steps)
    wait_for(lambda: engine._state.num_outstanding == 1)
    before: list[str] = []
    notify, observe = engine._changed.notify, engine._scheduler.times.observe

    def note(what, run, *arguments):
        if outcomes.empty():
            before.append(what)
        run(*arguments)

    monkeypatch.setattr(engine._changed, "notify", functools.partial(note, "woken", notify))
    monkeypatch.setattr(engine._scheduler.times, "observe", functools.partial(note, "observed", observe))
    device.let_go()
    wait_for(lambda: not engine._state.num_outstanding)
    assert before == []
    answer_of(outcomes)


def test_an_answer_is_rehearsed_while_the_device_is_at_it_and_not_soon_after_another(ahead, policy, clock, monkeypatch):
    engine, device = ahead
    monkeypatch.setattr(unit_results, "COLD_S", 30.0)
    num_units, rehearsed = 1 + engine.models["tiny"].num_steps, queue.Queue()
    for seed, waits_s, num_expected in ((1, 60.0, 1), (2, 0.0, 0), (3, 60.0, 1)):
        clock.pushed_s += waits_s
        outcomes = submit(engine, "left", row(seed), rehearse=rehearsed.put, deadline_s=600.0)
        device.let_go(num_units - 2)
        wait_for(lambda: engine._state.num_outstanding == 2 and device._gates.qsize() == 2)
        if num_expected:
            rehearsal = rehearsed.get(timeout=5.0)
            assert rehearsal.answer.actions.shape == plain(policy, row(seed))[0].shape
        assert outcomes.empty()
        device.let_go(2)
        assert near(answer_of(outcomes).actions, plain(policy, row(seed))[0])
        assert rehearsed.empty()


@pytest.mark.parametrize("spoilt", ["raises", "not finite"])
def test_a_rehearsal_that_fails_concerns_nobody(ahead, policy, monkeypatch, spoilt):
    engine, device = ahead
    model, rehearsed = engine.models["tiny"], []
    numbers = np.full((1, 1), np.nan, dtype=np.float32)
    monkeypatch.setattr(model, "rehearsed", lambda _: 1 / 0 if spoilt == "raises" else (numbers, numbers))
    outcomes = submit(engine, "left", row(1), rehearse=rehearsed.append)
    device.let_go(1 + model.num_steps)
    assert near(answer_of(outcomes).actions, plain(policy, row(1))[0])
    assert rehearsed == []


def test_a_row_is_rehearsed_where_nothing_is_in_work_and_nothing_comes_of_it(ahead, policy, monkeypatch):
    engine, device = ahead
    model, rehearsed = engine.models["tiny"], []
    rehearse = model.rehearse_prefix
    monkeypatch.setattr(model, "rehearse_prefix", lambda chunk: (rehearse(chunk), rehearsed.append(chunk)))
    prefix = np.ones((2, 8), dtype=np.float32)
    engine.rehearse("tiny", row(7, prefix=prefix, task="something else"))
    wait_for(lambda: rehearsed)
    engine.rehearse("tiny", dataclasses.replace(row(1), sample=Observed(observation={}, task="reach")))
    assert device.launched == []
    assert model.slots.num_free == model.slots.sizes.num_slots
    outcomes = submit(engine, "left", row(1))
    device.has_launched("run_prefix", *["run_expert"] * (MAX_AHEAD - 1))
    engine.rehearse("tiny", row(7))
    device.let_go(1 + model.num_steps)
    assert near(answer_of(outcomes).actions, plain(policy, row(1))[0])
    assert len(rehearsed) == 1


def test_a_rehearsal_of_a_row_that_fails_leaves_the_engine_as_it_was(ahead, policy, monkeypatch):
    engine, device = ahead
    with monkeypatch.context() as broken:
        entered = threading.Event()

        def fail(chunk):
            entered.set()
            raise ZeroDivisionError

        broken.setattr(engine.models["tiny"], "rehearse_prefix", fail)
        engine.rehearse("tiny", row(1))
        assert entered.wait(5.0)
    outcomes = submit(engine, "left", row(1))
    device.let_go(1 + engine.models["tiny"].num_steps)
    assert near(answer_of(outcomes).actions, plain(policy, row(1))[0])


def test_what_a_text_needs_next_waits_for_its_token_and_actions_do_not(ahead):
    engine, device = ahead
    _, heard = ask(engine, TextRequest(kind=TextKind.SUBTASK), seed=4)
    device.has_launched("run_text_prefix")
    outcomes = submit(engine, "acts", row(3))
    device.has_launched("run_text_prefix", "run_prefix", *["run_expert"] * (MAX_AHEAD - 2))
    assert heard.empty()
    assert outcomes.empty()


def test_weights_change_when_the_device_has_nothing_before_it(ahead):
    engine, device = ahead
    outcomes, changed = submit(engine, "left", row(1)), threading.Event()
    device.has_launched("run_prefix", *["run_expert"] * (MAX_AHEAD - 1))
    changing = threading.Thread(target=engine.between_passes, args=(changed.set,))
    changing.start()
    device.let_go(engine.models["tiny"].num_steps)
    assert not changed.wait(0.05)
    device.let_go()
    assert changed.wait(5.0)
    changing.join()
    answer_of(outcomes)


def test_a_device_that_fails_behind_the_engine_is_told_and_ends_nobody_else(ahead, policy, monkeypatch):
    engine, device = ahead
    model = engine.models["tiny"]

    def fail(wait):
        wait()
        raise ZeroDivisionError

    with monkeypatch.context() as broken:
        broken.setattr(model, "launched", lambda launch: functools.partial(fail, device.launch(launch)))
        outcomes = submit(engine, "left", row(1))
        device.has_launched("run_prefix", *["run_expert"] * (MAX_AHEAD - 1))
        device.let_go(MAX_AHEAD)
        assert isinstance(outcomes.get(timeout=5.0), InternalError)
        while engine.pending() or len(engine._device):
            time.sleep(0.001)
        assert outcomes.empty(), "once"
    later = submit(engine, "left", row(2))
    device.let_go(1 + model.num_steps)
    assert near(answer_of(later).actions, plain(policy, row(2))[0])
    engine.between_passes(lambda: None)
    assert model.slots.num_free == model.slots.sizes.num_slots


@pytest.fixture
def engine(policy):
    with running(policy) as made:
        yield made


def test_there_are_slots_for_all_that_may_be_on_its_way_however_few_steps_a_chunk_has():
    one_step, many = (
        FusedModel("tiny", make_policy(num_steps=steps), CPU, max_rows=4, max_texts=4).slots.sizes.num_slots
        for steps in (1, 40)
    )
    # Of eight units four are prefixes: as many chunks of four rows wait to be fetched, and four are in progress.
    assert one_step >= 4 * (4 + 1) + 4
    assert many >= 2 * 4 + 4


def swapping(engine, change):
    """A thread that waits for a change of weights, and whether it has happened."""
    changed = threading.Event()

    def body():
        change()
        changed.set()

    thread = threading.Thread(target=engine.between_passes, args=(body,))
    thread.start()
    return thread, changed


def test_weights_do_not_change_under_a_token_that_is_not_taken_in_yet(engine, policy, monkeypatch):
    """Else the question's prefix would begin again, and its scheduler would think that it is complete."""
    stall = Stall(monkeypatch, text, "draw")
    _, heard = ask(engine, DRAWN, seed=2)
    assert stall.entered.wait(10.0)
    thread, changed = swapping(engine, lambda: None)
    assert not changed.wait(0.1)
    stall.gate.set()
    assert changed.wait(10.0)
    thread.join()
    assert whole_text(heard) == "".join(policy.generate([sample(2)], DRAWN, CPU))


def other_statistics(policy):
    second = copy.deepcopy(policy)
    second.action_normalizer.second.mul_(3.0)
    second.state_normalizer.second.mul_(3.0)
    return second


def replace(engine, policy, number):
    """As a swap does."""
    engine.models["tiny"].replace(policy, common_pb2.PolicyVersion(model="tiny", number=number), {})


def test_a_chunk_is_brought_back_by_the_version_that_made_it(engine, policy, monkeypatch):
    second = other_statistics(policy)
    stall = Stall(monkeypatch, engine.models["tiny"], "_chunk")
    outcomes = submit(engine, "left", row(1))
    assert stall.entered.wait(10.0)
    thread, changed = swapping(engine, lambda: replace(engine, second, 1))
    assert not changed.wait(0.1)
    stall.gate.set()
    outcome = answer_of(outcomes)
    assert changed.wait(10.0)
    thread.join()
    assert outcome.version.number == 0
    assert near(outcome.actions, plain(policy, row(1))[0])


def test_a_row_that_waits_while_statistics_change_is_read_with_the_new_ones(engine, policy):
    second = other_statistics(policy)
    engine.models["tiny"].fused.weights.stage(second.network.state_dict())
    gate, holding = hold(engine)
    outcomes = submit(engine, "left", row(1))
    thread, changed = swapping(engine, lambda: replace(engine, second, 1))
    gate.set()
    holding.join()
    outcome = answer_of(outcomes)
    assert changed.wait(10.0)
    thread.join()
    assert outcome.version.number == 1
    assert near(outcome.actions, plain(second, row(1))[0])
    assert not near(outcome.actions, plain(policy, row(1))[0])


def test_a_version_is_tried_beside_what_serves_and_a_bad_one_changes_nothing(engine, policy):
    model = engine.models["tiny"]
    bad = make_policy()
    with torch.no_grad():
        bad.network.action_out.weight.fill_(3e38)
    expected = [plain(policy, row(seed))[0] for seed in range(3)]
    outcomes = [submit(engine, f"robot {seed}", row(seed)) for seed in range(3)]
    with pytest.raises(Refused, match="canary"):
        model.stage(bad)
    outcomes += [submit(engine, f"robot {seed}", row(seed)) for seed in range(3)]
    for outcome, actions in zip(outcomes, expected * 2, strict=True):
        answered = answer_of(outcome)
        assert answered.version.number == 0
        assert near(answered.actions, actions)
    assert all(numbers.isfinite().all() for numbers in (model.slots.keys, model.slots.values, model.slots.actions))
    good = other_statistics(policy)
    with torch.no_grad():
        for parameter in good.network.parameters():
            parameter.add_(0.01)
    model.stage(good)
    engine.between_passes(lambda: replace(engine, good, 1))
    outcome = answer_of(submit(engine, "left", row(1)))
    assert outcome.version.number == 1
    assert near(outcome.actions, plain(good, row(1))[0])
    assert model.slots.num_free == model.slots.sizes.num_slots


def test_staging_is_rehearsed_with_the_weights_that_serve_and_changes_nothing(engine, policy, monkeypatch):
    model, staged = engine.models["tiny"], []
    stage = model.stage
    monkeypatch.setattr(model, "stage", lambda policy: staged.append(policy) or stage(policy))
    model.rehearse_stage()
    assert staged == [model.policy]
    assert near(answer_of(submit(engine, "left", row(1))).actions, plain(policy, row(1))[0])


def test_what_a_robot_that_left_amid_a_chunk_had_is_wiped(engine, monkeypatch):
    """Nobody looked whether it was finite, and kernels mask no values of what lies behind a row's keys."""
    model = engine.models["tiny"]
    model.slots.keys.zero_()
    stall = Stall(monkeypatch, model, "run_expert")
    submit(engine, "left", row(1))
    assert stall.entered.wait(10.0)
    assert (model.slots.keys != 0).any()
    engine.withdraw("left")
    stall.gate.set()
    ended_s = time.monotonic() + 10.0
    while model.slots.num_free < model.slots.sizes.num_slots and time.monotonic() < ended_s:
        time.sleep(0.001)
    assert model.slots.num_free == model.slots.sizes.num_slots
    assert not (model.slots.keys != 0).any()


def test_what_was_prepared_ahead_of_a_change_is_prepared_again(engine, policy, monkeypatch):
    second, model = other_statistics(policy), engine.models["tiny"]
    stall = Stall(monkeypatch, policy, "observation", of="telling")
    telling = threading.Thread(target=model.expect, args=(row(2),), name="telling")
    telling.start()
    assert stall.entered.wait(10.0)
    model.fused.weights.stage(second.network.state_dict())
    engine.between_passes(lambda: replace(engine, second, 1))
    stall.gate.set()
    telling.join()
    assert near(answer_of(submit(engine, "left", row(2))).actions, plain(second, row(2))[0])


def test_a_question_that_is_late_leaves_its_place_to_the_next_one(clock, monkeypatch):
    """As many as may be are amid their prefixes and pause for a chunk of many steps; all get late while one more waits."""
    policy = make_policy(num_steps=40)
    model = FusedModel("tiny", policy, CPU, max_rows=4, max_texts=16)
    most = model.fused.settings.questions_at_once
    engine = UnitEngine({"tiny": model}, max_rows=4, max_texts=16, clock=clock)
    engine.start()
    device = SlowDevice(model, monkeypatch)
    monkeypatch.setattr(engine._scheduler.times, "likely_s", lambda *_: 0.0)
    lates = [ask(engine, SUBTASK, seed=1, deadline_s=1.0)[1]]
    device.has_launched("run_text_prefix")
    outcomes = submit(engine, "acts", row(3), deadline_s=60.0)
    lates += [ask(engine, SUBTASK, seed=2, deadline_s=1.0)[1] for _ in range(most - 1)]
    let_go_until(device, lambda: device.launched.count("run_text_prefix") == most)
    let_go_until(device, lambda: not engine._scheduler._texts_running)
    assert not model.fused._free_places
    _, last = ask(engine, SUBTASK, seed=4)
    clock.pushed_s = 2.0
    let_go_until(device, lambda: not last.empty() and not isinstance(last.queue[-1], str))
    for heard in lates:
        assert isinstance(heard.get(timeout=1.0).error, TooLate)
    assert whole_text(last) == "".join(policy.generate([sample(4)], SUBTASK, CPU))
    let_go_until(device, lambda: not outcomes.empty())
    monkeypatch.undo()
    engine.stop()


def test_nobody_is_told_an_end_twice_nor_after_it_left(ahead, clock, monkeypatch):
    engine, device = ahead

    def failing(launch):
        return functools.partial(fail_behind, device.launch(launch))

    monkeypatch.setattr(engine.models["tiny"], "launched", failing)
    _, heard = ask(engine, SUBTASK, seed=1, deadline_s=1.0)
    device.has_launched("run_text_prefix")
    clock.pushed_s = 2.0
    with engine._changed:
        engine._state.wake()
    assert isinstance(heard.get(timeout=5.0).error, TooLate)
    device.let_go()
    stop, left = ask(engine, SUBTASK, seed=1)
    device.has_launched("run_text_prefix", "run_text_prefix")
    stop()
    device.let_go()
    wait_for(lambda: not engine._state.num_outstanding)
    outcomes = submit(engine, "left", row(1))
    device.has_launched("run_text_prefix", "run_text_prefix", "run_prefix", *["run_expert"] * (MAX_AHEAD - 1))
    engine.withdraw("left")
    device.let_go(MAX_AHEAD)
    wait_for(lambda: not engine._state.num_outstanding)
    assert heard.empty()
    assert left.empty()
    assert outcomes.empty()


def fail_behind(wait):
    wait()
    raise ZeroDivisionError


def test_a_chunk_that_cannot_be_fetched_is_told_and_the_engine_goes_on(engine, policy, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(launches, "to_host", lambda _: 1 / 0)
        assert isinstance(submit(engine, "left", row(1)).get(timeout=10.0), InternalError)
    assert near(answer_of(submit(engine, "left", row(2))).actions, plain(policy, row(2))[0])


def test_a_chunk_is_read_when_its_copy_has_arrived(engine, policy, monkeypatch):
    """It travels behind the unit that made it; until then its place holds an older one."""
    copies = []

    def travelling(tensor):
        place = torch.full_like(tensor, 7.0)
        copies.append((place, tensor.clone()))
        return place

    def arrive():
        for place, numbers in copies:
            place.copy_(numbers)

    monkeypatch.setattr(launches, "to_host", travelling)
    monkeypatch.setattr(launches, "arrival", lambda _: arrive)
    assert near(answer_of(submit(engine, "left", row(1))).actions, plain(policy, row(1))[0])
