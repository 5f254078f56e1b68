"""Keeps one engine process alive for the front end; to the service it is the engine.

When the process ends, requests in flight are refused at once with the time after which the next one is expected, sessions
stay open, and the engine is started again with the versions that it served. One that keeps dying is given up.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

from manyhands import metrics
from manyhands.engine.v1 import engine_pb2
from manyhands.errors import InternalError, ManyhandsError, Refused, Unreachable

from . import operator_metrics
from .capacity import DeviceCapacity
from .engine_client import HUNG_S, EngineClient, Listeners
from .engine_messages import same_model
from .engine_port import EngineLoad, Job, ModelDescription, Question, Row, Swap, SwapResult, TextEnd
from .restarts import PROVEN_S, RestartPolicy

logger = logging.getLogger(__name__)

SWAPS_KEPT = 100
STOP_S = 1.0
# How long a start takes is a guess: a robot that waited for all of it could hold for seconds beside an engine that is ready.
LONGEST_RETRY_S = 1.0
# Beyond it robots are better served with the checkpoint than not at all; the version follows when it can be had.
RESUME_CATCH_UP_S = 10.0


class EngineSupervisor:
    """Fulfils EnginePort with an engine process. On the event loop only.

    Args:
        start: What the process is told; the generation and what to resume are filled in here.
        restart_limit: Deaths after which it is given up, unless one served for a minute between.
        hung_s: An engine that answers nothing for so long after a deadline is ended and started again.
        on_serving: Told whether requests can be answered.
    """

    def __init__(
        self,
        start: engine_pb2.Start,
        *,
        restart_limit: int = 5,
        hung_s: float = HUNG_S,
        on_serving: Callable[[bool], None] = lambda serving: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.given_up = asyncio.Event()
        self.failure: Exception | None = None
        self.restart_count = 0
        self.on_serving = on_serving
        self._start = start
        self._restarts = RestartPolicy(limit=restart_limit)
        self._hung_s = hung_s
        self._clock = clock
        self._generation = 0
        self._client: EngineClient | None = None  # While it is ready.
        self._starting: EngineClient | None = None
        self._models: dict[str, ModelDescription] = {}
        self._served: dict[str, engine_pb2.VersionServed] = {}
        self._swaps: deque[Swap] = deque(maxlen=SWAPS_KEPT)
        self._expected_s = 0.0
        self._start_took_s = 1.0
        self._ready_s = 0.0
        self._stopping = False
        self._restarting: asyncio.Task[None] | None = None

    async def start(self, progress: Callable[[str, int, int], None] = lambda phase, done, total: None) -> None:
        """Returns when the engine is ready.

        Raises:
            ManyhandsError: Why it cannot be; it is not tried again.
            ModuleNotFoundError: A package of the engine's is not installed.
        """
        await self._start_one(progress)

    async def stop(self) -> None:
        """Ends the engine process, and whatever was still asked of it."""
        self._stopping = True
        if self._restarting is not None:
            self._restarting.cancel()
            await asyncio.gather(self._restarting, return_exceptions=True)
        for client in (self._client, self._starting):
            if client is not None:
                await client.stop(STOP_S)

    @property
    def models(self) -> Mapping[str, ModelDescription]:
        return self._client.models if self._client is not None else self._models

    @property
    def pid(self) -> int | None:
        """Of the engine process that serves."""
        return self._client.pid if self._client is not None else None

    def submit(self, *, owner: str, request_id: int, arrived_s: float, deadline_s: float, job: Job) -> None:
        if self._client is None:
            job.done(self._away())
            return
        self._client.submit(owner=owner, request_id=request_id, arrived_s=arrived_s, deadline_s=deadline_s, job=job)

    def expect(self, model: str, row: Row, *, with_gate: bool) -> int:
        return self._client.expect(model, row, with_gate=with_gate) if self._client is not None else 0

    def give_up(self, gate: int) -> None:
        if self._client is not None:
            self._client.give_up(gate)

    def rehearse(self, model: str, row: Row) -> None:
        if self._client is not None:
            self._client.rehearse(model, row)

    def withdraw(self, owner: str) -> None:
        if self._client is not None:
            self._client.withdraw(owner)

    def capacity(self, model: str) -> DeviceCapacity | None:
        return self._client.capacity(model) if self._client is not None else None

    def load(self) -> EngineLoad | None:
        return self._client.load() if self._client is not None else None

    def is_pinned(self, model: str) -> bool:
        told = self._served.get(model)
        return told is not None and told.pinned

    def ask(self, question: Question, heard: Callable[[str | TextEnd], None]) -> Callable[[], None]:
        if self._client is None:
            heard(TextEnd(error=self._away()))
            return lambda: None
        return self._client.ask(question, heard)

    def swap(self, model: str, number: int) -> Future[SwapResult]:
        if self._client is None:
            failed: Future[SwapResult] = Future()
            failed.set_exception(self._away())
            return failed
        return self._client.swap(model, number)

    def swaps(self) -> Sequence[Swap]:
        return list(self._swaps)

    def end_swaps(self) -> None:
        if self._client is not None:
            self._client.end_swaps()

    async def _start_one(self, progress: Callable[[str, int, int], None]) -> None:
        began_s = self._clock()
        self._generation += 1
        start = engine_pb2.Start()
        start.CopyFrom(self._start)
        start.generation = self._generation
        if self._generation > 1:
            start.resume.extend(
                engine_pb2.Resume(version=told.version, pinned=told.pinned) for told in self._served.values()
            )
            start.catch_up.FromSeconds(int(RESUME_CATCH_UP_S))
        listeners = Listeners(
            progress=progress,
            swap=self._swap_told,
            version=self._version_served,
            device_time=operator_metrics.device_did,
            end=self._engine_ended,
        )
        client = self._starting = await EngineClient.start(start, listeners, hung_s=self._hung_s)
        try:
            ready = await client.ready
            if client.ended is not None:  # In the moment since.
                raise client.ended
            self._check_same(client.models)
        except BaseException:
            await client.stop(0.0)
            raise
        finally:
            self._starting = None
        for note in ready.notes:
            logger.warning("%s", note)
        for name, model in client.models.items():
            logger.info("%s serves version %d, engine process %d", name, model.version.number, client.pid)
        self._ready_s = self._clock()
        self._start_took_s = self._ready_s - began_s
        self._models = client.models
        self._client = client
        if self._generation > 1:
            self.restart_count += 1
            operator_metrics.engine_restarted()
        self.on_serving(True)

    def _check_same(self, models: Mapping[str, ModelDescription]) -> None:
        """Sessions were opened with what the first engine described."""
        for name, known in self._models.items():
            if name not in models or not same_model(known, models[name]):
                raise Refused(
                    f"the checkpoint of {name!r} has another spec or size than when this server started; start the server "
                    "anew",
                    field="model",
                )

    def _swap_told(self, swap: Swap) -> None:
        self._swaps.append(swap)
        operator_metrics.of_model(swap.version.model).swap(swap)

    def _version_served(self, told: engine_pb2.VersionServed) -> None:
        if told.version.number > 0:
            self._served[told.version.model] = told
        elif not told.pinned:  # Else the engine could not have it yet; the next one tries again.
            self._served.pop(told.version.model, None)

    def _engine_ended(self, why: Exception) -> None:
        """From EngineClient, once for each: a serving one is replaced."""
        client, self._client = self._client, None
        if client is None or self._stopping:
            for each in (client, self._starting):
                if each is not None:
                    each.fail_all(Unreachable("the server is going away; open a session again"))
            return
        metrics.ENGINE_DEATHS.inc()
        self.on_serving(False)
        wait_s = self._restarts.died(served_s=self._clock() - self._ready_s)
        if wait_s is None:
            self._give_up(why)
            client.fail_all(Unreachable("the engine is gone for good; use another server"))
            return
        self._expected_s = self._clock() + wait_s + self._start_took_s
        client.fail_all(self._away())
        self._restarting = asyncio.create_task(self._restart(client, wait_s, why))

    async def _restart(self, ended: EngineClient, wait_s: float, why: Exception) -> None:
        try:
            await self._start_again(ended, wait_s, why)
        except Exception as error:
            logger.exception("the engine cannot be started again")
            self._give_up(error)

    async def _start_again(self, ended: EngineClient, wait_s: float | None, why: Exception) -> None:
        code = await ended.reaped()
        logger.error("the engine process %d ended (exit code %s): %s", ended.pid, code, why)
        while wait_s is not None:
            self._expected_s = self._clock() + wait_s + self._start_took_s
            await asyncio.sleep(wait_s)
            try:
                await self._start_one(lambda phase, done, total: None)
                return
            except Refused as error:
                why, wait_s = error, None
            except (ManyhandsError, ModuleNotFoundError) as error:
                logger.error("the engine cannot be started again: %s", error)
                why, wait_s = error, self._restarts.died(served_s=0.0)
        self._give_up(why)

    def _give_up(self, why: Exception) -> None:
        if isinstance(why, Refused):
            self.failure = why
        else:
            self.failure = InternalError(
                f"the engine process ended again and again, and never served for {PROVEN_S:.0f} s between; the last time: "
                f"{why}; the log has each reason"
            )
        self.given_up.set()

    def _away(self) -> ManyhandsError:
        if self._stopping or self.given_up.is_set():
            return Unreachable("the server is going away; open a session again")
        left_s = min(LONGEST_RETRY_S, max(0.1, self._expected_s - self._clock()))
        return Unreachable(
            "the engine process ended and is started again; the session stays, ask again after the wait",
            field="model",
            retry_after_s=left_s,
        )
