"""SIGTERM while robots of either path are served: whole answers or a clear refusal for all that was asked, none lost."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from deploy.local import Topology
from manyhands.clients.act_stream import Chunk, Drain, Refusal
from manyhands.clients.inference import InferenceClient, Session
from manyhands.errors import ManyhandsError, Unreachable
from tests.support import fault_lab
from tests.support.fault_lab import NOT_SERVING, SERVING, HealthWatch, Lab, talk, text
from tests.support.inference_lab import ENVIRONMENT, next_reply
from tests.support.waiting import wait_until

NUM_ROBOTS, NUM_QUESTIONS = 3, 6


@pytest.fixture(params=fault_lab.PATHS)
def lab(request: pytest.FixtureRequest, checkpoints: Path, tmp_path: Path) -> Iterator[Lab]:
    """One that may be ended."""
    with Topology(tmp_path / "logs", environment=ENVIRONMENT) as topology:
        yield fault_lab.serve(topology, checkpoints, request.param)


@dataclass
class Leaver:
    """Asks until it is told to leave, then for nothing more; stays for what is pending."""

    lab: Lab
    client: InferenceClient
    name: str
    asked: list[int] = field(default_factory=list)
    answered: list[int] = field(default_factory=list)
    drains: list[Drain] = field(default_factory=list)
    last: tuple[int, Chunk] | None = None
    failures: list[BaseException] = field(default_factory=list)

    def run(self) -> None:
        try:
            with self.client.act_stream(self.lab.open_session(self.client, self.name).session_id) as stream:
                for seed in itertools.count(1):
                    self.asked.append(self.lab.ask(stream, seed))
                    while len(self.answered) < len(self.asked):
                        reply = next_reply(stream)
                        if isinstance(reply.result, Drain):
                            self.drains.append(reply.result)
                            continue
                        assert isinstance(reply.result, Chunk), reply.result
                        self.answered.append(reply.request_id)
                        self.last = (seed, reply.result)
                    if self.drains:
                        return
        except BaseException as error:
            self.failures.append(error)


@dataclass
class Stubborn:
    """Goes on asking, whatever it is told, until its stream ends."""

    lab: Lab
    client: InferenceClient
    asked: list[int] = field(default_factory=list)
    answered: list[int] = field(default_factory=list)
    ending: BaseException | None = None

    def run(self) -> None:
        try:
            with self.client.act_stream(self.lab.open_session(self.client, "stubborn").session_id) as stream:
                for seed in itertools.count(1):
                    self.asked.append(self.lab.ask(stream, seed))
                    while len(self.answered) < len(self.asked):
                        reply = next_reply(stream)
                        if not isinstance(reply.result, Drain):
                            self.answered.append(reply.request_id)
        except BaseException as error:
            self.ending = error


@dataclass
class Questioner:
    """Asks for one long text, in a session that is open already."""

    client: InferenceClient
    session: Session
    seed: int
    num_pieces: int = 0
    full_text: str | None = None
    refusal: ManyhandsError | None = None

    def run(self) -> None:
        with self.client.act_stream(self.session.session_id):
            try:
                for answer in talk(self.client, self.session, self.seed):
                    self.num_pieces += 1
                    if answer.finished:
                        self.full_text = answer.full_text
            except ManyhandsError as error:
                self.refusal = error


def test_a_server_that_is_told_to_go_under_load_answers_or_refuses_all_it_was_asked(lab: Lab) -> None:
    with InferenceClient(lab.address) as client:
        health = HealthWatch(lab.address)
        leavers = [Leaver(lab, client, f"leaver{index}") for index in range(NUM_ROBOTS)]
        stubborn = Stubborn(lab, client)
        threads = [threading.Thread(target=each.run) for each in (*leavers, stubborn)]
        for thread in threads:
            thread.start()
        wait_until(lambda: all(len(leaver.answered) > 3 or leaver.failures for leaver in leavers))
        talks = [lab.open_talk(client, f"asks{index}") for index in range(NUM_QUESTIONS)]
        questioners = [Questioner(client, session, index) for index, session in enumerate(talks)]
        asking = [threading.Thread(target=each.run) for each in questioners]
        for thread in asking:
            thread.start()
        wait_until(lambda: any(questioner.num_pieces for questioner in questioners))
        # To its engine process as well, as whoever ends a group of processes does.
        os.killpg(lab.service.process.pid, signal.SIGTERM)
        told_s = time.monotonic()
        wait_until(lambda: health.statuses == [SERVING, NOT_SERVING], 1.0, "health does not say that it goes")
        with pytest.raises(Unreachable):
            lab.open_session(client, "late")
        for thread in (*threads, *asking):
            thread.join(20.0)
            assert not thread.is_alive()
        assert lab.service.process.wait(10.0) == 0
        assert time.monotonic() - told_s < 5.0
        health.close()
    for leaver in leavers:
        assert leaver.failures == []
        assert len(leaver.drains) == 1
        assert leaver.drains[0].reconnect_after_s > 0
        assert leaver.answered == leaver.asked
        assert leaver.last is not None
        lab.check_chunk(leaver.last[1].actions, leaver.last[0])
    assert isinstance(stubborn.ending, Unreachable)
    # What is sent while the stream ends may not arrive any more; the end of the stream says so.
    assert stubborn.answered == stubborn.asked[: len(stubborn.answered)]
    assert len(stubborn.asked) - len(stubborn.answered) <= 1
    for questioner in questioners:
        if questioner.refusal is None:
            assert questioner.full_text == text(questioner.seed)
        else:
            assert isinstance(questioner.refusal, Unreachable), questioner.refusal
            assert "goes away" in str(questioner.refusal)
            assert questioner.refusal.retry_after_s
    assert "Traceback" not in lab.service.log_path.read_text()


def test_a_chunk_that_cannot_be_made_before_the_end_is_refused_not_forgotten(lab: Lab) -> None:
    """The engine hangs while the server is told to go."""
    with InferenceClient(lab.address) as client, client.act_stream(lab.open_session(client, "left").session_id) as stream:
        lab.ask(stream, 1)
        assert isinstance(next_reply(stream).result, Chunk)
        session = lab.open_talk(client, "asks")
        refusals: list[BaseException] = []
        begun = threading.Event()

        def ask() -> None:
            try:
                for _ in talk(client, session, 1, max_new_tokens=fault_lab.MAX_NEW_TOKENS):
                    begun.set()
            except ManyhandsError as error:
                refusals.append(error)

        engine = fault_lab.engine_of(lab.service)
        assert engine is not None
        asking = threading.Thread(target=ask)
        asking.start()
        assert begun.wait(20.0)
        engine.suspend()
        pending = lab.ask(stream, 2)
        lab.service.process.send_signal(signal.SIGTERM)
        told_s = time.monotonic()
        assert isinstance(next_reply(stream).result, Drain)
        reply = next_reply(stream)
        assert reply.request_id == pending
        assert isinstance(reply.result, Refusal)
        assert reply.result.reason == "unavailable"
        with pytest.raises(Unreachable):
            next_reply(stream)
        asking.join(10.0)
        assert lab.service.process.wait(10.0) == 0
        assert time.monotonic() - told_s < 6.0
    (refusal,) = refusals
    assert isinstance(refusal, Unreachable)
    assert "goes away" in str(refusal)
    assert refusal.retry_after_s
    wait_until(lambda: not engine.is_running(), 2.0)
