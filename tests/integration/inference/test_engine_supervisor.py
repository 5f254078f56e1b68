"""The front end and an engine process that behaves well, badly, or not at all. The process is real, its model a fake."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import pytest
from prometheus_client import REGISTRY

from manyhands.engine.v1 import engine_pb2
from manyhands.errors import InternalError, ManyhandsError, TooLate, Unreachable
from manyhands.inference.v1 import inference_pb2
from services.inference import engine_client
from services.inference.engine_port import Answer, Job, Observed, Outcome, Question, Rehearsal, Row, Superseded, TextEnd
from services.inference.engine_rows import ANSWER_SLOTS, REQUEST_SLOTS
from services.inference.engine_supervisor import EngineSupervisor
from tests.support.fake_engine import BAD, BAD_AFTER, BUSY_S, HORIZON, MANNERS, NO_GATE, description
from tests.support.questions import question_about

HARMLESS = {"twice"}
RESTARTED = 20.0
USE = ("seconds", "units", "rows")


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "ENGINE_MODULE", "tests.support.fake_engine")
    monkeypatch.delenv(MANNERS, raising=False)


@asynccontextmanager
async def running(*, log_level: str = "info", **options: Any) -> AsyncIterator[EngineSupervisor]:
    """A supervisor whose loop has seen no unhandled error when it ends, and that leaves no process."""
    unhandled: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
    supervisor = EngineSupervisor(engine_pb2.Start(log_level=log_level, device="fake"), **options)
    await supervisor.start()
    try:
        yield supervisor
    finally:
        await supervisor.stop()
    assert unhandled == []
    assert children() == []


def children() -> list[psutil.Process]:
    """Engine processes of the tests here."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # It may end while it is looked at.
            if child.status() != psutil.STATUS_ZOMBIE and "tests.support.fake_engine" in child.cmdline():
                found.append(child)
    return found


def row(seed: int) -> Row:
    observation: dict[str, Any] = {
        feature.name: np.full(feature.shape, seed % 256, dtype=feature.dtype)
        for feature in description(16).used_spec.observation
    }
    sample = Observed(observation=observation, task="reach")
    return Row(sample=sample, prefix=None, delay_steps=0, execution_horizon=HORIZON, seed=seed)


def submit(
    supervisor: EngineSupervisor, seed: int, *, owner: str = "left", deadline_s: float = 20.0, gate: int = 0
) -> asyncio.Future[Outcome]:
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[Outcome] = loop.create_future()

    def done(result: Outcome) -> None:
        assert not outcome.done(), "a request was answered twice"
        outcome.set_result(result)

    now_s = time.monotonic()
    supervisor.submit(
        owner=owner,
        request_id=seed,
        arrived_s=now_s,
        deadline_s=now_s + deadline_s,
        job=Job(model="fake", row=row(seed), done=done, gate=gate),
    )
    return outcome


async def chunk(supervisor: EngineSupervisor, seed: int) -> Answer:
    """Asks for a chunk and gets its own."""
    outcome = await asyncio.wait_for(submit(supervisor, seed), 10.0)
    assert isinstance(outcome, Answer), outcome
    assert outcome.actions[0, 0] == seed
    return outcome


async def until(condition: Callable[[], Any], timeout_s: float = RESTARTED) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_rows_go_and_chunks_come_many_times_round_the_ring() -> None:
    async with running() as supervisor:
        for seed in range(5 * REQUEST_SLOTS):
            await chunk(supervisor, seed)
        together = [submit(supervisor, seed, owner=f"robot{seed}") for seed in range(100)]
        outcomes = await asyncio.wait_for(asyncio.gather(*together), 10.0)
        assert [outcome.actions[0, 0] for outcome in outcomes if isinstance(outcome, Answer)] == list(range(100))


@pytest.mark.parametrize("how", ["answered", "the engine died"])
async def test_an_answer_that_cannot_be_told_costs_nobody_else_theirs(how: str) -> None:
    def broken(_outcome: Outcome) -> None:
        raise RuntimeError("this robot's stream is broken")

    async with running() as supervisor:
        now_s = time.monotonic()
        if how != "answered":
            os.kill(children()[0].pid, signal.SIGSTOP)
        job = Job(model="fake", row=row(1), done=broken)
        supervisor.submit(owner="broken", request_id=1, arrived_s=now_s, deadline_s=now_s + 20.0, job=job)
        others = [submit(supervisor, seed, owner=f"robot{seed}") for seed in range(5)]
        if how != "answered":
            os.kill(children()[0].pid, signal.SIGKILL)
        outcomes = await asyncio.wait_for(asyncio.gather(*others), 10.0)
        expected = Answer if how == "answered" else Unreachable
        assert all(isinstance(outcome, expected) for outcome in outcomes)
        await until(lambda: len(children()) == 1)


