"""A session's refusals: bursts are one record and one line, and nothing grows."""

from __future__ import annotations

from services.inference.refusals import BURSTS_KEPT, LOGGED_AGAIN_AFTER_S, MAX_MESSAGE_CHARACTERS, QUIET_S, RefusalLog

INVALID, LATE = 3, 2


def add(log: RefusalLog, now_s: float, *, reason: int = INVALID, request_id: int = 1, message: str = "is nan") -> int:
    return log.add(reason=reason, field="observation.state", message=message, request_id=request_id, now_s=now_s)


def test_what_comes_close_together_is_one_record_and_one_line() -> None:
    log = RefusalLog()
    assert [add(log, 0.1 * step, request_id=step, message=f"is {step}") for step in range(50)] == [1] + [0] * 49
    (burst,) = log
    assert (burst.count, burst.first_s, burst.last_request_id, burst.message) == (50, 0.0, 49, "is 49")
    assert add(log, burst.last_s + QUIET_S + 0.1) == 1, "after a pause it is a new one"
    assert [one.count for one in log] == [50, 1]


def test_reasons_are_kept_apart_also_when_they_take_turns() -> None:
    log = RefusalLog()
    for step in range(10):
        add(log, step / 10, reason=LATE if step % 2 else INVALID)
    assert [(one.reason, one.count) for one in log] == [(INVALID, 5), (LATE, 5)]
    add(log, 1.0, reason=INVALID, message="is inf")
    assert [one.reason for one in log] == [LATE, INVALID], "by the last of each"
    assert log.last_message == "is inf"


def test_questions_are_kept_apart_from_observations() -> None:
    log = RefusalLog()
    add(log, 0.0)
    log.add(reason=INVALID, field="kind", message="is 9", request_id=0, now_s=0.1, of_question=True)
    add(log, 0.2)
    assert [(one.of_question, one.count) for one in log] == [(True, 1), (False, 2)]


def test_a_burst_that_goes_on_gets_a_line_a_minute_that_speaks_for_the_rest() -> None:
    log = RefusalLog()
    lines = [number for step in range(round(LOGGED_AGAIN_AFTER_S) * 2 + 1) if (number := add(log, float(step)))]
    assert lines == [1, 60, 60]
    assert [one.count for one in log] == [121]


def test_nothing_grows_without_bound() -> None:
    log = RefusalLog()
    for step in range(100):
        add(log, step * 2 * QUIET_S, message="x" * 10_000, request_id=step)
    assert len(log) == BURSTS_KEPT
    assert [one.last_request_id for one in log] == list(range(100 - BURSTS_KEPT, 100))
    assert all(len(one.message) == MAX_MESSAGE_CHARACTERS for one in log)


def test_an_empty_log_has_nothing_to_say() -> None:
    assert (len(RefusalLog()), RefusalLog().last_message, list(RefusalLog())) == (0, "", [])
