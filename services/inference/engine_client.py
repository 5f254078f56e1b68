"""The front end's side of one engine process, from its start to its end: what both say over the socket. Rows and chunks go
another way (engine_rows.py).

Lives on an event loop and never waits for the engine; what it says is checked before it is believed. When the process ends,
or says what cannot be, everything that was asked of it fails at once, and listeners hear of the end, once.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace

from manyhands.engine.v1 import engine_pb2
from manyhands.errors import InternalError, ManyhandsError, Overloaded, Unreachable

from . import engine_messages
from .capacity import DeviceCapacity
from .device_use import DeviceTime
from .engine_port import EngineLoad, Job, ModelDescription, Question, Row, Swap, SwapResult, TextEnd
from .engine_program import EngineProgram
from .engine_rows import EngineRows

logger = logging.getLogger(__name__)

# Questions hold pictures; more of them than this wait in no buffer.
MAX_UNSENT_BYTES = 64 * 1024 * 1024
# Nothing that runs takes so long after its deadline: the device hangs.
HUNG_S = 20.0
HUNG_CHECK_S = 1.0
# While it starts it tells of each tensor that is loaded and each graph or pass that is prepared. On a GPU the longest takes
# seconds; a pass of a large model on a CPU takes minutes.
SILENT_START_S = 900.0
ENGINE_MODULE = "services.inference.engine_process"


@dataclass(frozen=True, kw_only=True)
class Listeners:
    """Who hears of an engine, on the loop.

    Attributes:
        progress: phase, done, total while it loads.
        swap: What became of a version.
        version: A version that serves, and whether newer ones do not replace it.
        device_time: What the device did since it was told last, and which device.
        end: Once, when the engine is gone: why.
    """

    progress: Callable[[str, int, int], None]
    swap: Callable[[Swap], None]
    version: Callable[[engine_pb2.VersionServed], None]
    device_time: Callable[[DeviceTime, str], None]
    end: Callable[[Exception], None]


class EngineClient:
    """One engine process. Made by start(), on the loop, in a thread that lives as long as the front end."""

    def __init__(self, listeners: Listeners, start: engine_pb2.Start, hung_s: float) -> None:
        self.models: dict[str, ModelDescription] = {}
        self.ready: asyncio.Future[engine_pb2.Ready] = asyncio.get_running_loop().create_future()
        self._listeners = listeners
        self._generation = start.generation
        self._load = EngineLoad(waiting_count=0, device=start.device)
        self._hung_s = hung_s
        self._loop = asyncio.get_running_loop()
        self._rows = EngineRows(self._broken)
        self._texts: dict[int, Callable[[str | TextEnd], None]] = {}
        self._swaps: dict[int, Future[SwapResult]] = {}
        self._capacity: dict[str, DeviceCapacity | None] = {}
        self._numbers = itertools.count(1)
        self._reading: asyncio.Task[None] | None = None
        self._watching: asyncio.TimerHandle | None = None
        self._ended: Exception | None = None
        self._process: EngineProgram | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._heard_s = time.monotonic()

    @classmethod
    async def start(cls, start: engine_pb2.Start, listeners: Listeners, *, hung_s: float = HUNG_S) -> EngineClient:
        """Starts the process; it loads and then is ready, or listeners hear of its end.

        Args:
            hung_s: An engine that answers nothing for so long after a deadline is ended.
        """
        client = cls(listeners, start, hung_s)
        ours, theirs = socket.socketpair()
        with theirs:
            client._process = EngineProgram(ENGINE_MODULE, [theirs.fileno(), *client._rows.files])
        reader, client._writer = await asyncio.open_unix_connection(sock=ours)
        client._send(start=start)
        client._reading = asyncio.create_task(client._read(reader))
        client._watching = client._loop.call_later(HUNG_CHECK_S, client._watch)
        return client

    @property
    def ended(self) -> Exception | None:
        """Why it is gone; None while it is there."""
        return self._ended

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def submit(self, *, owner: str, request_id: int, arrived_s: float, deadline_s: float, job: Job) -> None:
        self._rows.submit(owner=owner, request_id=request_id, arrived_s=arrived_s, deadline_s=deadline_s, job=job)

    def expect(self, model: str, row: Row, *, with_gate: bool) -> int:
        return self._rows.expect(model, row, with_gate=with_gate)

    def give_up(self, gate: int) -> None:
        self._rows.give_up(gate)

    def rehearse(self, model: str, row: Row) -> None:
        self._rows.rehearse(model, row)

    def withdraw(self, owner: str) -> None:
        # Also where nothing is in flight: the engine may still keep the place in line of an owner that it refused last.
        self._send(withdraw=engine_pb2.Withdraw(owner=owner, last_token=self._rows.withdraw(owner)))

    def capacity(self, model: str) -> DeviceCapacity | None:
        return self._capacity.get(model)

    def load(self) -> EngineLoad:
        return self._load

    def ask(self, question: Question, heard: Callable[[str | TextEnd], None]) -> Callable[[], None]:
        number = next(self._numbers)
        assert self._writer is not None
        if self._writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            heard(TextEnd(error=Overloaded("too many questions wait for the model", field="model", retry_after_s=1.0)))
            return lambda: None
        self._texts[number] = heard
        self._rows.leave_gate()
        self._send(ask=engine_messages.to_ask(number, question))

        def cancel() -> None:
            if self._texts.pop(number, None) is not None:
                self._send(cancel_text=engine_pb2.CancelText(question_id=number))

        return cancel

    def swap(self, model: str, number: int) -> Future[SwapResult]:
        swap_id = next(self._numbers)
        future: Future[SwapResult] = Future()
        self._swaps[swap_id] = future
        self._send(swap=engine_pb2.Swap(swap_id=swap_id, model=model, number=number))
        return future

    def end_swaps(self) -> None:
        self._send(end_swaps=engine_pb2.EndSwaps())

    async def stop(self, timeout_s: float) -> None:
        """Ends the process: politely when it is ready, and by force after timeout_s."""
        if self._ended is None and self.ready.done() and self._reading is not None:
            self._rows.leave_gate()
            self._send(stop=engine_pb2.Stop())
            await asyncio.wait([self._reading], timeout=timeout_s)
        self._end(Unreachable("the server is going away; open a session again"))
        await self.reaped()

    async def reaped(self) -> int | None:
        """As EngineProgram.reaped."""
        assert self._process is not None
        return await self._process.reaped()

    def _watch(self) -> None:
        """Ends an engine that has long left requests unanswered, or tells nothing of its start: what hangs says nothing."""
        if not self.ready.done() and time.monotonic() - self._heard_s > SILENT_START_S:
            self._broken(InternalError(f"nothing was heard of its start for {SILENT_START_S:g} s: it hangs"))
            return
        if self._rows.late_s(time.monotonic()) > self._hung_s:
            self._broken(InternalError(f"no chunk came for {self._hung_s:g} s after a deadline: it hangs"))
            return
        self._watching = self._loop.call_later(HUNG_CHECK_S, self._watch)

    def _send(self, **message: object) -> None:
        if self._ended is None and self._writer is not None:
            self._writer.write(engine_messages.frame(engine_pb2.ToEngine(**message)))  # type: ignore[arg-type]

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                header = await reader.readexactly(engine_messages.FRAME_HEADER.size)
                content = await reader.readexactly(engine_messages.frame_length(header))
                if self._ended is not None:
                    return
                self._hear(engine_messages.parse(engine_pb2.FromEngine, content))
        except (asyncio.IncompleteReadError, OSError):
            self._end(Unreachable("the engine process ended"))
        except Exception as error:
            self._broken(error)

    def _hear(self, message: engine_pb2.FromEngine) -> None:
        self._heard_s = time.monotonic()
        which = message.WhichOneof("message")
        if which == "text_piece":
            piece = message.text_piece
            heard = self._texts.get(piece.question_id)
            if heard is not None:
                heard(piece.text)
        elif which == "text_end":
            heard = self._texts.pop(message.text_end.question_id, None)
            if heard is not None:
                heard(engine_messages.from_text_end(message.text_end))
        elif which == "capacity":
            self._capacity[message.capacity.model] = engine_messages.from_capacity(message.capacity)
        elif which == "load":
            self._take_load(message.load)
        elif which == "version_served":
            self._serve_version(message.version_served)
        elif which == "swap_event":
            self._listeners.swap(engine_messages.from_swap_event(message.swap_event))
        elif which == "swap_end":
            self._end_swap(message.swap_end)
        elif which == "progress":
            progress = message.progress
            self._listeners.progress(progress.phase, progress.done, progress.total)
        elif which == "described":
            self._lay_out(message.described)
        elif which == "ready":
            for told in message.ready.versions:
                self._serve_version(told)
            if not message.ready.uses_gate:
                self._rows.use_no_gate()
            if not self.ready.done():
                self.ready.set_result(message.ready)
        elif which == "failed":
            self._end(_failure(message.failed))

    def _lay_out(self, message: engine_pb2.Described) -> None:
        if self.models or not message.models:
            raise engine_messages.BadFrame(f"describes {len(message.models)} models, and once is enough")
        self.models = engine_messages.descriptions(message.models)
        models = list(self.models.values())
        self._send(use_rings=self._rows.lay_out(models, self._generation, with_gate=message.waits_at_gate))

    def _take_load(self, message: engine_pb2.Load) -> None:
        load = engine_messages.from_load(message, self._load.device)
        strangers = {model for model, _ in load.device_time.units} - self.models.keys()
        if strangers:
            raise engine_messages.BadFrame(f"runs units of {sorted(strangers)}, which it did not describe")
        # Counted from 0 in every process: whoever adds up what came since needs to know of no restart.
        self._listeners.device_time(load.device_time.since(self._load.device_time), load.device)
        self._load = load

    def _serve_version(self, told: engine_pb2.VersionServed) -> None:
        model = self.models.get(told.version.model)
        if model is None:
            raise engine_messages.BadFrame(f"serves {told.version.model!r}, which it did not describe")
        self.models[model.name] = replace(model, version=told.version)
        self._listeners.version(told)

    def _end_swap(self, message: engine_pb2.SwapEnd) -> None:
        future = self._swaps.pop(message.swap_id, None)
        if future is None or future.cancelled():
            return
        result = engine_messages.from_swap_end(message)
        if isinstance(result, SwapResult):
            future.set_result(result)
        else:
            future.set_exception(result)

    def _broken(self, error: Exception) -> None:
        """An engine that says what cannot be, or hangs, is not listened to any more."""
        ours = isinstance(error, ManyhandsError)
        logger.error("the engine process is ended: %s", error, exc_info=None if ours else error)
        self._end(error if ours else InternalError(f"the engine process said what cannot be: {error}"))

    def _end(self, why: Exception) -> None:
        """Everything that was asked fails; nothing more is heard."""
        if self._ended is not None:
            return
        self._ended = why
        assert self._process is not None
        assert self._writer is not None
        self._process.kill()
        self._writer.transport.abort()
        self._rows.close()
        if self._watching is not None:
            self._watching.cancel()
        self._listeners.end(why)
        if not self.ready.done():
            self.ready.set_exception(why)
            self.ready.exception()  # Whoever waits hears it; nobody has to.

    def fail_all(self, error: ManyhandsError) -> None:
        """Answers everything that was asked of an engine that ended."""
        texts, self._texts = self._texts, {}
        swaps, self._swaps = self._swaps, {}
        self._rows.fail_all(error)
        for heard in texts.values():
            heard(TextEnd(error=error))
        for future in swaps.values():
            if not future.cancelled():
                future.set_exception(error)


def _failure(message: engine_pb2.Failed) -> Exception:
    if message.missing_module:
        return ModuleNotFoundError(f"No module named {message.missing_module!r}", name=message.missing_module)
    return engine_messages.from_status_bytes(message.status) or InternalError("the engine process failed")