async def test_a_rehearsal_comes_before_the_answer_and_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BUSY_S, "0.05")
    async with running() as supervisor:
        heard: list[object] = []
        answered = asyncio.Event()

        def done(outcome: Outcome) -> None:
            heard.append(outcome)
            answered.set()

        now_s = time.monotonic()
        job = Job(model="fake", row=row(5), done=done, rehearse=heard.append)
        supervisor.submit(owner="left", request_id=1, arrived_s=now_s, deadline_s=now_s + 20.0, job=job)
        await asyncio.wait_for(answered.wait(), 10.0)
        first, second = heard
        assert isinstance(first, Rehearsal)
        assert isinstance(second, Answer)
        assert first.answer.actions[0, 0] == 0
        assert second.actions[0, 0] == 5


async def test_a_row_told_ahead_is_heard_and_is_not_answered() -> None:
    async with running() as supervisor:
        for seed in range(3 * REQUEST_SLOTS):
            told = row(seed)
            vectors = {name: array for name, array in told.sample.observation.items() if array.ndim == 1}
            supervisor.expect("fake", replace(told, sample=replace(told.sample, observation=vectors)), with_gate=False)
            outcome = await asyncio.wait_for(submit(supervisor, seed), 10.0)
            assert isinstance(outcome, Answer)
            assert outcome.actions[0, :2].tolist() == [seed, seed + 1]


async def test_pictures_of_a_lone_row_are_at_its_gate_in_the_engine() -> None:
    async with running() as supervisor:
        for seed in (3, 4):
            gate = supervisor.expect("fake", row(seed), with_gate=True)
            assert gate > 0
            outcome = await submit(supervisor, seed, gate=gate)
            assert isinstance(outcome, Answer)
            assert list(outcome.actions[0, 3:5]) == [1, seed * 3 * 16 * 16 * 3]
        first, second = submit(supervisor, 5), submit(supervisor, 6, owner="right")
        assert supervisor.expect("fake", row(7), with_gate=True) == 0, "others would wait behind it"
        for found in await asyncio.gather(first, second):
            assert isinstance(found, Answer)
            assert found.actions[0, 3] == 0
        gate = supervisor.expect("fake", row(8), with_gate=True)
        supervisor.give_up(gate)
        gate = supervisor.expect("fake", row(8), with_gate=True)
        assert gate > 0, "nobody waits at the one before any more"
        supervisor.ask(a_question(), lambda piece: None)
        found = await submit(supervisor, 8, gate=gate)
        assert isinstance(found, Answer)
        assert found.actions[0, 3] == 0, "the question did not wait behind it"


async def test_an_engine_whose_driver_pins_no_memory_is_given_no_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MANNERS, NO_GATE)
    async with running() as supervisor:
        assert supervisor.expect("fake", row(3), with_gate=True) == 0
        assert isinstance(await submit(supervisor, 3), Answer)


async def test_a_row_that_is_rehearsed_is_heard_and_is_not_answered() -> None:
    async with running() as supervisor:
        for seed in range(3 * REQUEST_SLOTS):
            supervisor.rehearse("fake", row(seed))
            outcome = await asyncio.wait_for(submit(supervisor, seed), 10.0)
            assert isinstance(outcome, Answer)
            assert outcome.actions[0, :3].tolist() == [seed, 0, seed + 1]


async def test_chunks_that_the_front_end_does_not_take_wait_in_the_engine() -> None:
    async with running() as supervisor:
        outcomes = []
        for seed in range(3 * ANSWER_SLOTS):
            outcomes.append(submit(supervisor, seed, owner=f"robot{seed}"))
            time.sleep(0.002)  # noqa: ASYNC251 - the loop is what is to be late
        chunks = await asyncio.wait_for(asyncio.gather(*outcomes), 10.0)
        assert [chunk.actions[0, 0] for chunk in chunks if isinstance(chunk, Answer)] == list(range(3 * ANSWER_SLOTS))


async def test_what_the_engine_says_of_its_load_is_known_while_it_is_there() -> None:
    serving: asyncio.Queue[bool] = asyncio.Queue()
    async with running(on_serving=serving.put_nowait) as supervisor:
        for restart_count in range(2):
            assert await asyncio.wait_for(serving.get(), RESTARTED)
            load = supervisor.load()
            assert load is not None
            assert (load.waiting_count, load.memory_used_bytes, load.memory_total_bytes) == (2, 3 << 30, 4 << 30)
            assert (supervisor.restart_count, supervisor.is_pinned("fake")) == (restart_count, False)
            assert supervisor.pid is not None
            if not restart_count:
                os.kill(supervisor.pid, signal.SIGKILL)
                assert not await asyncio.wait_for(serving.get(), RESTARTED)
                assert supervisor.load() is None


