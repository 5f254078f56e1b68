"""Texts that run ahead of their tokens, and those whose tokens are drawn by the host."""

from __future__ import annotations

import dataclasses
import functools
import threading
import time

import pytest
import torch

from policies import text
from services.inference import unit_results
from services.inference.fused.units import TOO_SHORT
from tests.support.prompted_lab import CPU
from tests.support.unit_lab import (
    DRAWN,
    SUBTASK,
    Clock,
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
    whole_text,
)
from tests.support.waiting import wait_until


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


@pytest.fixture
def engine(policy):
    with running(policy) as made:
        yield made


def test_texts_that_step_together_run_ahead_of_their_tokens_and_say_the_same(ahead, policy):
    engine, device = ahead
    heard = [ask(engine, SUBTASK, seed=seed)[1] for seed in range(3)]
    let_go_until(device, lambda: len(joint_steps_on_their_way(engine)) >= 2)
    letting_go = threading.Thread(target=let_all_go, args=(device, engine))
    letting_go.start()
    for seed, queued in enumerate(heard):
        assert whole_text(queued) == "".join(policy.generate([sample(seed)], SUBTASK, CPU))
    letting_go.join()


def test_a_step_that_a_text_takes_after_its_end_is_for_nothing(ahead, policy, monkeypatch):
    engine, device = ahead
    model = engine.models["tiny"]
    rules = policy.decoding(SUBTASK)
    spoken = [tokens_of(policy, seed) for seed in range(3)]
    # One of them ends before its last tokens.
    end = spoken[0][8]
    assert end not in spoken[0][:8]
    monkeypatch.setattr(policy, "decoding", lambda request: dataclasses.replace(rules, end_token=end))
    expected = ["".join(policy.generate([sample(seed)], SUBTASK, CPU)) for seed in range(3)]
    rows = []
    text_row = model.text_row
    monkeypatch.setattr(model, "text_row", lambda *asked: rows.append(text_row(*asked)) or rows[-1])
    heard = [ask(engine, SUBTASK, seed=seed)[1] for seed in range(3)]
    let_go_until(device, lambda: len(joint_steps_on_their_way(engine)) >= 2)
    while not rows[0].has_ended:  # The device is slow, whatever this machine is: always a step behind the engine.
        wait_until(lambda: rows[0].has_ended or len(joint_steps_on_their_way(engine)) >= 2)
        device.let_go()
    letting_go = threading.Thread(target=let_all_go, args=(device, engine))
    letting_go.start()
    assert [whole_text(queued) for queued in heard] == expected
    letting_go.join()
    assert rows[0].tokens == spoken[0][:9]
    assert rows[0].num_foretold > 9, "it did step ahead of its end"
    engine.between_passes(lambda: None)
    assert model.slots.num_free == model.slots.sizes.num_slots


def test_a_token_that_is_too_early_to_end_is_one_whatever_is_known_of_those_before_it(ahead, policy, monkeypatch):
    engine, device = ahead
    fused, rules = engine.models["tiny"].fused, policy.decoding(SUBTASK)
    monkeypatch.setattr(policy, "decoding", lambda request: dataclasses.replace(rules, min_new_tokens=7))
    flags = {}
    for name in ("first_text", "text_step"):
        monkeypatch.setattr(fused, name, functools.partial(noting_flags, flags, getattr(fused, name)))
    heard = [ask(engine, SUBTASK, seed=seed)[1] for seed in range(3)]
    let_go_until(device, lambda: len(joint_steps_on_their_way(engine)) >= 2)
    letting_go = threading.Thread(target=let_all_go, args=(device, engine))
    letting_go.start()
    for queued in heard:
        whole_text(queued)
    letting_go.join()
    expected = [TOO_SHORT] * 7 + [0] * (rules.max_new_tokens - 7)
    assert [[flag & TOO_SHORT for flag in of_row] for of_row in flags.values()] == [expected] * 3


def noting_flags(flags, unit, texts):
    for text_row in texts:
        flags.setdefault(text_row.slot, []).append(text_row.flags)
    return unit(texts)


def joint_steps_on_their_way(engine):
    """Of three texts."""
    with engine._changed:
        return [unit for unit in engine._scheduler._texts_running.values() if unit.size == 3]


def tokens_of(policy, seed):
    asked = policy.question(sample(seed), SUBTASK)
    inputs = policy._inputs([sample(seed)], [asked.prompt], asked.state, None, len(asked.prompt.tokens), CPU)
    generated = text.generate(policy.network, policy.text_state(inputs), policy.decoding(SUBTASK), [torch.Generator()])
    return [int(token) for token in generated]


def let_all_go(device, engine):
    """Until nothing is in work; a moment late, so that the engine is ahead."""
    while engine.pending() or engine._state.num_outstanding:
        time.sleep(0.003)
        if not device._gates.empty():
            device.let_go()


def test_chunks_do_not_wait_for_a_token_that_is_drawn(engine, policy, monkeypatch):
    stall = Stall(monkeypatch, text, "draw")
    _, heard = ask(engine, DRAWN, seed=2)
    assert stall.entered.wait(10.0)
    assert near(answer_of(submit(engine, "acts", row(3))).actions, plain(policy, row(3))[0])
    assert heard.empty()
    stall.gate.set()
    assert whole_text(heard) == "".join(policy.generate([sample(2)], DRAWN, CPU))


def test_pieces_of_a_text_do_not_pass_those_that_the_thread_of_drawn_text_still_sends(engine, policy, monkeypatch):
    """One stepped with a drawn text that ended with that step: the next one is its own, and only its order is left of it."""
    gate, holding = hold(engine)
    short = dataclasses.replace(DRAWN, max_new_tokens=3)
    _, greedy = ask(engine, SUBTASK, seed=1)
    _, drawn = ask(engine, short, seed=2)
    of_drawing = Stall(monkeypatch, unit_results, "end_text", of="drawing")
    gate.set()
    holding.join()
    # The drawn text is told its end; the pieces of the greedy one in that unit are sent, those behind it wait.
    assert of_drawing.entered.wait(10.0)
    time.sleep(0.1)
    num_heard = greedy.qsize()
    assert engine._state.num_outstanding > 0
    time.sleep(0.1)
    assert greedy.qsize() == num_heard < len(tokens_of(policy, 1))
    of_drawing.gate.set()
    assert whole_text(greedy) == "".join(policy.generate([sample(1)], SUBTASK, CPU))
    whole_text(drawn)
