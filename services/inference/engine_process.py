"""One device's engine in a process of its own: python -m services.inference.engine_process, started by the front end only.

Rows come through one ring and chunks go back through another (shared_ring.py), everything else over a socket pair
(engine_messages.py). The main thread empties the ring and the socket; the engine's thread writes its chunks into the ring
itself. Nothing here waits for the front end: what it does not take is kept here, and when it is gone this process ends, by
the kernel's hand if need be, so that nothing is left holding a GPU.
"""

from __future__ import annotations

import functools
import logging
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from manyhands import garbage, logs, stamps
from manyhands.engine.v1 import engine_pb2
from manyhands.errors import Cancelled, InternalError, ManyhandsError

from . import engine_messages, engine_program
from .capacity import DeviceCapacity
from .engine_lines import Answers, Line
from .engine_port import Job, Outcome, Swap, SwapResult, TextEnd
from .engine_program import GONE
from .picture_gate import PictureGate, whole_pages
from .shared_ring import Doorbell, RingBroken, RingReader, RingShape, RingWriter, map_memory
from .slot_layout import Request, SlotLayout

if TYPE_CHECKING:
    from .local_engine import LocalEngine

logger = logging.getLogger(__name__)

# Rows are prepared and answers made while the thread of the engine must launch the next unit: it waits no longer than this.
SWITCH_INTERVAL_S = 0.0002
# How often the front end hears what the model can do.
CAPACITY_PERIOD_S = 0.25
# Asking a driver for its memory is not free.
LOAD_PERIOD_S = 1.0
# Of a progress bar that people see; messages between are left out.
PROGRESS_PERIOD_S = 0.05

FAILED, DEVICE_FAILED = 1, 70


