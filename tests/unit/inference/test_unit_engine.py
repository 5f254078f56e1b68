"""The engine of prepared units answers what the plain policy answers, whoever else is served."""

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

from manyhands.errors import InternalError, InvalidInput, TooLate, Unreachable
from policies.policy import TextKind, TextRequest
from services.inference import unit_warm_up
from services.inference.engine_port import Answer, Observed, Superseded
from services.inference.fused_model import FusedModel, can_be_fused
from services.inference.service_times import ServiceTimes
from services.inference.unit_engine import UnitEngine
from services.inference.unit_warm_up import capacity_of
from services.inference.units import UnitKind, group
from tests.support import prompted_lab
from tests.support.prompted_lab import CPU, STATE
from tests.support.unit_lab import (
    KINDS,
    SUBTASK,
    answer_of,
    ask,
    hold,
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


@pytest.fixture(scope="module")
def engine(policy):
    with running(policy) as made:
        yield made


def test_one_robots_chunk_is_the_plain_one(engine, policy):
    outcome = answer_of(submit(engine, "left", row(1)))
    actions, carried = plain(policy, row(1))
    assert near(outcome.actions, actions)
    assert near(outcome.model_actions, carried)
    assert outcome.queue_s >= 0 and outcome.prefix_s > 0 and outcome.sample_s > 0  # noqa: PT018


def test_rows_of_different_robots_do_not_change_each_other(engine, policy):
    """Different prompts, with and without a committed prefix, with different delays, some joining midway."""
    random_numbers = np.random.default_rng(0)
    asked = [
        row(
            seed,
            prefix=None if seed % 3 == 0 else random_numbers.normal(size=(1 + seed % 5, 8)).astype(np.float32) * 0.3,
            delay_steps=seed % 3,
            execution_horizon=2 + seed % 4,
            task="tidy up" + " the table" * (seed % 4),
        )
        for seed in range(9)
    ]
    gate, holding = hold(engine)
    waiting = [submit(engine, f"robot {seed}", one) for seed, one in enumerate(asked)]
    gate.set()
    holding.join()
    sizes = set()
    for one, outcomes in zip(asked, waiting, strict=True):
        outcome = answer_of(outcomes)
        sizes.add(outcome.batch_size)
        assert near(outcome.actions, plain(policy, one)[0])
    assert max(sizes) > 1, "they were to share units"


def slices_run(engine):
    return engine.device_time().units["tiny", UnitKind.TEXT_PREFIX].num_units


@pytest.mark.parametrize(
    ("owner", "picture", "is_seen"), [("left", 1, True), ("left", 2, False), ("right", 1, False), ("", 1, False)]
)
def test_a_question_about_what_its_robot_acts_on_sees_no_picture_again(policy, owner, picture, is_seen):
    """And says what it says else; another robot's question, or one about other pictures, sees for itself."""
    with running(policy) as engine:
        fused = engine.models["tiny"].fused
        answer_of(submit(engine, "left", row(1)))
        _, heard = ask(engine, SUBTASK, seed=picture, owner=owner)
        assert whole_text(heard) == "".join(policy.generate([sample(picture)], SUBTASK, CPU))
        left_out = fused.num_vision_slices if is_seen else 0
        assert left_out < fused.num_prefix_slices
        assert slices_run(engine) == fused.num_prefix_slices - left_out


def test_a_question_asked_beside_its_chunk_waits_for_what_that_sees(policy):
    """As ask_subtask_for asks; also of chunks that see their pictures in one unit."""
    with running(policy) as engine:
        fused = engine.models["tiny"].fused
        gate, holding = hold(engine)
        chunks = [submit(engine, owner, row(seed)) for owner, seed in (("left", 1), ("right", 2))]
        asked = [ask(engine, SUBTASK, seed=seed, owner=owner)[1] for owner, seed in (("left", 1), ("right", 2))]
        gate.set()
        holding.join()
        for seed, heard in zip((1, 2), asked, strict=True):
            assert whole_text(heard) == "".join(policy.generate([sample(seed)], SUBTASK, CPU))
        assert max(answer_of(chunk).batch_size for chunk in chunks) == 2
        assert slices_run(engine) == 2 * (fused.num_prefix_slices - fused.num_vision_slices)


def test_what_is_kept_of_chunks_that_are_seen_together_is_each_robots_own(policy):
    model = FusedModel("tiny", policy, CPU, max_rows=4, max_texts=1)
    rows = [model.chunk_row(row(seed), owner=f"robot {seed}") for seed in range(3)]
    model.run_prefix(rows[:1])
    model.run_prefix(rows[1:])
    found = [model._pictures.find(one.owner, one.pictures) for one in rows]
    for one, seen in zip(rows, found, strict=True):
        assert torch.allclose(seen, model._pictures.see([one])[0].flatten(0, 1), atol=1e-6)
    assert not torch.allclose(found[1], found[2], atol=1e-3)


def test_new_weights_see_pictures_again(policy):
    with running(policy) as engine:
        model = engine.models["tiny"]
        answer_of(submit(engine, "left", row(1)))
        other = copy.deepcopy(policy)
        for name, parameter in other.network.named_parameters():
            if name.startswith("vision."):
                parameter.data.normal_(std=0.5)
        model.stage(other)
        engine.between_passes(lambda: model.replace(other, model.version, model.digests))
        _, heard = ask(engine, SUBTASK, seed=1, owner="left")
        expected = "".join(other.generate([sample(1)], SUBTASK, CPU))
        assert expected != "".join(policy.generate([sample(1)], SUBTASK, CPU))
        assert whole_text(heard) == expected


@pytest.mark.parametrize("kind", list(KINDS))
def test_greedy_text_is_the_plain_one(engine, policy, kind):
    request = TextRequest(kind=kind, user_text="what now")
    _, heard = ask(engine, request, seed=4)
    expected = "".join(policy.generate([sample(4)], request, CPU))
    assert expected
    assert whole_text(heard) == expected


def test_drawn_text_is_the_plain_one(engine, policy):
    request = TextRequest(kind=TextKind.SUBTASK, temperature=1.0, top_p=0.9)
    _, heard = ask(engine, request, seed=2)
    assert whole_text(heard) == "".join(policy.generate([sample(2)], request, CPU))


@pytest.mark.parametrize("previous", ["itself", "half", "else"])
def test_a_draft_changes_nothing_but_the_time(engine, policy, previous):
    expected = "".join(policy.generate([sample(5)], TextRequest(kind=TextKind.SUBTASK), CPU))
    draft = {"itself": expected, "half": expected[: len(expected) // 2] + "zzz", "else": "something else"}[previous]
    _, heard = ask(engine, TextRequest(kind=TextKind.SUBTASK, previous_text=draft), seed=5)
    assert whole_text(heard) == expected


def read_prompt(model, row):
    for _ in range(model.num_prefix_slices):
        model.run_text_prefix(row)()


@pytest.mark.parametrize("num_right", [12, 5, 1, 0])
def test_a_draft_gives_what_it_foresaw_and_one_token_more(policy, num_right):
    model = FusedModel("tiny", policy, CPU, max_rows=1, max_texts=1)
    given = sample(5)
    observed = Observed(observation=given.observation, task=given.task)
    slow = model.text_row(observed, TextRequest(kind=TextKind.SUBTASK))
    read_prompt(model, slow)
    while len(slow.tokens) < 12:
        model.run_text([slow])()
    model.release(slow)
    draft = [token if place < num_right else token + 1 for place, token in enumerate(slow.tokens)]
    quick = dataclasses.replace(model.text_row(observed, TextRequest(kind=TextKind.SUBTASK)), draft=draft)
    read_prompt(model, quick)
    model.run_draft(quick)()
    expected = {12: 12, 5: 6, 1: 2, 0: 1}[num_right]  # No more than asked for.
    assert len(quick.tokens) == expected
    while len(quick.tokens) < 12:
        model.run_text([quick])()
    assert quick.tokens[:12] == slow.tokens


def test_texts_of_several_robots_beside_chunks(engine, policy):
    requests = [TextRequest(kind=TextKind.SUBTASK, max_new_tokens=4 + n) for n in range(6)]
    asked = [ask(engine, request, seed=n) for n, request in enumerate(requests)]
    chunks = [submit(engine, f"acts {n}", row(n)) for n in range(6)]
    for n, outcomes in enumerate(chunks):
        assert near(answer_of(outcomes).actions, plain(policy, row(n))[0])
    for n, (_, heard) in enumerate(asked):
        assert whole_text(heard) == "".join(policy.generate([sample(n)], requests[n], CPU))


def test_a_robot_with_many_questions_does_not_keep_another_from_asking(engine):
    """Four texts may be in progress: the other robot's comes behind those, although ten were asked before it."""
    ended = []

    class Heard(queue.Queue):
        def put(self, piece, **how):
            super().put(piece, **how)
            if not isinstance(piece, str):
                ended.append(self)

    gate, holding = hold(engine)
    many = [ask(engine, SUBTASK, seed=seed, owner="asks much", heard=Heard())[1] for seed in range(10)]
    _, one = ask(engine, SUBTASK, seed=11, owner="asks once", heard=Heard())
    gate.set()
    holding.join()
    for heard in [*many, one]:
        whole_text(heard)
    assert ended.index(one) <= 7


def test_all_slots_come_back(engine):
    model = engine.models["tiny"]
    engine.between_passes(lambda: None)
    assert model.slots.num_free == model.slots.sizes.num_slots


def test_a_newer_observation_takes_the_place(engine):
    gate, holding = hold(engine)
    first = submit(engine, "left", row(1), request_id=1)
    second = submit(engine, "left", row(2), request_id=2)
    assert isinstance(first.get(timeout=5.0), Superseded)
    gate.set()
    answer_of(second)
    holding.join()


def test_what_cannot_be_in_time_is_refused(engine):
    assert isinstance(submit(engine, "left", row(1), deadline_s=0.0).get(timeout=5.0), TooLate)


def test_a_bad_observation_is_refused_by_name(engine):
    bad = row(1)
    bad.sample.observation[STATE][0] = np.nan
    outcome = submit(engine, "left", bad).get(timeout=5.0)
    assert isinstance(outcome, InvalidInput)
    assert outcome.field == STATE


def test_withdrawn_work_frees_its_slots_and_nobody_is_told(engine):
    gate, holding = hold(engine)
    outcomes = submit(engine, "gone", row(1))
    stop, heard = ask(engine, TextRequest(kind=TextKind.SUBTASK))
    engine.withdraw("gone")
    stop()
    gate.set()
    holding.join()
    test_all_slots_come_back(engine)
    assert engine.pending() == 0
    assert outcomes.empty()
    assert heard.empty()


def amid_a_prefix(engine, monkeypatch, happens):
    """happens() when a question's first slice has run; answers what runs, a name a unit."""
    model, ran = engine.models["tiny"], []
    runs = {name: getattr(model, name) for name in ("run_text_prefix", "run_prefix", "run_expert", "run_text")}

    def run(name, rows):
        at = getattr(rows, "num_slices", None)
        ran.append(name if at is None else f"slice {at}")
        take = runs[name](rows)
        if at == 0 and ran.count("slice 0") == 1:
            happens()
        return take

    for name in runs:
        monkeypatch.setattr(model, name, functools.partial(run, name))
    return ran


def test_a_chunk_that_comes_amid_a_questions_prefix_waits_for_one_slice(engine, policy, monkeypatch):
    """The one that runs: the chunk's units come next, all of them."""
    answers = []
    ran = amid_a_prefix(engine, monkeypatch, lambda: answers.append(submit(engine, "acts", row(3))))
    _, heard = ask(engine, TextRequest(kind=TextKind.SUBTASK), seed=4)
    assert whole_text(heard) == "".join(policy.generate([sample(4)], TextRequest(kind=TextKind.SUBTASK), CPU))
    assert near(answer_of(answers[0]).actions, plain(policy, row(3))[0])
    num_steps = engine.models["tiny"].num_steps
    assert ran[: num_steps + 3] == ["slice 0", "run_prefix", *["run_expert"] * num_steps, "slice 1"]


@pytest.mark.parametrize("how", ["withdrawn", "failed"])
def test_a_question_that_ends_amid_its_prefix_gives_its_slot_back(engine, policy, monkeypatch, how):
    gate, holding = hold(engine)
    with monkeypatch.context() as amid:
        stop, heard = ask(engine, TextRequest(kind=TextKind.SUBTASK), seed=6)
        broken = functools.partial(amid.setattr, engine.models["tiny"].fused, "prefix_slice", lambda slot, at: 1 / 0)
        ran = amid_a_prefix(engine, amid, stop if how == "withdrawn" else broken)
        gate.set()
        holding.join()
        while engine.pending():
            time.sleep(0.001)
        engine.between_passes(lambda: None)
    assert ran == (["slice 0"] if how == "withdrawn" else ["slice 0", "slice 1"])
    test_all_slots_come_back(engine)
    if how == "withdrawn":
        assert heard.empty()
    else:
        assert isinstance(heard.get(timeout=5.0).error, InternalError)
    _, heard = ask(engine, TextRequest(kind=TextKind.SUBTASK), seed=7)
    assert whole_text(heard) == "".join(policy.generate([sample(7)], TextRequest(kind=TextKind.SUBTASK), CPU))


def test_weights_that_change_amid_a_prefix_make_it_begin_again(policy, monkeypatch):
    """Else its layers would be of two versions, and the answer could name neither."""
    second = make_policy()
    with torch.no_grad():
        for parameter in second.network.parameters():
            parameter.mul_(1.5)
    engine = UnitEngine({"tiny": FusedModel("tiny", policy, CPU, max_rows=1, max_texts=1)}, max_rows=1, max_texts=1)
    engine.start()
    model, changing = engine.models["tiny"], []
    model.fused.weights.stage(second.network.state_dict())

    def change():
        changing.append(threading.Thread(target=engine.between_passes, args=(model.fused.weights.commit,)))
        changing[0].start()
        while not engine._swaps:
            time.sleep(0.001)

    ran = amid_a_prefix(engine, monkeypatch, change)
    _, heard = ask(engine, TextRequest(kind=TextKind.SUBTASK), seed=8)
    expected = ["".join(one.generate([sample(8)], TextRequest(kind=TextKind.SUBTASK), CPU)) for one in (policy, second)]
    assert expected[0] != expected[1]
    assert whole_text(heard) == expected[1]
    assert ran[:3] == ["slice 0", "slice 0", "slice 1"]
    engine.stop()
    changing[0].join()


def test_the_scheduler_is_told_of_the_longest_slice(policy, monkeypatch):
    model = FusedModel("tiny", policy, CPU, max_rows=1, max_texts=1)
    run = model.fused.prefix_slice
    monkeypatch.setattr(model.fused, "prefix_slice", lambda slot, at: (run(slot, at), time.sleep(0.05 if at == 0 else 0.0)))
    times = ServiceTimes(forgets=False)
    unit_warm_up.measure("tiny", model, times, 0.0)
    for bucket in model.fused.settings.prompt_lengths:
        assert times.mean_s(group(UnitKind.TEXT_PREFIX, "tiny", bucket), 1) >= 0.05


def test_the_check_of_a_draft_counts_as_two_steps_of_one_text(policy, monkeypatch):
    """However many texts a step of many was measured with: it checks one."""
    model = FusedModel("tiny", policy, CPU, max_rows=1, max_texts=4)
    monkeypatch.setattr(unit_warm_up, "_token_s", lambda model, size: 0.001 * size)
    times = ServiceTimes(forgets=False)
    unit_warm_up.measure("tiny", model, times, 0.0)
    for bucket in model.fused.settings.prompt_lengths:
        assert times.mean_s(group(UnitKind.DRAFT_CHECK, "tiny", bucket), 1) == pytest.approx(0.002)


def test_weights_change_between_chunks_only(policy):
    """Under load every chunk is wholly of one version, and names it."""
    first, second = make_policy(), make_policy()
    with torch.no_grad():
        for parameter in second.network.parameters():
            parameter.add_(0.01)
    model = FusedModel("tiny", first, CPU, max_rows=4, max_texts=1)
    engine = UnitEngine({"tiny": model}, max_rows=4, max_texts=1)
    engine.start()
    model.fused.weights.stage(second.network.state_dict())
    versions = {0: first, 1: second}
    before = model.version

    def swap():
        model.fused.weights.commit()
        after = type(before)()
        after.CopyFrom(before)
        after.number = 1
        model.version = after

    outcomes = {}
    for seed in range(40):
        outcomes[seed] = submit(engine, f"robot {seed % 7}", row(seed))
        time.sleep(0.002)
        if seed == 20:
            engine.between_passes(swap)
    engine.stop()
    seen = set()
    for seed, waiting in outcomes.items():
        outcome = waiting.get(timeout=30.0)
        if isinstance(outcome, Answer):
            seen.add(outcome.version.number)
            assert near(outcome.actions, plain(versions[outcome.version.number], row(seed))[0])
    assert seen == {0, 1}


def test_a_stopped_engine_refuses(policy):
    engine = UnitEngine({"tiny": FusedModel("tiny", policy, CPU, max_rows=1, max_texts=1)}, max_rows=1, max_texts=1)
    engine.start()
    waiting = submit(engine, "left", row(1))
    engine.stop()
    answer_of(waiting)
    assert isinstance(submit(engine, "left", row(1)).get(timeout=5.0), Unreachable)
    _, heard = ask(engine, TextRequest(kind=TextKind.SUBTASK))
    assert isinstance(heard.get(timeout=5.0).error, Unreachable)


def test_which_policies_can_be_fused():
    assert can_be_fused(prompted_lab.policy("pi052"))
    assert can_be_fused(prompted_lab.policy("pi05"))
    assert not can_be_fused(prompted_lab.policy("pi052", prompts={"joint": True}))
    assert not can_be_fused(prompted_lab.policy("smolvla2"))


def test_numbers_that_are_none_stay_with_whom_they_came(policy):
    """A masked key that is not a number spoils a row through 0 * nan: the slot's next user must not find any."""
    engine = UnitEngine({"tiny": FusedModel("tiny", policy, CPU, max_rows=1, max_texts=1)}, max_rows=1, max_texts=1)
    engine.start()
    spoilt = row(1, prefix=np.full((3, 8), np.inf, dtype=np.float32), delay_steps=1)
    for _ in range(3):
        assert isinstance(submit(engine, "left", spoilt).get(timeout=30.0), InternalError)
        assert near(answer_of(submit(engine, "right", row(2))).actions, plain(policy, row(2))[0])
    engine.stop()


def test_text_that_is_no_number_is_an_error():
    policy = make_policy()
    policy.network.language.layers[-1].o.weight.data.fill_(float("inf"))
    engine = UnitEngine({"tiny": FusedModel("tiny", policy, CPU, max_rows=1, max_texts=1)}, max_rows=1, max_texts=1)
    engine.start()
    _, heard = ask(engine, TextRequest(kind=TextKind.SUBTASK))
    assert isinstance(heard.get(timeout=30.0).error, InternalError)
    answer_of(submit(engine, "left", row(1)))  # Actions do not read the last layer's output.
    engine.stop()


@pytest.mark.parametrize("unit", ["run_prefix", "run_expert"])
def test_a_unit_that_raises_is_told_and_the_engine_goes_on(policy, monkeypatch, unit):
    model = FusedModel("tiny", policy, CPU, max_rows=2, max_texts=1)
    engine = UnitEngine({"tiny": model}, max_rows=2, max_texts=1)
    engine.start()
    with monkeypatch.context() as broken:
        broken.setattr(model, unit, lambda rows: 1 / 0)
        outcomes = [submit(engine, owner, row(1)) for owner in ("left", "right")]
        assert all(isinstance(waiting.get(timeout=30.0), InternalError) for waiting in outcomes)
    assert near(answer_of(submit(engine, "left", row(2))).actions, plain(policy, row(2))[0])
    test_all_slots_come_back(engine)
    engine.stop()


def test_a_request_that_the_policy_trips_over_is_told_and_the_engine_goes_on(engine, policy, monkeypatch):
    def trip(*_):
        raise KeyError("no such thing")

    with monkeypatch.context() as broken:
        broken.setattr(policy, "observation", trip)
        broken.setattr(policy, "question", trip)
        assert isinstance(submit(engine, "left", row(1)).get(timeout=5.0), InternalError)
        _, heard = ask(engine, TextRequest(kind=TextKind.SUBTASK))
        assert isinstance(heard.get(timeout=5.0).error, InternalError)
    answer_of(submit(engine, "left", row(1)))


def test_an_answer_longer_than_there_is_room_for_is_refused(engine):
    """Beyond it a text would write over its own keys, and be another one than the plain module's."""
    _, heard = ask(engine, TextRequest(kind=TextKind.SUBTASK, max_new_tokens=13))
    error = heard.get(timeout=5.0).error
    assert isinstance(error, InvalidInput)
    assert error.field == "max_new_tokens"


@pytest.mark.parametrize(("policy_type", "question_s", "max_texts"), [("pi052", 0.05 + 0.004, 4), ("pi05", 0.0, 1)])
def test_what_is_promised_is_chunks_with_shared_steps_and_what_a_question_needs(policy_type, question_s, max_texts):
    model = FusedModel("tiny", make_policy(policy_type), CPU, max_rows=4, max_texts=4)
    times = ServiceTimes(forgets=False)
    longest = model.fused.settings.prompt_lengths[-1]
    for kind, size, seconds in (
        (UnitKind.PREFIX, 1, 0.010),
        (UnitKind.PREFIX, 4, 0.040),
        (UnitKind.EXPERT, 1, 0.002),
        (UnitKind.EXPERT, 4, 0.0024),
        (UnitKind.TEXT_PREFIX, 1, 0.020),
        (UnitKind.DRAFT_CHECK, 1, 0.004),
        (UnitKind.TEXT, 1, 0.001),
        (UnitKind.TEXT, 4, 0.003),
    ):
        times.observe(group(kind, "tiny", longest), size, seconds, 0.0)
    told = capacity_of("tiny", model, times, 0.05)
    assert told.chunks_per_s == pytest.approx(1 / (0.010 + model.num_steps * 0.0024 / 4))
    assert told.question_s == pytest.approx(question_s)
    assert told.text_step_s == (0.003 if question_s else 0.0)
    assert told.max_texts == max_texts


def test_a_question_costs_all_of_its_slices_and_a_chunk_may_have_to_wait_for_the_longest(policy, monkeypatch):
    monkeypatch.setattr(unit_warm_up, "_slices_s", lambda model, bucket: [0.01, 0.03, 0.02])
    model, times = FusedModel("tiny", policy, CPU, max_rows=1, max_texts=1), ServiceTimes(forgets=False)
    told = unit_warm_up.measure("tiny", model, times, 0.0)
    longest = model.fused.settings.prompt_lengths[-1]
    assert told.question_s == pytest.approx(0.06 + times.mean_s(group(UnitKind.DRAFT_CHECK, "tiny", longest), 1))
    assert times.mean_s(group(UnitKind.TEXT_PREFIX, "tiny", longest), 1) == pytest.approx(0.03)


def test_an_engine_says_what_it_measured(engine):
    told = engine.capacity("tiny")
    assert told.chunks_per_s > 0
    assert told.question_s > told.text_step_s > 0