async def test_what_devices_did_is_added_up_over_engines_that_die() -> None:
    def shown() -> list[float]:
        labels = {"model": "fake", "kind": "prefix"}
        values = [
            *(REGISTRY.get_sample_value(f"manyhands_inference_device_{name}_total", labels) for name in USE),
            REGISTRY.get_sample_value("manyhands_inference_device_gap_seconds_total", {"device": "fake"}),
        ]
        return [value or 0.0 for value in values]

    before = shown()

    def since() -> list[float]:
        return [now - then for now, then in zip(shown(), before, strict=True)]

    async with running() as supervisor:
        assert since() == [0.0, 0, 0, 0.25], "as soon as it is ready"
        await chunk(supervisor, 1)
        await until(lambda: since() == [0.5, 1, 2, 0.25])
        for seed in (2, 3):
            await chunk(supervisor, seed)
        await until(lambda: since() == [1.5, 3, 6, 0.25])
        first_pid = supervisor.pid
        assert first_pid is not None
        os.kill(first_pid, signal.SIGKILL)
        await until(lambda: supervisor.pid not in (None, first_pid))
        assert since() == [1.5, 3, 6, 0.5], "the next one begins at 0"
        await chunk(supervisor, 4)
        await until(lambda: since() == [2.0, 4, 8, 0.5])


def a_question() -> Question:
    kind = inference_pb2.TEXT_KIND_VISUAL_QUESTION
    return question_about(row(1).sample, model="fake", deadline_s=10.0, kind=kind, user_text="what do you see")


async def test_text_comes_in_pieces_and_a_swap_is_answered() -> None:
    async with running() as supervisor:
        heard: asyncio.Queue[str | TextEnd] = asyncio.Queue()
        supervisor.ask(a_question(), heard.put_nowait)
        pieces = [await asyncio.wait_for(heard.get(), 10.0) for _ in range(5)]
        assert pieces[:4] == ["what", "do", "you", "see"]
        assert isinstance(pieces[4], TextEnd)
        assert pieces[4].version == supervisor.models["fake"].version
        with pytest.raises(ManyhandsError, match="no weights"):
            await asyncio.wait_for(asyncio.wrap_future(supervisor.swap("fake", 1)), 10.0)


async def test_a_stopped_engine_makes_nobody_wait_and_the_newest_row_of_a_robot_wins() -> None:
    """More robots than slots while nothing is taken: the rest waits in the front end, one row a robot."""
    async with running(hung_s=60.0) as supervisor:
        await chunk(supervisor, 1)
        assert supervisor.pid is not None
        os.kill(supervisor.pid, signal.SIGSTOP)
        began_s = time.monotonic()
        robots = [submit(supervisor, seed, owner=f"robot{seed}") for seed in range(REQUEST_SLOTS + 3)]
        older = submit(supervisor, 100, owner="quick")
        late = submit(supervisor, 101, owner="hurried", deadline_s=0.01)
        newest = submit(supervisor, 102, owner="quick")
        supervisor.withdraw("robot0")
        assert time.monotonic() - began_s < 1.0
        assert isinstance(await asyncio.wait_for(older, 1.0), Superseded)
        await asyncio.sleep(0.02)
        os.kill(supervisor.pid, signal.SIGCONT)
        withdrawn, *others = robots
        outcomes = await asyncio.wait_for(asyncio.gather(*others, newest), 10.0)
        assert all(isinstance(outcome, Answer) for outcome in outcomes)
        assert not withdrawn.done()
        assert isinstance(await asyncio.wait_for(late, 1.0), TooLate)


@pytest.mark.parametrize("manners", sorted(BAD.keys() - {"twice"}))
async def test_an_engine_that_misbehaves_is_replaced_and_costs_only_what_was_in_flight(
    manners: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MANNERS, manners)
    serving: list[bool] = []
    # Found out by what it says; only one that says nothing is waited for.
    hung_s = 0.5 if manners == "hangs" else 60.0
    async with running(hung_s=hung_s, on_serving=serving.append) as supervisor:
        first_pid = supervisor.pid
        for seed in range(BAD_AFTER):
            await chunk(supervisor, seed)
        monkeypatch.delenv(MANNERS)  # The next one is good.
        in_flight = [
            submit(supervisor, 50 + index, owner=f"robot{index}", deadline_s=0.5 if manners == "hangs" else 20.0)
            for index in range(REQUEST_SLOTS + 1)
        ]
        for outcome in await asyncio.wait_for(asyncio.gather(*in_flight), 10.0):
            assert isinstance(outcome, Unreachable), outcome
            assert outcome.retry_after_s is not None
            assert outcome.retry_after_s > 0
        away = await asyncio.wait_for(submit(supervisor, 52), 1.0)
        assert isinstance(away, Unreachable)
        assert "ask again" in str(away)
        await until(lambda: supervisor.pid not in (None, first_pid))
        await chunk(supervisor, 53)
        assert serving == [True, False, True]
        assert len(children()) == 1


