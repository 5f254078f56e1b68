"""A fleet of robots against the real scheduler, in simulated time: what a device can carry before it is bought. Pure.

Robots open sessions as the service admits them, observe every replan interval that the service asks of them, wait for the
answer before they observe again, and ask questions about what they observed last. The device takes as long for a unit as a
table says. Deterministic by seed.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from random import Random

from . import capacity, sharing
from .service_times import ServiceTimes
from .simulated_fleet import Asked, Fleet, Outcome, Robot
from .unit_durations import UnitDurations
from .unit_scheduler import UnitScheduler
from .units import PREFIX_SIZES, ChunkWork, Text, TextWork, Unit, UnitKind, expert_sizes, group

MODEL = "model"
RETRY_AFTER_S = 4.0


def simulate(
    fleet: Fleet, durations: UnitDurations, *, seed: int = 0, on_progress: Callable[[float], None] | None = None
) -> Outcome:
    """Runs the fleet for fleet.seconds of simulated time; on_progress hears of each simulated second."""
    return _Simulation(fleet, durations, seed, on_progress).run()


class _Simulation:
    def __init__(
        self, fleet: Fleet, durations: UnitDurations, seed: int, on_progress: Callable[[float], None] | None
    ) -> None:
        self._fleet = fleet
        self._durations = durations
        self._random = Random(seed)
        self._on_progress = on_progress
        self._now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0
        self._robots = [
            Robot(name=f"robot{index:03}", interval_steps=fleet.interval_steps) for index in range(fleet.num_robots)
        ]
        self._by_name = {robot.name: robot for robot in self._robots}
        self._scheduler: UnitScheduler[None, Asked] = UnitScheduler(
            max_rows=fleet.max_rows,
            max_texts=fleet.max_texts,
            max_prefixes=fleet.max_prefixes,
            times=_warmed_up(fleet, durations),
        )
        self._device = _capacity(fleet, durations)
        self._outcome = Outcome(robots=self._robots, chunks_per_s=self._device.chunks_per_s)

    def run(self) -> Outcome:
        for robot in self._robots:
            comes_at = self._share(robot) if self._fleet.keeps_rate else self._random.random()
            self._at(comes_at * self._fleet.ramp_up_s, self._opener(robot))
        free_s, next_second = 0.0, 1.0
        while self._now_s < self._fleet.seconds:
            self._happen(self._now_s)
            decision = self._scheduler.next_unit(self._now_s)
            for work in decision.late_chunks:
                self._refuse(work)
            self._outcome.refusals["text too late"] += len(decision.late_texts)
            for late in decision.late_texts:
                self._heard(late)
            unit = decision.unit
            if unit is None:
                # A late robot's answer may have made an event; there always is one while robots run.
                self._now_s = self._events[0][0] if self._events else self._fleet.seconds
            else:
                seconds, num_slices = self._durations.of(unit.kind, unit.size), {}
                if unit.kind is UnitKind.TEXT_PREFIX:
                    (text,) = unit.texts
                    index = self._next_slice(text)
                    seconds, num_slices = self._durations.slice_s(index), {text.work.text_id: index + 1}
                seconds *= max(0.5, self._random.gauss(1.0, self._durations.jitter))
                free_s = self._now_s + seconds
                self._happen(free_s)
                self._now_s = free_s
                self._ran(unit, seconds, num_slices)
            while self._on_progress is not None and self._now_s >= next_second:
                self._on_progress(next_second)
                next_second += 1.0
        self._outcome.seconds = self._now_s
        return self._outcome

    def _at(self, at_s: float, action: Callable[[], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (at_s, self._num_events, action))

    def _happen(self, until_s: float) -> None:
        """Everything that robots do until then, each at its own time."""
        while self._events and self._events[0][0] <= until_s:
            at_s, _, action = heapq.heappop(self._events)
            self._now_s = at_s
            action()
        self._now_s = until_s

    def _way_s(self) -> float:
        jitter_s = self._fleet.network_jitter_s
        return self._fleet.network_s + (self._random.expovariate(1 / jitter_s) if jitter_s > 0 else 0.0)

    def _opener(self, robot: Robot) -> Callable[[], None]:
        def open_session() -> None:
            demand = self._demand()
            others = [demand] * sum(other.is_open for other in self._robots)
            share = self._text_share(len(others) + 1)
            try:
                factor = capacity.admit(
                    others,
                    demand,
                    chunks_per_s=self._device.chunks_per_s,
                    text_share=share,
                )
            except capacity.DeviceFull:
                self._outcome.refusals["robot, for lack of capacity"] += 1
                self._at(self._now_s + RETRY_AFTER_S, open_session)
                self._outcome.refused_robots = sum(not other.is_open for other in self._robots)
                return
            robot.is_open = True
            self._outcome.refused_robots = sum(not other.is_open for other in self._robots)
            self._outcome.stretch, self._outcome.text_share = factor, share
            if self._fleet.keeps_rate:
                robot.next_due_s = self._fleet.ramp_up_s + self._share(robot) * self._interval_s(robot)
            else:
                for other in self._robots:
                    other.interval_steps = capacity.interval_steps(demand, factor)
                robot.next_due_s = self._now_s + self._random.random() * self._interval_s(robot)
            self._at(robot.next_due_s, lambda: self._observe(robot))
            if self._fleet.ask_every_s > 0:
                self._at(self._now_s + self._random.random() * self._fleet.ask_every_s, lambda: self._ask(robot))

        return open_session

    def _share(self, robot: Robot) -> float:
        """0 for the first robot, nearly 1 for the last."""
        return self._robots.index(robot) / len(self._robots)

    def _demand(self) -> capacity.Demand:
        fleet = self._fleet
        return capacity.Demand(
            rate_hz=fleet.control_rate_hz,
            interval_steps=fleet.interval_steps,
            horizon=fleet.horizon,
            delay_steps=min(fleet.horizon - 1, round(fleet.deadline_s * fleet.control_rate_hz)),
        )

    def _text_share(self, num_robots: int) -> float:
        fleet = self._fleet
        if fleet.ask_every_s <= 0:
            return 0.0
        question = capacity.TextDemand(
            questions_per_s=1 / fleet.ask_every_s, tokens=fleet.ask_tokens, within_s=fleet.ask_within_s
        )
        return capacity.text_share([question] * num_robots, self._device)

    def _interval_s(self, robot: Robot) -> float:
        return robot.interval_steps / self._fleet.control_rate_hz

    def _observe(self, robot: Robot) -> None:
        if robot.in_flight is not None:
            return  # One request in flight: the answer sends the next.
        robot.request_id += 1
        robot.in_flight = (robot.request_id, self._now_s)
        jitter = self._random.uniform(-self._fleet.jitter, self._fleet.jitter)
        robot.next_due_s = self._now_s + self._interval_s(robot) * (1 + jitter)
        self._outcome.num_requests += 1
        sent_s, request_id = self._now_s, robot.request_id
        # What the service is told is left when the request arrives there, less the way back.
        deadline_s = sent_s + self._fleet.deadline_s - self._fleet.network_s

        def arrive() -> None:
            work = ChunkWork(
                owner=robot.name,
                request_id=request_id,
                model=MODEL,
                bucket=0,
                num_steps=self._fleet.num_steps,
                arrived_s=self._now_s,
                deadline_s=deadline_s,
                payload=None,
            )
            if not self._scheduler.submit(work, self._now_s)[1]:
                self._refuse(work)

        self._at(sent_s + self._way_s(), arrive)

    def _refuse(self, work: ChunkWork[None]) -> None:
        self._outcome.refusals["chunk too late"] += 1
        self._at(self._now_s + self._way_s(), lambda: self._answered(work, is_chunk=False))

    def _answered(self, work: ChunkWork[None], *, is_chunk: bool) -> None:
        robot = self._by_name[work.owner]
        assert robot.in_flight is not None
        _, sent_s = robot.in_flight
        robot.in_flight = None
        fleet = self._fleet
        latency_s = self._now_s - sent_s
        if is_chunk:
            robot.latencies_s.append(latency_s)
            self._outcome.num_starved += 0.0 < robot.actions_until_s < self._now_s
            robot.actions_until_s = sent_s + fleet.horizon / fleet.control_rate_hz
        if not is_chunk or latency_s > fleet.deadline_s:
            robot.num_missed += 1
            self._outcome.num_missed += 1
        self._at(max(self._now_s, robot.next_due_s), lambda: self._observe(robot))

    def _ask(self, robot: Robot) -> None:
        """One question at a time, as robots ask: the next comes at its time, or when the last one is answered."""
        fleet = self._fleet
        robot.next_question_s = self._now_s + fleet.ask_every_s * self._random.uniform(0.8, 1.2)
        robot.num_texts += 1
        has_draft = fleet.draft_hit_share >= 0 and robot.num_texts > 1
        text = TextWork(
            owner=robot.name,
            text_id=(robot.name, robot.num_texts),
            model=MODEL,
            bucket=0,
            num_prefix_slices=self._durations.num_question_slices,
            num_draft_tokens=fleet.ask_tokens if has_draft else 0,
            max_tokens=fleet.ask_tokens,
            arrived_s=self._now_s + fleet.network_s,
            deadline_s=self._now_s + fleet.ask_deadline_s,
            payload=Asked(
                request_id=robot.request_id,
                is_draft_right=has_draft and self._random.random() < fleet.draft_hit_share,
            ),
            asked_by=robot.name,
        )
        self._at(self._now_s + self._way_s(), lambda: self._scheduler.ask(text))

    def _heard(self, work: TextWork[Asked]) -> None:
        """A question was answered, or dropped."""
        robot = self._by_name[work.owner]
        self._at(max(self._now_s + self._way_s(), robot.next_question_s), lambda: self._ask(robot))

    def _next_slice(self, text: Text[Asked]) -> int:
        """Of its prefix; the first is the one behind those of pictures, where these were seen."""
        has_seen = text.work.payload.request_id == self._by_name[text.work.owner].seen_request_id
        return text.num_slices or (self._durations.num_picture_slices if has_seen else 0)

    def _ran(self, unit: Unit[None, Asked], seconds: float, num_slices: Mapping[Hashable, int]) -> None:
        outcome = self._outcome
        for row in unit.rows if unit.kind is UnitKind.PREFIX else ():
            self._by_name[row.work.owner].seen_request_id = row.work.request_id
        outcome.busy_s[unit.kind.value] = outcome.busy_s.get(unit.kind.value, 0.0) + seconds
        outcome.sizes.setdefault(unit.kind.value, Counter())[unit.size] += 1
        if unit.texts and self._durations.text_lag_s > 0:
            self._at(self._now_s + self._durations.text_lag_s, lambda: self._taken_in(unit, seconds, num_slices))
        else:
            self._taken_in(unit, seconds, num_slices)

    def _taken_in(self, unit: Unit[None, Asked], seconds: float, num_slices: Mapping[Hashable, int]) -> None:
        outcome = self._outcome
        before = {text.work.text_id: text.num_tokens for text in unit.texts}
        checked = {}
        if unit.kind is UnitKind.DRAFT_CHECK:
            drafted = unit.texts[0].work
            right = (
                drafted.num_draft_tokens
                if drafted.payload.is_draft_right
                else self._random.randrange(drafted.num_draft_tokens)
            )
            checked[drafted.text_id] = min(right + 1, drafted.max_tokens)
        finished = self._scheduler.finished(unit, seconds, self._now_s, num_new_tokens=checked, num_slices=num_slices)
        for text in unit.texts:
            outcome.num_tokens += text.num_tokens - before[text.work.text_id]
            if text.num_tokens and not before[text.work.text_id]:
                outcome.first_token_s.append(self._now_s - text.work.arrived_s)
        for work in finished.texts:
            outcome.num_texts += 1
            outcome.text_s.append(self._now_s - work.arrived_s)
            self._heard(work)
        for chunk in finished.chunks:
            self._at(self._now_s + self._way_s(), self._deliver(chunk))

    def _deliver(self, work: ChunkWork[None]) -> Callable[[], None]:
        return lambda: self._answered(work, is_chunk=True)


def _capacity(fleet: Fleet, durations: UnitDurations) -> capacity.DeviceCapacity:
    """As an engine says that measured these durations."""
    check_s = durations.draft_check_s if fleet.draft_hit_share >= 0 else 0.0
    return capacity.DeviceCapacity(
        chunks_per_s=sharing.chunks_per_s(
            prefix_s=durations.of(UnitKind.PREFIX, 1),
            step_s=lambda rows: durations.of(UnitKind.EXPERT, rows),
            num_steps=fleet.num_steps,
            max_rows=fleet.max_rows,
        ),
        question_s=durations.question_s + check_s,
        text_step_s=durations.of(UnitKind.TEXT, fleet.max_texts),
        max_texts=fleet.max_texts,
    )


def _warmed_up(fleet: Fleet, durations: UnitDurations) -> ServiceTimes:
    """Estimates as an engine has them that ran each prepared unit before it served."""
    times = ServiceTimes(forgets=False)
    text_sizes = [size for size in durations.text_step_s if size <= fleet.max_texts] or [1]
    prepared: Sequence[tuple[UnitKind, Sequence[int]]] = (
        (UnitKind.PREFIX, [size for size in PREFIX_SIZES if size <= fleet.max_rows]),
        (UnitKind.EXPERT, expert_sizes(fleet.max_rows)),
        (UnitKind.TEXT_PREFIX, [1]),
        (UnitKind.DRAFT_CHECK, [1]),
        (UnitKind.TEXT, text_sizes),
    )
    for kind, sizes in prepared:
        for size in sizes:
            for _ in range(20):
                times.observe(group(kind, MODEL, 0), size, durations.of(kind, size), 0.0)
    return times
