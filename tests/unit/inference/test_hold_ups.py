"""Towards each chunk a question has one text unit in all, of which a joint step uses up its part."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.hold_ups import HoldUps, may_run_alone, may_step_together


def ran(found: HoldUps, *who: str) -> None:
    found.text_begins("unit", who)
    found.text_ends("unit")


def test_who_held_a_chunk_up_pauses_while_it_is_there() -> None:
    found = HoldUps()
    found.came("a")
    ran(found, "q")
    found.came("b")  # Nobody runs: it waits for nobody.
    assert not may_run_alone("q", found.used())
    assert may_run_alone("another", found.used())
    found.left("b")
    assert not may_run_alone("q", found.used())
    found.left("a")
    assert may_run_alone("q", found.used())


def test_a_chunk_that_comes_while_text_runs_is_held_up_by_it() -> None:
    found = HoldUps()
    found.text_begins(1, ["q", "r"])
    found.came("a")
    found.text_ends(1)
    assert found.used() == {"q": 0.5, "r": 0.5}


def test_a_chunk_that_comes_while_several_units_run_is_held_up_by_all_of_them() -> None:
    found = HoldUps()
    found.text_begins(1, ["q", "r"])
    found.text_begins(2, "qrst")
    found.came("a")
    found.text_ends(1)
    found.came("b")
    found.text_ends(2)
    assert found.used() == {"q": 0.75, "r": 0.75, "s": 0.25, "t": 0.25}
    found.left("a")
    assert found.used() == dict.fromkeys("qrst", 0.25)


def test_what_runs_counts_also_before_a_chunk_comes() -> None:
    found = HoldUps()
    found.text_begins(1, ["q"])
    assert not may_run_alone("q", found.used()), "a chunk that comes now would wait for two"
    found.text_begins(2, ["r", "s"])
    assert may_step_together("rs", found.used()) == {"r", "s"}
    found.text_begins(3, ["r", "s"])
    assert may_step_together("rs", found.used()) == frozenset()
    for unit in (1, 2, 3):
        found.text_ends(unit)
    assert found.used() == {}


def test_the_chunk_that_waited_most_for_a_question_counts() -> None:
    found = HoldUps()
    found.came("early")
    ran(found, "q", "r")
    found.came("late")
    ran(found, "q", "r", "s", "t")
    assert found.used() == {"q": 0.75, "r": 0.75, "s": 0.25, "t": 0.25}
    found.left("early")
    assert found.used() == dict.fromkeys("qrst", 0.25)


@pytest.mark.parametrize("number", [1, 2, 3, 7, 9, 16, 31])
def test_so_many_questions_step_together_as_often_as_they_are(number: int) -> None:
    found = HoldUps()
    found.came("a")
    who = [f"q{index}" for index in range(number)]
    for _ in range(number):
        assert may_step_together(who, found.used()) == set(who)
        ran(found, *who)
    assert may_step_together(who, found.used()) == frozenset()


def test_who_has_too_little_left_is_left_out_and_the_others_answer_for_more() -> None:
    used = {"a": 0.0, "b": 0.5, "c": 0.7, "d": 1.0}
    # Four would need 1/4 each, which d has not, three 1/3, which c has not; two have 1/2 each.
    assert may_step_together("dcba", used) == {"a", "b"}
    assert may_step_together("dcb", used) == frozenset()
    assert may_step_together("cab", {**used, "c": 0.6}) == {"a", "b", "c"}
    assert may_step_together("", used) == frozenset()
    assert not may_run_alone("b", used), "what is not shared takes a whole unit"


@given(st.lists(st.tuples(st.sampled_from(["comes", "goes", "step", "alone", "ends"]), st.integers(0, 5)), max_size=60))
def test_so_many_questions_hold_a_chunk_up_by_no_more_units_than_they_are(happens: list[tuple[str, int]]) -> None:
    found = HoldUps()
    there: dict[int, list[tuple[int, ...]]] = {}
    running: dict[int, tuple[int, ...]] = {}
    for unit, (what, number) in enumerate(happens):
        if what == "comes" and number not in there:
            found.came(number)
            there[number] = list(running.values())
        elif what == "goes":
            found.left(number)
            there.pop(number, None)
        elif what == "ends" and running:
            found.text_ends(first := min(running))
            del running[first]
        elif what in ("step", "alone"):
            alone = [number] if may_run_alone(number, found.used()) else []
            who = alone if what == "alone" else sorted(may_step_together(range(number + 1), found.used()))
            if who:
                found.text_begins(unit, who)
                running[unit] = tuple(who)
                for units in there.values():
                    units.append(tuple(who))
    for units in there.values():
        parts: Counter[int] = Counter()
        for who in units:
            for one in who:
                parts[one] += 1.0 / len(who)  # type: ignore[assignment]
        assert all(part <= 1.0 + 1e-6 for part in parts.values())
        assert len(units) <= len(parts)