async def test_an_engine_is_not_judged_by_what_its_robot_gave_up() -> None:
    """A client that was killed in the middle of a request leaves an engine that has nothing to do: it does not hang."""
    async with running(hung_s=0.3) as supervisor:
        await chunk(supervisor, 1)
        pid = supervisor.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        submit(supervisor, 2, deadline_s=0.01)
        supervisor.withdraw("left")
        await asyncio.sleep(0.3 + 2 * engine_client.HUNG_CHECK_S)
        assert supervisor.pid == pid
        os.kill(pid, signal.SIGCONT)
        await chunk(supervisor, 3)


async def test_who_leaves_is_forgotten_by_the_engine_also_when_nothing_is_in_flight() -> None:
    """Its place in line, which a refused robot keeps for its next request, would stay for good."""
    async with running() as supervisor:
        assert (await chunk(supervisor, 1)).actions[1, 0] == 0
        supervisor.withdraw("left")
        async with asyncio.timeout(RESTARTED):
            while (await chunk(supervisor, 2)).actions[1, 0] == 0:  # Rows overtake what goes by the socket.
                pass


async def test_answers_that_nobody_asked_for_or_that_come_twice_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MANNERS, "twice")
    async with running() as supervisor:
        pid = supervisor.pid
        for seed in range(40):
            await chunk(supervisor, seed)
        assert supervisor.pid == pid


async def test_an_engine_that_dies_again_and_again_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MANNERS, "dies")
    async with running(restart_limit=2) as supervisor:
        pids = set()
        for _ in range(3):
            pids.add(supervisor.pid)
            outcome: Outcome | None = None
            while not isinstance(outcome, Unreachable):
                outcome = await asyncio.wait_for(submit(supervisor, 1), 10.0)
            await until(lambda: supervisor.pid not in pids and (supervisor.pid or supervisor.given_up.is_set()))
        assert len(pids) == 3
        assert supervisor.given_up.is_set()
        assert isinstance(supervisor.failure, InternalError)
        assert "again and again" in str(supervisor.failure)
        gone = await asyncio.wait_for(submit(supervisor, 2), 1.0)
        assert isinstance(gone, Unreachable)
        assert gone.retry_after_s is None


async def test_an_engine_that_cannot_be_started_again_is_tried_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(restart_limit=3) as supervisor:
        assert supervisor.pid is not None
        monkeypatch.setenv(MANNERS, "fails to load")
        os.kill(supervisor.pid, signal.SIGKILL)
        await asyncio.wait_for(supervisor.given_up.wait(), RESTARTED)
        assert "the fake cannot be loaded" in str(supervisor.failure)


async def test_another_model_in_the_place_of_the_old_one_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as supervisor:
        assert supervisor.pid is not None
        monkeypatch.setenv("FAKE_ENGINE_CAMERA_SIZE", "20")
        os.kill(supervisor.pid, signal.SIGKILL)
        await asyncio.wait_for(supervisor.given_up.wait(), RESTARTED)
        assert "another spec or size" in str(supervisor.failure)


@pytest.mark.parametrize("manners", ["fails to load", "dies while loading"])
async def test_a_first_start_that_fails_is_not_tried_again(manners: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MANNERS, manners)
    supervisor = EngineSupervisor(engine_pb2.Start(log_level="info"))
    with pytest.raises(ManyhandsError, match="cannot be loaded" if manners == "fails to load" else "engine process ended"):
        await supervisor.start()
    await supervisor.stop()
    assert children() == []


async def test_a_start_of_which_nothing_is_heard_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MANNERS, "hangs while loading")
    monkeypatch.setattr(engine_client, "SILENT_START_S", 0.5)
    supervisor = EngineSupervisor(engine_pb2.Start(log_level="info"))
    with pytest.raises(InternalError, match=r"nothing was heard of its start for 0\.5 s"):
        await asyncio.wait_for(supervisor.start(), RESTARTED)
    await supervisor.stop()
    assert children() == []


async def test_no_collection_looks_at_what_an_engine_starts_with(capfd: pytest.CaptureFixture[str]) -> None:
    async with running(log_level="debug") as supervisor:
        pid = children()[0].pid
        assert isinstance(await submit(supervisor, 1), Answer)
    (permanent,) = re.findall(rf"engine\[{pid}\] manyhands.garbage: (\d+) objects", capfd.readouterr().err)
    # Modules, and with a real model its parts: a collection that visits them holds up every robot.
    assert int(permanent) > 10_000