class EngineHost:
    """Serves a LocalEngine to the front end at the other end of the line."""

    def __init__(self, line: Line, start: engine_pb2.Start, memory_fd: int, bells: tuple[Doorbell, Doorbell]) -> None:
        self._line = line
        self._start = start
        self._memory_fd = memory_fd
        self._request_bell, self._answer_bell = bells
        self._engine: LocalEngine | None = None
        self._texts: dict[int, Callable[[], None] | None] = {}
        self._capacity: dict[str, DeviceCapacity | None] = {}
        self._newest: dict[str, int] = {}  # Token of each owner's newest row, while it is not answered.
        self._newest_lock = threading.Lock()
        self._load_told = engine_pb2.Load()
        self._progressed_s = 0.0

    def run(self) -> int:
        """Loads, says Ready and serves until the front end says Stop or is gone; answers the exit code.

        Raises:
            ManyhandsError: A checkpoint or a setting that cannot be.
            ModuleNotFoundError: A package is not installed.
        """
        engine = self._load()
        described = [engine_messages.describe(model) for model in engine.models.values()]
        self._line.post(described=engine_pb2.Described(models=described, waits_at_gate=engine.waits_at_gate))
        layout = SlotLayout(list(engine.models.values()))
        use = self._use_rings(layout)
        if use is None:
            return GONE
        reader, answers = use
        engine.start(self._progress)
        notes = self._begin_with(engine)
        garbage.settle()
        self._post_ready(engine, notes)
        self._serve(engine, reader, answers, layout)
        engine.stop()
        return 0

    def _load(self) -> LocalEngine:
        """The engine with its models in place, not warm yet."""
        self._progress("loading the engine's libraries", 0, 0)
        # Here and not above: torch takes seconds, and one that is not installed is told to the front end.
        from policies import loading

        from .local_engine import LocalEngine
        from .model_paths import serve_model

        models = {}
        for source in self._start.models:
            folder = Path(source.checkpoint)
            total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            done, phase = 0, f"loading {source.name}"
            logger.info("loading %s from %s", source.name, folder)
            self._progress(phase, 0, total)

            def advance(_: str, num_bytes: int, phase: str = phase, total: int = total) -> None:
                nonlocal done
                done += num_bytes
                self._progress(phase, done, total)

            policy = loading.load(folder, progress=advance)
            models[source.name] = serve_model(source.name, policy, self._start)
        self._engine = LocalEngine(
            models,
            max_batch=self._start.max_batch,
            torch_threads=self._start.torch_threads,
            device=self._start.device or "cpu",
            on_fatal=self._device_failed,
            on_swap=self._tell_swap,
        )
        return self._engine

    def _use_rings(self, layout: SlotLayout) -> tuple[RingReader, Answers] | None:
        messages = self._line.receive(wait=True)
        if messages is None:
            return None
        told = messages[0].use_rings
        requests = RingShape(slot_count=told.request_slot_count, slot_bytes=told.request_slot_bytes)
        answers = RingShape(slot_count=told.answer_slot_count, slot_bytes=told.answer_slot_bytes)
        if requests.slot_bytes != layout.request_bytes or answers.slot_bytes != layout.answer_bytes:
            raise InternalError("front end and engine lay slots out differently; do they come from one installation?")
        gate_at = whole_pages(requests.num_bytes + answers.num_bytes)
        memory = map_memory(self._memory_fd, gate_at + told.gate_bytes)
        if told.gate_bytes:
            assert self._engine is not None
            self._engine.use_gate(PictureGate(memory, gate_at, told.gate_bytes))
        generation = self._start.generation
        return (
            RingReader(memory, 0, requests, self._request_bell, generation),
            Answers(RingWriter(memory, requests.num_bytes, answers, self._answer_bell, generation), layout),
        )

    def _begin_with(self, engine: LocalEngine) -> list[str]:
        if not self._start.weights_address:
            return [
                f"{told.version.model} starts with its checkpoint: there is no weights service"
                for told in self._start.resume
            ]
        from .weights_follower import Resume

        self._progress("fetching the newest weights", 0, 0)
        return engine.follow_weights(
            self._start.weights_address,
            follow=self._start.follow,
            security_settings=engine_messages.from_security(self._start.security),
            catch_up_s=stamps.to_seconds(self._start.catch_up),
            resume={
                told.version.model: Resume(version=told.version, pinned=told.pinned)
                for told in self._start.resume
                if told.version.model in engine.models
            },
        )

    def _post_ready(self, engine: LocalEngine, notes: list[str]) -> None:
        self._post_capacity(engine)
        self._post_load(engine)
        versions = [
            engine_pb2.VersionServed(version=model.version, pinned=engine.is_pinned(name))
            for name, model in engine.models.items()
        ]
        self._line.post(ready=engine_pb2.Ready(versions=versions, notes=notes, uses_gate=engine.uses_gate))

    def _serve(self, engine: LocalEngine, reader: RingReader, answers: Answers, layout: SlotLayout) -> None:
        line = self._line
        with selectors.DefaultSelector() as selector:
            selector.register(line.connection, selectors.EVENT_READ)
            for fd in (line.wake_fd, answers.wake_fd, self._request_bell.filled_fd):
                selector.register(fd, selectors.EVENT_READ)
            waits_for_slots = has_unsent = False
            capacity_at_s = load_at_s = 0.0
            while True:
                # Only what has something: every call here takes the interpreter from the thread that is to launch the row.
                ready = {key.fd for key, _ in selector.select(CAPACITY_PERIOD_S)}
                if self._request_bell.filled_fd in ready:
                    for body in reader.take():
                        self._take(engine, answers, layout.read_request(body))
                if line.connection.fileno() in ready:
                    messages = line.receive()
                    if messages is None:
                        logger.info("the front end is gone")
                        return
                    for message in messages:
                        if message.WhichOneof("message") == "stop":
                            return
                        self._obey(engine, message)
                if not ready.isdisjoint((line.wake_fd, line.connection.fileno())) and line.flush() != has_unsent:
                    has_unsent = not has_unsent
                    events = selectors.EVENT_READ | (selectors.EVENT_WRITE if has_unsent else 0)
                    selector.modify(line.connection, events)
                # Free slots are waited for only while something needs one: a wake-up per chunk saved.
                if not ready.isdisjoint((answers.wake_fd, self._answer_bell.free_fd)) and answers.flush() != waits_for_slots:
                    waits_for_slots = not waits_for_slots
                    if waits_for_slots:
                        selector.register(self._answer_bell.free_fd, selectors.EVENT_READ)
                    else:
                        selector.unregister(self._answer_bell.free_fd)
                if time.monotonic() - capacity_at_s > CAPACITY_PERIOD_S:
                    capacity_at_s = time.monotonic()
                    engine.open_left(capacity_at_s)
                    self._post_capacity(engine)
                if time.monotonic() - load_at_s > LOAD_PERIOD_S:
                    load_at_s = time.monotonic()
                    self._post_load(engine)

    def _take(self, engine: LocalEngine, answers: Answers, request: Request) -> None:
        if request.is_ahead:
            engine.expect(request.model, request.row, gate=request.gate)
            return
        if request.is_rehearsal:
            engine.rehearse(request.model, request.row)
            return

        def done(outcome: Outcome) -> None:
            with self._newest_lock:
                if self._newest.get(request.owner) == request.token:
                    del self._newest[request.owner]
            answers.put(request.token, request.model, outcome)

        with self._newest_lock:
            self._newest[request.owner] = request.token
        engine.submit(
            owner=request.owner,
            request_id=request.request_id,
            arrived_s=request.arrived_s,
            deadline_s=request.deadline_s,
            job=Job(
                model=request.model,
                row=request.row,
                done=done,
                rehearse=functools.partial(answers.rehearse, request.token, request.model),
                gate=request.gate,
            ),
        )

    def _obey(self, engine: LocalEngine, message: engine_pb2.ToEngine) -> None:
        which = message.WhichOneof("message")
        if which == "withdraw":
            self._withdraw(engine, message.withdraw)
        elif which == "ask":
            self._ask(engine, message.ask)
        elif which == "cancel_text":
            cancel = self._texts.pop(message.cancel_text.question_id, None)
            if cancel is not None:
                cancel()
        elif which == "swap":
            self._swap(engine, message.swap)
        elif which == "end_swaps":
            engine.end_swaps()

    def _withdraw(self, engine: LocalEngine, withdrawn: engine_pb2.Withdraw) -> None:
        with self._newest_lock:
            if self._newest.get(withdrawn.owner, 0) > withdrawn.last_token:
                return
            self._newest.pop(withdrawn.owner, None)
        engine.withdraw(withdrawn.owner)

    def _ask(self, engine: LocalEngine, asked: engine_pb2.Ask) -> None:
        number = asked.question_id

        def hear(piece: str | TextEnd) -> None:
            if isinstance(piece, str):
                self._line.post(at_once=False, text_piece=engine_pb2.TextPiece(question_id=number, text=piece))
                return
            self._texts.pop(number, None)
            self._line.post(text_end=engine_messages.to_text_end(number, piece))

        try:
            question = engine_messages.from_ask(asked)
        except ManyhandsError as error:
            hear(TextEnd(error=error))
            return
        # In the table before the first piece can come, on another thread.
        self._texts[number] = None
        cancel = engine.ask(question, hear)
        if number in self._texts:
            self._texts[number] = cancel

    def _swap(self, engine: LocalEngine, asked: engine_pb2.Swap) -> None:
        def done(future: Future[SwapResult]) -> None:
            result: SwapResult | ManyhandsError
            try:
                result = future.result()
            except ManyhandsError as error:
                result = error
            except CancelledError:  # It had not begun.
                result = Cancelled("the server is going away; nothing was changed")
            except Exception:
                logger.exception("version %d of %s could not be staged", asked.number, asked.model)
                result = InternalError("the version could not be staged; the server's log has the reason")
            if asked.model in engine.models:
                self._tell_version(asked.model)
            self._line.post(swap_end=engine_messages.to_swap_end(asked.swap_id, result))

        engine.swap(asked.model, asked.number).add_done_callback(done)

    def _tell_swap(self, swap: Swap) -> None:
        self._line.post(swap_event=engine_messages.to_swap_event(swap))
        if swap.accepted:
            self._tell_version(swap.version.model)

    def _tell_version(self, model: str) -> None:
        assert self._engine is not None
        served = self._engine.models[model].version
        pinned = self._engine.is_pinned(model)
        self._line.post(version_served=engine_pb2.VersionServed(version=served, pinned=pinned))

    def _post_capacity(self, engine: LocalEngine) -> None:
        for name in engine.models:
            now = engine.capacity(name)
            if self._capacity.get(name) != now:
                self._capacity[name] = now
                self._line.post(capacity=engine_messages.to_capacity(name, now))

    def _post_load(self, engine: LocalEngine) -> None:
        load = engine_messages.to_load(engine.load())
        if load != self._load_told:
            self._load_told = load
            self._line.post(load=load)

    def _progress(self, phase: str, done: int, total: int, /) -> None:
        now_s = time.monotonic()
        if 0 < done < total and now_s - self._progressed_s < PROGRESS_PERIOD_S:
            return
        self._progressed_s = now_s
        self._line.post(progress=engine_pb2.Progress(phase=phase, done=done, total=total))

    def _device_failed(self, error: Exception) -> None:
        """On the engine's thread: nothing on this device will work again in this process."""
        logger.critical("the device failed: %s; this engine ends", error)
        reason = InternalError(f"the device failed: {str(error).splitlines()[0]}")
        self._line.post(failed=engine_pb2.Failed(status=engine_messages.to_status_bytes(reason)))
        os._exit(DEVICE_FAILED)


