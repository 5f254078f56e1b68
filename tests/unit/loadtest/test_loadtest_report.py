"""What a load test counts and says, without servers."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import AsyncIterator, Callable

import pytest
from rich.console import Console

from manyhands import errors
from manyhands.errors import InvalidInput, NotFound, Refused
from manyhands.inference.v1 import inference_pb2
from manyhands.security import SecuritySettings
from manyhands.spec import Spec
from services.loadtest import fleet, main, observations, report, servers, worker
from services.loadtest.links import Answer, ServiceLink
from services.loadtest.plan import Plan, Tally


def make_plan(**changed: object) -> Plan:
    values = {
        "kind": "service",
        "address": "127.0.0.1:1",
        "model": "tiny",
        "spec": servers.TINY_SPEC.to_proto().SerializeToString().hex(),
        "task": "open the drawer",
        "name": "test",
        "first": 0,
        "number": 1,
        "fleet": 1,
        "rate_hz": 50.0,
        "seconds": 0.3,
        "ramp_up_s": 0.0,
        "begins_s": time.monotonic(),
        "deadline_s": 0.015,
        "jpeg_quality": 95,
        "shared_memory": False,
        "replan_interval_steps": 1,
        "with_prefix": False,
        "ask_every_s": 0.0,
        "ask_tokens": 20,
        "with_timeline": False,
        "security": SecuritySettings(),
    }
    return Plan.model_validate({**values, **changed})


class FakeLink:
    """Answers with what it is told to, tick by tick."""

    def __init__(self, answer: Callable[[int], Answer], waits_s: float = 0.0) -> None:
        self._answer = answer
        self._waits_s = waits_s
        self.num_opened = self.num_prepared = 0
        self.ticks: list[int] = []

    async def open(self) -> None:
        self.num_opened += 1

    def prepare(self) -> None:
        self.num_prepared += 1

    async def ask(self, tick: int) -> Answer:
        self.ticks.append(tick)
        assert self.num_prepared == len(self.ticks), "once for each question"
        await asyncio.sleep(self._waits_s)
        return self._answer(tick)

    async def close(self) -> None:
        pass


class TalkingLink(ServiceLink):
    """A session whose chunks come at once and whose answers take their time, the last one's from then on; keeps when each
    question came.
    """

    def __init__(self, *answers_s: float) -> None:
        self._answers_s = answers_s
        self.asked_s: list[float] = []

    async def open(self) -> None:
        pass

    def prepare(self) -> None:
        pass

    async def ask(self, tick: int) -> Answer:
        return Answer(batch_size=1)

    async def generate(self, tokens: int, previous_text: str) -> AsyncIterator[inference_pb2.GenerateResponse]:
        self.asked_s.append(time.monotonic())
        await asyncio.sleep(self._answers_s[min(len(self.asked_s), len(self._answers_s)) - 1])
        yield inference_pb2.GenerateResponse(text="go", token_count=tokens)
        yield inference_pb2.GenerateResponse(token_count=tokens, finished=True, full_text="go")

    async def close(self) -> None:
        pass


def summarise(tally: Tally, **changed: float) -> dict[str, object]:
    values = {"robots": 1, "seconds": 10.0, "replan_interval_steps": 10}
    unmeasured = {"server_cpu_s": float("nan"), "server_loop_cpu_s": float("nan")}
    return report.summarise(tally, **{**values, **unmeasured, **changed})  # type: ignore[arg-type]


async def drive(link: FakeLink, **changed: object) -> Tally:
    tally = Tally()
    await worker.SimulatedRobot(make_plan(**changed), 0, link, tally, asyncio.Event()).run()
    return tally


async def test_a_robot_asks_at_its_rate_and_every_answer_is_counted() -> None:
    # Slow enough that a stall of the machine skips no tick.
    tally = await drive(FakeLink(lambda tick: Answer(stage_s={"queue": 0.001}, batch_size=2)), rate_hz=10.0, seconds=1.5)
    assert 13 <= tally.requests <= 15
    assert tally.chunks == tally.requests
    assert tally.robots_served == 1
    assert tally.num_errors == 0
    assert tally.stage_ms["queue"] == [1.0] * tally.chunks
    assert tally.batch_sizes == {2: tally.chunks}


async def test_a_slow_answer_is_a_missed_deadline_and_skips_ticks_instead_of_piling_up() -> None:
    tally = await drive(FakeLink(lambda tick: Answer(batch_size=1), waits_s=0.05))
    assert tally.missed_deadlines == tally.chunks == tally.requests
    assert tally.requests <= 6
    assert tally.skipped >= tally.requests
    assert min(tally.latency_ms) >= 50.0


async def test_refusals_are_told_apart() -> None:
    reasons = ["deadline", "overloaded", "invalid"]
    tally = await drive(FakeLink(lambda tick: Answer(refusal=reasons[tick % 3], message="no")))
    assert tally.refusals["deadline"] == tally.missed_deadlines > 0
    assert tally.refusals["overloaded"] > 0
    assert tally.num_errors == tally.refusals["invalid"] > 0
    assert tally.chunks == 0


async def test_a_broken_connection_is_an_error_and_the_robot_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "REOPEN_S", 0.02)

    def answer(tick: int) -> Answer:
        if link.num_opened == 1 and tick >= 3:
            raise errors.Unreachable("gone")
        return Answer(batch_size=1)

    link = FakeLink(answer)
    tally = await drive(link)
    assert link.num_opened == 2
    assert tally.errors == {"Unreachable: gone": 1}
    assert tally.chunks > 6
    assert tally.robots_served == 1


async def test_a_server_that_drains_is_left_and_met_again_without_an_error() -> None:
    link = FakeLink(lambda tick: Answer(batch_size=1, drained_s=0.05 if link.num_opened == 1 and tick >= 4 else None))
    tally = await drive(link)
    assert (link.num_opened, tally.drains, tally.num_errors) == (2, 1, 0)
    assert tally.chunks == tally.requests


async def test_robots_connect_before_their_first_request_so_that_it_goes_out_in_time() -> None:
    class SlowToOpen(FakeLink):
        async def open(self) -> None:
            await asyncio.sleep(0.2)
            await super().open()

    link = SlowToOpen(lambda tick: Answer(batch_size=1))
    tally = await drive(link, begins_s=time.monotonic() + 0.3, seconds=0.5, rate_hz=10.0)
    assert link.ticks[0] == 0
    assert tally.lag_ms[0] < 100.0


def assert_on_time(seen_s: list[float], planned_s: list[float], *, most_late_s: float) -> None:
    """Never early, and late by what a stall of the machine takes at most."""
    late_s = [seen - planned for seen, planned in zip(seen_s, planned_s, strict=True)]
    assert all(-0.005 <= late < most_late_s for late in late_s), late_s


async def test_questions_come_at_their_own_rate_however_long_answers_take_and_robots_are_out_of_step() -> None:
    begins_s = time.monotonic() + 0.1
    plan = make_plan(fleet=2, begins_s=begins_s, seconds=3.0, ask_every_s=0.6)
    links = [TalkingLink(0.4), TalkingLink(0.4)]
    tally = Tally()
    robots = [worker.SimulatedRobot(plan, index, link, tally, asyncio.Event()) for index, link in enumerate(links)]
    await asyncio.gather(*(robot.run() for robot in robots))
    for link, first_s in zip(links, (0.0, 0.3), strict=True):
        planned_s = [begins_s + first_s + 0.6 * number for number in range(5)]
        assert_on_time(link.asked_s[:5], planned_s, most_late_s=0.19)
    assert tally.text_tokens == [20] * tally.texts
    assert tally.texts >= 8


async def test_after_an_answer_that_took_too_long_the_next_question_comes_at_once_and_none_is_made_up_for() -> None:
    link = TalkingLink(1.4, 0.01)
    begins_s = time.monotonic() + 0.1
    plan = make_plan(begins_s=begins_s, seconds=3.0, ask_every_s=0.4)
    await worker.SimulatedRobot(plan, 0, link, Tally(), asyncio.Event()).run()
    assert_on_time(link.asked_s, [begins_s + at_s for at_s in (0.0, 1.4, 1.6, 2.0, 2.4, 2.8)], most_late_s=0.16)


async def test_what_the_server_asks_and_which_weights_served_is_counted_and_told_chunk_by_chunk_where_asked_for() -> None:
    def answer(tick: int) -> Answer:
        return Answer(batch_size=1, version=1 + tick // 8, replan_interval_steps=10 if tick < 4 else 13)

    before_s = time.time()
    link = FakeLink(answer)
    tally = await drive(link, with_timeline=True)
    # A stall of the machine skips ticks.
    num_first, num_at_once = sum(tick < 8 for tick in link.ticks), sum(tick < 4 for tick in link.ticks)
    assert 0 < num_at_once < num_first < tally.chunks == len(link.ticks)
    assert tally.versions == {1: num_first, 2: tally.chunks - num_first}
    assert tally.replan_steps == {10: num_at_once, 13: tally.chunks - num_at_once}
    result = summarise(tally, seconds=0.3)
    assert result["chunks_by_version"] == tally.versions
    assert result["chunks_by_asked_interval_steps"] == tally.replan_steps
    assert result["chunks_per_s"] == pytest.approx(tally.chunks / 0.3)
    times, latencies, versions = zip(*result["timeline"], strict=True)
    assert before_s - 0.01 <= times[0] <= times[-1] <= time.time() + 0.01
    assert list(latencies) == tally.latency_ms
    assert versions == (1,) * num_first + (2,) * (tally.chunks - num_first)
    printed = io.StringIO()
    Console(width=120, file=printed).print(report.table({"ours": result}, "test"))
    assert "10; 10 to 13" in printed.getvalue()
    assert f"{num_first} of version 1" in printed.getvalue()
    assert (await drive(FakeLink(answer))).timeline == []


def test_tallies_of_processes_add_up_and_survive_their_pipe() -> None:
    one = Tally(requests=2, latency_ms=[1.0], stage_ms={"queue": [1.0]}, errors={"a": 1}, batch_sizes={2: 1}, cpu_s=0.5)
    other = Tally(requests=3, latency_ms=[2.0], stage_ms={"total": [4.0]}, errors={"a": 1, "b": 2}, batch_sizes={2: 2})
    one.timeline, other.timeline = [(2.5, 1.0, 1)], [(2.0, 2.0, 0)]
    one.versions, other.versions = {1: 1}, {0: 1}
    total = Tally()
    for tally in (one, other):
        total.add(Tally.model_validate(json.loads(tally.model_dump_json())))
    assert (total.requests, total.latency_ms, total.cpu_s) == (5, [1.0, 2.0], 0.5)
    assert total.errors == {"a": 2, "b": 2}
    assert total.stage_ms == {"queue": [1.0], "total": [4.0]}
    assert total.batch_sizes == {2: 3}
    assert total.versions == {1: 1, 0: 1}
    assert summarise(total)["timeline"] == [(2.0, 2.0, 0), (2.5, 1.0, 1)]


def test_the_summary_has_what_the_file_promises() -> None:
    tally = Tally(
        requests=100, chunks=99, missed_deadlines=3, latency_ms=[float(number) for number in range(1, 101)], cpu_s=0.1
    )
    result = summarise(tally, robots=4, seconds=10.0, server_cpu_s=0.5, server_loop_cpu_s=0.1)
    assert (result["requests"], result["errors"], result["missed_deadlines"]) == (100, 0, 3)
    assert result["latency_ms"] == {"p50": 50.5, "p99": pytest.approx(99.01), "mean": 50.5, "max": 100.0}
    assert result["server_cpu_ms_per_request"] == pytest.approx(5.0)
    assert result["client_cpu_ms_per_request"] == pytest.approx(1.0)
    assert result["server_loop_cpu_ms_per_request"] == pytest.approx(1.0)
    json.dumps(result)
    assert "timeline" not in result
    empty = summarise(Tally(), robots=1, seconds=0.0)
    assert empty["latency_ms"]["p50"] is None
    assert empty["server_cpu_ms_per_request"] is None
    console = Console(width=120, record=True, quiet=True)
    console.print(report.table({"ours": result, "plain": empty}, "test"))


def test_small_loads_take_one_process() -> None:
    assert fleet.num_workers(make_plan(fleet=32, rate_hz=10.0)) == 1
    assert fleet.num_workers(make_plan(fleet=1, rate_hz=1000.0)) == 1


def test_pictures_come_in_the_models_size_or_the_one_asked_for_and_compress_like_a_cameras() -> None:
    spec = main.robot_spec(servers.TINY_SPEC, 96)
    required = tuple(feature.name for feature in spec.observation)
    values = observations.encode(observations.make(spec, required, 0), 95)
    assert [value.name for value in values] == list(required)
    picture = values[1].image
    assert (picture.height, picture.width) == (96, 96)
    assert len(picture.data) < 96 * 96
    assert main.robot_spec(servers.TINY_SPEC, 0) == Spec.from_proto(servers.TINY_SPEC.to_proto())


def test_what_the_server_does_not_serve_is_said_before_any_robot_begins() -> None:
    arm = inference_pb2.Model(name="arm", has_text_head=False)
    models = (arm, inference_pb2.Model(name="leg", has_text_head=True))
    with pytest.raises(InvalidInput, match="arm, leg"):
        main._choose(models, main.Settings())
    with pytest.raises(NotFound, match="arm, leg"):
        main._choose(models, main.Settings(model="nose"))
    with pytest.raises(Refused, match="no text head"):
        main._choose(models, main.Settings(model="arm", ask_every_s=1.0))
    assert main._choose(models, main.Settings(model="leg", ask_every_s=1.0)).name == "leg"
    assert main._choose((arm,), main.Settings()).name == "arm"


def test_a_timeline_needs_a_file_to_go_into() -> None:
    with pytest.raises(InvalidInput, match="--json"):
        main.main(main.Settings(timeline=True, address="127.0.0.1:1"))


def test_comparing_with_a_server_elsewhere_needs_the_checkpoint() -> None:
    with pytest.raises(InvalidInput, match="checkpoint"):
        main.main(main.Settings(compare=True, address="127.0.0.1:1"))
