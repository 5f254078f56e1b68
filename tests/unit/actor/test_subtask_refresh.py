"""Which subtask is acted on, and when the text head is asked for the next."""

from __future__ import annotations

from actor.subtask_refresh import SubtaskRefresh

TASK = "tidy up"


def asks_in(refresh: SubtaskRefresh, num_chunks: int) -> list[bool]:
    """Whether each of the next requests asks; every request gets its chunk and no answer."""
    asked = []
    for _ in range(num_chunks):
        asked.append(bool(refresh.question_for(TASK)))
        if asked[-1]:
            refresh.asked()
        refresh.chunk_came()
    return asked


def test_the_first_request_asks_and_then_every_third() -> None:
    assert asks_in(SubtaskRefresh(3), 7) == [True, False, False, True, False, False, True]


def test_an_answer_does_not_shift_the_beat() -> None:
    refresh = SubtaskRefresh(3)
    asks_in(refresh, 2)
    refresh.answered("grasp the cup", accepted=True)
    assert asks_in(refresh, 3) == [False, True, False]


def test_without_a_beat_nothing_is_asked_and_the_task_is_acted_on() -> None:
    refresh = SubtaskRefresh(0)
    assert asks_in(refresh, 5) == [False] * 5
    assert refresh.acting_on(TASK) == TASK


def test_the_question_is_about_the_task_and_never_about_a_subtask() -> None:
    refresh = SubtaskRefresh(1)
    refresh.answered("grasp the cup", accepted=True)
    assert (refresh.question_for(TASK), refresh.acting_on(TASK)) == (TASK, "grasp the cup")


def test_the_last_good_one_stays_through_noise_and_both_are_counted() -> None:
    refresh = SubtaskRefresh(1)
    refresh.answered("", accepted=False)
    assert refresh.acting_on(TASK) == TASK
    refresh.answered("grasp the cup", accepted=True)
    refresh.answered("", accepted=False)
    refresh.answered("the the the the", accepted=True)  # A service that judges less strictly.
    refresh.answered("lift it", accepted=False)  # One that refuses, and says what.
    assert refresh.acting_on(TASK) == "grasp the cup"
    assert (refresh.num_taken, refresh.subtask.num_refused) == (1, 4)


def test_what_was_lost_is_asked_again_at_once() -> None:
    refresh = SubtaskRefresh(5)
    asks_in(refresh, 2)
    refresh.lost()
    assert asks_in(refresh, 2) == [True, False]


def test_an_episode_begins_with_its_task_and_a_question() -> None:
    refresh = SubtaskRefresh(5)
    asks_in(refresh, 2)
    refresh.answered("grasp the cup", accepted=True)
    refresh.answered("", accepted=False)
    refresh.begin_episode()
    assert refresh.acting_on(TASK) == TASK
    assert asks_in(refresh, 2) == [True, False]
    assert (refresh.num_taken, refresh.subtask.num_refused) == (1, 1), "counted over the run"
