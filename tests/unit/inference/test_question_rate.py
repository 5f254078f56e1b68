"""What a robot asks of the text head counts while it asks, and no longer: with a clock of numbers."""

from __future__ import annotations

import pytest

from services.inference.question_rate import FADE_S, QuestionRate


def asks(rate: QuestionRate, *, every_s: float, tokens: int, from_s: float, until_s: float) -> float:
    """The time of the last question."""
    now_s = from_s
    while now_s + every_s <= until_s:
        now_s += every_s
        rate.asked(now_s)
        for token in range(tokens):
            rate.heard(now_s + 0.01 * (token + 1))
    return now_s


def test_of_a_robot_that_never_asked_nothing_is_known() -> None:
    assert QuestionRate().demand(1000.0) is None


@pytest.mark.parametrize(("every_s", "tokens"), [(0.5, 3), (2.0, 20), (5.0, 60)])
def test_a_robot_that_keeps_asking_is_counted_as_it_asks(every_s: float, tokens: int) -> None:
    rate = QuestionRate()
    last_s = asks(rate, every_s=every_s, tokens=tokens, from_s=500.0, until_s=600.0)
    # Between two questions, which is where the fading count is right on average.
    demand = rate.demand(last_s + every_s / 2)
    assert demand is not None
    assert demand.questions_per_s == pytest.approx(1 / every_s, rel=0.05)
    assert demand.tokens == pytest.approx(tokens, rel=0.1)


def test_the_first_question_counts_before_its_answer_is_there() -> None:
    rate = QuestionRate()
    rate.asked(50.0)
    first = rate.demand(50.0)
    assert first is not None
    assert (first.questions_per_s, first.tokens) == (pytest.approx(1 / FADE_S), 0.0)
    for token in range(8):
        rate.heard(50.0 + 0.01 * token)
    answered = rate.demand(50.1)
    assert answered is not None
    assert answered.tokens == pytest.approx(8, rel=0.01)


def test_who_stops_asking_stops_counting() -> None:
    rate = QuestionRate()
    last_s = asks(rate, every_s=2.0, tokens=20, from_s=0.0, until_s=100.0)
    shares = []
    for later_s in (1.0, 11.0, 21.0, 41.0):
        demand = rate.demand(last_s + later_s)
        assert demand is not None
        shares.append(demand.questions_per_s)
    assert shares == sorted(shares, reverse=True)
    assert shares[1] == pytest.approx(shares[0] / 2.718, rel=0.001)
    # One long answer would else be hurried for as long as the session lives.
    assert rate.demand(last_s + 6 * FADE_S) is None


def test_looking_changes_nothing_and_a_clock_that_goes_back_neither() -> None:
    looked, alone = QuestionRate(), QuestionRate()
    for rate in (looked, alone):
        rate.asked(10.0)
    for step in range(50):
        looked.demand(10.0 + 0.1 * step)
    looked.demand(9.0)
    one, other = looked.demand(15.0), alone.demand(15.0)
    assert one is not None
    assert other is not None
    assert one.questions_per_s == pytest.approx(other.questions_per_s)
