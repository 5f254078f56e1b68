"""Nothing waits for longer than it was told to: text on either path, an engine that hangs, a server that says nothing."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from manyhands.clients.act_stream import Chunk
from manyhands.clients.inference import InferenceClient
from manyhands.errors import ManyhandsError, Overloaded, TooLate
from tests.support.fault_lab import Lab, engine_of, talk, text
from tests.support.inference_lab import next_reply

LONG = 1024  # Tokens: seconds.
NUM_ASKED = 12


def test_a_text_that_is_not_finished_in_time_ends_so_and_leaves_the_engine(lab: Lab) -> None:
    with InferenceClient(lab.address) as client:
        session = lab.open_talk(client, "asks")
        pieces: list[object] = []
        began_s = time.monotonic()
        with pytest.raises(TooLate, match="not finished"):
            pieces.extend(talk(client, session, 1, max_new_tokens=LONG, deadline_s=0.25))
        assert len(pieces) < LONG
        assert time.monotonic() - began_s < 1.2  # The client itself waits for a second more.
        *_, last = talk(client, session, 2)
        assert last.full_text == text(2)


def test_a_hanging_engine_holds_no_question_beyond_its_deadline(lab: Lab) -> None:
    engine = engine_of(lab.service)
    assert engine is not None
    with InferenceClient(lab.address) as client:
        session = lab.open_talk(client, "asks-hanging")
        engine.suspend()
        try:
            began_s = time.monotonic()
            with pytest.raises(TooLate, match=r"the text was not finished within 0\.4 s"):
                list(talk(client, session, 1, deadline_s=0.4))
            assert time.monotonic() - began_s < 1.3
        finally:
            engine.resume()
        *_, last = talk(client, session, 1)
        assert last.full_text == text(1)


def test_a_robot_has_few_questions_at_once_and_is_told_so(lab: Lab) -> None:
    with InferenceClient(lab.address) as client, ThreadPoolExecutor(NUM_ASKED) as pool:
        session, other = lab.open_talk(client, "asks-much"), lab.open_talk(client, "asks-little")
        together = threading.Barrier(NUM_ASKED)
        refusals: list[Overloaded] = []

        def is_taken(seed: int) -> bool:
            together.wait(20.0)
            try:
                for _ in talk(client, session, seed, max_new_tokens=LONG, deadline_s=1.0):
                    pass
            except Overloaded as error:
                refusals.append(error)
                return False
            except TooLate:
                pass
            return True

        taken = list(pool.map(is_taken, range(NUM_ASKED)))
        assert 1 <= taken.count(True) <= NUM_ASKED - 4
        assert all(error.retry_after_s and "8 questions of this session" in str(error) for error in refusals)
        *_, last = talk(client, other, 3)
        assert last.full_text == text(3)
        *_, last = talk(client, session, 4)
        assert last.full_text == text(4)


def test_a_server_that_says_nothing_makes_no_call_hang(plain_lab: Lab) -> None:
    lab = plain_lab
    with InferenceClient(lab.address) as client:
        session = lab.open_talk(client, "patient")
        calls: list[Callable[[], object]] = [
            lambda: client.list_models(timeout_s=0.3),
            lambda: client.status(timeout_s=0.3),
            lambda: client.swap_weights("tiny", timeout_s=0.3),
            lambda: client.close_session(session.session_id, timeout_s=0.3),
            lambda: list(talk(client, session, 1, deadline_s=0.1)),
        ]
        lab.service.process.send_signal(signal.SIGSTOP)
        try:
            for call in calls:
                began_s = time.monotonic()
                with pytest.raises(ManyhandsError) as caught:
                    call()
                assert isinstance(caught.value, TooLate)
                assert time.monotonic() - began_s < 2.0
        finally:
            lab.service.process.send_signal(signal.SIGCONT)
        with client.act_stream(lab.open_session(client, "after").session_id) as stream:
            lab.ask(stream, 1)
            assert isinstance(next_reply(stream).result, Chunk)