def _end_on_error(unhandled: threading.ExceptHookArgs) -> None:
    """An engine without one of its threads would take rows and answer none; the front end starts a whole one."""
    name = unhandled.thread.name if unhandled.thread else "of a library"
    error = unhandled.exc_value
    logger.critical("the thread %s failed; this engine ends", name, exc_info=error)
    os._exit(FAILED)


def main(arguments: list[str] | None = None, host: type[EngineHost] | None = None) -> int:
    """host: Another kind of engine, for tests and benchmarks."""
    socket_fd, memory_fd, *bells = engine_program.begin(6, arguments)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    line = Line(socket.socket(fileno=socket_fd))
    messages = line.receive(wait=True)
    if messages is None:
        return GONE
    start = messages[0].start
    logs.set_up(start.log_level, process="engine", as_json=start.log_json)
    threading.excepthook = _end_on_error
    requests = Doorbell(filled_fd=bells[0], free_fd=bells[1])
    answers = Doorbell(filled_fd=bells[2], free_fd=bells[3])
    failed = engine_pb2.Failed()
    try:
        return (host or EngineHost)(line, start, memory_fd, (requests, answers)).run()
    except ManyhandsError as error:
        if isinstance(error, RingBroken):
            logger.exception("the front end is broken")
        failed.status = engine_messages.to_status_bytes(error)
    except ModuleNotFoundError as error:
        failed.missing_module = error.name or ""
        failed.status = engine_messages.to_status_bytes(InternalError(str(error)))
    except Exception as error:
        logger.exception("the engine ends")
        failed.status = engine_messages.to_status_bytes(InternalError(f"the engine ends: {error}; its log has the reason"))
    line.post(failed=failed)
    line.flush()
    return FAILED


def exit_at_once(code: int) -> NoReturn:
    """Threads of the model's libraries may still run; nothing is left to be written."""
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    exit_at_once(main())
