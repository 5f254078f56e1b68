"""A process of simulated robots: the plan comes on stdin, counts go to stdout. It ends early when stdin is closed.

python -m services.loadtest.worker < plan.json
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Awaitable, Callable

import uvloop

from manyhands import channel, errors, garbage

from .links import Answer, Link, PlainLink, ServiceLink
from .plan import STAGES, Plan, Tally, count

PROGRESS_S = 0.5
REOPEN_S = 0.5
# Robots connect so long before their first request. The first of a process encodes pictures then, which the others wait for:
# late by that, all would send at once.
OPEN_AHEAD_S = 1.0
# A robot that hears nothing for this long past its deadline takes the connection for dead.
SILENCE_S = 5.0
# Refusals that a loaded server gives a good client.
FAIR_REFUSALS = frozenset({"deadline", "overloaded", "superseded"})


class SimulatedRobot:
    """One robot: observes at its rate, one request in flight, comes back when the connection breaks."""

    def __init__(self, plan: Plan, index: int, link: Link, tally: Tally, stop: asyncio.Event) -> None:
        self._plan = plan
        self._link = link
        self._tally = tally
        self._stop = stop
        share = index / plan.fleet
        # Evenly out of step, as independent robots are.
        offset_s = plan.ramp_up_s * share + (share / plan.rate_hz if plan.ramp_up_s == 0 else 0.0)
        self._begins_s = plan.begins_s + offset_s
        self._first_question_s = plan.begins_s + (plan.ramp_up_s + plan.ask_every_s) * share
        self._ends_s = plan.begins_s + plan.ramp_up_s + plan.seconds
        self._previous_text = ""

    async def run(self) -> None:
        await self._sleep_until(self._begins_s - OPEN_AHEAD_S)
        has_been_served = False
        while not self._stop.is_set() and time.monotonic() < self._ends_s:
            wait_s = REOPEN_S
            asking: asyncio.Task[None] | None = None
            try:
                await self._link.open()
                if not has_been_served:
                    has_been_served = True
                    self._tally.robots_served += 1
                if self._plan.ask_every_s > 0 and isinstance(self._link, ServiceLink):
                    asking = asyncio.create_task(self._ask_texts(self._link))
                drained_s = await self._act()
                if drained_s is None:
                    return
                self._tally.drains += 1
                wait_s = drained_s
            except errors.Overloaded as error:
                count(self._tally.refusals, "session: overloaded")
                wait_s = error.retry_after_s or wait_s
            except (errors.ManyhandsError, TimeoutError) as error:
                count(self._tally.errors, f"{type(error).__name__}: {error}"[:120])
            finally:
                if asking is not None:
                    asking.cancel()
                    await asyncio.gather(asking, return_exceptions=True)
                with contextlib.suppress(errors.ManyhandsError, TimeoutError):
                    await self._link.close()
            await self._sleep_until(min(self._ends_s, time.monotonic() + wait_s))

    async def _act(self) -> float | None:
        """Until the end; answers after how long the server wants the robot back, if it goes away."""
        period_s = 1.0 / self._plan.rate_hz
        tick = max(0, int((time.monotonic() - self._begins_s) / period_s))
        while True:
            planned_s = self._begins_s + tick * period_s
            self._link.prepare()
            await self._sleep_until(planned_s)
            if self._stop.is_set() or time.monotonic() >= self._ends_s:
                return None
            self._tally.requests += 1
            sent_s = time.monotonic()
            self._tally.lag_ms.append(round((sent_s - planned_s) * 1e3, 3))
            started = time.perf_counter()
            async with asyncio.timeout(self._plan.deadline_s + SILENCE_S):
                answer = await self._link.ask(tick)
            self._take(answer, time.perf_counter() - started)
            if answer.drained_s is not None:
                return answer.drained_s
            due = tick + 1
            tick = max(due, math.ceil((time.monotonic() - self._begins_s) / period_s))
            self._tally.skipped += tick - due
            if answer.retry_after_s:
                await self._sleep_until(time.monotonic() + answer.retry_after_s)

    def _take(self, answer: Answer, latency_s: float) -> None:
        tally = self._tally
        if answer.refusal:
            count(tally.refusals, answer.refusal)
            tally.missed_deadlines += answer.refusal == "deadline"
            if answer.refusal not in FAIR_REFUSALS:
                count(tally.errors, f"refused, {answer.refusal}: {answer.message}"[:120])
            return
        tally.chunks += 1
        tally.missed_deadlines += latency_s > self._plan.deadline_s
        tally.latency_ms.append(round(latency_s * 1e3, 3))
        tally.batch_sizes[answer.batch_size] = tally.batch_sizes.get(answer.batch_size, 0) + 1
        tally.versions[answer.version] = tally.versions.get(answer.version, 0) + 1
        if answer.replan_interval_steps:
            steps = answer.replan_interval_steps
            tally.replan_steps[steps] = tally.replan_steps.get(steps, 0) + 1
        if self._plan.with_timeline:
            tally.timeline.append((round(time.time(), 4), round(latency_s * 1e3, 3), answer.version))
        for stage in STAGES:
            if stage in answer.stage_s:
                tally.stage_ms.setdefault(stage, []).append(round(answer.stage_s[stage] * 1e3, 3))

    async def _ask_texts(self, link: ServiceLink) -> None:
        """At its own rate, however long answers take, but one after the other: after a late one the next comes at once."""
        every_s, first_s = self._plan.ask_every_s, self._first_question_s
        tick = max(0, math.ceil((time.monotonic() - first_s) / every_s))
        while True:
            await self._sleep_until(first_s + tick * every_s)
            if self._stop.is_set():
                return
            await self._ask_text(link)
            tick = max(tick + 1, math.floor((time.monotonic() - first_s) / every_s))

    async def _ask_text(self, link: ServiceLink) -> None:
        tally = self._tally
        tally.questions += 1
        started, num_tokens = time.perf_counter(), 0
        try:
            with channel.translated_errors():
                async for response in link.generate(self._plan.ask_tokens, self._previous_text):
                    if response.token_count and not num_tokens:
                        tally.first_token_ms.append(round((time.perf_counter() - started) * 1e3, 3))
                    tally.tokens += response.token_count - num_tokens
                    num_tokens = response.token_count
                    if response.finished:
                        self._previous_text = response.full_text
        except errors.Overloaded:
            count(tally.refusals, "text: overloaded")
        except errors.TooLate:
            count(tally.refusals, "text: deadline")
        except errors.ManyhandsError as error:
            count(tally.errors, f"text, {type(error).__name__}: {error}"[:120])
        else:
            tally.texts += 1
            tally.text_tokens.append(num_tokens)
            tally.text_ms.append(round((time.perf_counter() - started) * 1e3, 3))

    async def _sleep_until(self, at_s: float) -> None:
        """Or until the stop."""
        wait_s = at_s - time.monotonic()
        # Cheaper than waiting for the event: a stop is rare, and this tool has a core to share.
        while wait_s > 0 and not self._stop.is_set():
            await asyncio.sleep(min(wait_s, 0.5))
            wait_s = at_s - time.monotonic()


async def run(plan: Plan, stop: asyncio.Event, report: Callable[[Tally], None]) -> Tally:
    """Runs the plan's robots on this loop; report hears of the counts now and then."""
    tally, before_s = Tally(), time.process_time()
    shared: dict[tuple[str, ...], list[bytes]] = {}
    indices = range(plan.first, plan.first + plan.number)
    if plan.kind == "plain":
        await _together([_robot(plan, index, PlainLink(plan, shared), tally, stop) for index in indices], tally, report)
    else:
        async with channel.connect_aio(plan.address, security_settings=plan.security) as connection:
            links = [(index, ServiceLink(plan, index, connection, shared)) for index in indices]
            await _together([_robot(plan, index, link, tally, stop) for index, link in links], tally, report)
    tally.cpu_s = time.process_time() - before_s
    return tally


def _robot(plan: Plan, index: int, link: Link, tally: Tally, stop: asyncio.Event) -> Awaitable[None]:
    return SimulatedRobot(plan, index, link, tally, stop).run()


async def _together(robots: list[Awaitable[None]], tally: Tally, report: Callable[[Tally], None]) -> None:
    async def tell() -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            report(tally)

    telling = asyncio.create_task(tell())
    try:
        await asyncio.gather(*robots)
    finally:
        telling.cancel()


def main() -> int:
    plan = Plan.model_validate_json(sys.stdin.readline())

    def report(tally: Tally) -> None:
        counts = {"requests": tally.requests, "errors": tally.num_errors, "missed": tally.missed_deadlines}
        print(json.dumps({"progress": counts}), flush=True)

    async def body() -> Tally:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def wait_for_end() -> None:
            sys.stdin.read()
            with contextlib.suppress(RuntimeError):  # The loop is closed: we are done anyway.
                loop.call_soon_threadsafe(stop.set)

        threading.Thread(target=wait_for_end, daemon=True).start()
        return await run(plan, stop, report)

    garbage.settle()  # Robots wait for themselves no longer than for the server.
    tally = uvloop.run(body())
    print(json.dumps({"tally": tally.model_dump(mode="json")}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
