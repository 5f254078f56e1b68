"""The thread that gives a GPU its work: prepared units of chunks and texts, one after the other, as the scheduler decides.

Units are launched and not waited for: the next one is decided shortly before the device is free, so that it never waits for
Python, and as late as that, so that a chunk that comes in between is not passed over. A second thread waits for what the
device has done, and tells the robots. Of text a few units may be on their way: what is drawn waits for its token.

Between two units weights may change. A version comes in when no chunk is in progress: those begun are finished first, which
takes a few expert steps and no prefix, so every chunk is of one version.
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

import numpy as np

from manyhands.errors import InternalError, TooLate, Unreachable

from . import unit_warm_up
from .capacity import DeviceCapacity
from .device_use import DeviceTime, DeviceUse
from .engine import Progress
from .engine_port import Job, Question, Row, Superseded, TextEnd
from .fused_model import FusedModel
from .rows_in_work import ChunkRow, Take
from .sessions import shown
from .text_writer import Heard, text_request
from .timed_change import TimedChange
from .unit_answers import ChunkInWork, LaunchedUnit, TextInWork, end_chunk, end_text, told, too_late
from .unit_results import UnitResults, fetching
from .unit_scheduler import UnitScheduler
from .unit_state import EngineState
from .units import ACTION_KINDS, ChunkWork, TextWork, Unit, UnitKind

logger = logging.getLogger(__name__)

# A launch takes a fraction of it; whoever waits for one waits no longer.
LAUNCHED_S = 0.005


class UnitEngine:
    """Runs units of several robots on one device.

    Args:
        models: By name, prepared or not.
        max_rows: Chunks in progress at once.
        max_texts: Texts in progress at once.
        on_fatal: Told, on any thread, when the device has failed and will fail every further unit.
    """

    def __init__(
        self,
        models: Mapping[str, FusedModel],
        *,
        max_rows: int,
        max_texts: int,
        on_fatal: Callable[[Exception], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.models = dict(models)
        self._clock = clock
        self._scheduler: UnitScheduler[ChunkInWork, TextInWork] = UnitScheduler(
            max_rows=max_rows,
            max_texts=max_texts,
            max_prefixes=min((model.fused.settings.questions_at_once for model in models.values()), default=1),
        )
        use = DeviceUse(
            (name, kind)
            for name, model in models.items()
            for kind in UnitKind
            if kind in ACTION_KINDS or model.policy.has_text_head
        )
        self._state = EngineState(models=self.models, scheduler=self._scheduler, clock=clock, use=use)
        self._changed, self._device = self._state.changed, self._state.device
        # Changes of weights, for when no chunk is in progress.
        self._swaps: list[Callable[[], None]] = []
        self._capacity: dict[str, DeviceCapacity] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._results = UnitResults(self._state, on_fatal)
        self._ready: Future[None] = Future()
        self._text_ids = itertools.count(1)
        self._progress: Progress = lambda phase, done, total: None

    def start(self, progress: Progress | None = None) -> None:
        """Prepares every unit, tries each model and measures how long its units take.

        Raises:
            InternalError: A model cannot make a finite chunk.
        """
        self._progress = progress or self._progress
        self._thread.start()
        self._ready.result()
        self._results.start()

    def stop(self) -> None:
        """Finishes the chunks and texts in hand, then ends the threads."""
        with self._changed:
            self._stopping = True
            self._state.wake()
        self._thread.join()
        self._results.stop()

    # -- requests: any thread ------------------------------------------------------------------------------------------

    def submit(self, *, owner: str, request_id: int, arrived_s: float, deadline_s: float, job: Job) -> None:
        """Puts a row in line. Its outcome, and that of the owner's row it replaces, goes to job.done."""
        model = self.models[job.model]
        try:
            row = model.chunk_row(job.row, job.gate, owner)
        except Exception as error:  # Whatever is wrong with one robot's request must not end the engine of all.
            job.done(told(error, f"request {request_id} of session {shown(owner)}"))
            return
        work = ChunkWork(
            owner=owner,
            request_id=request_id,
            model=job.model,
            bucket=model.bucket(row),
            num_steps=model.num_steps,
            arrived_s=arrived_s,
            deadline_s=deadline_s,
            payload=ChunkInWork(job=job, row=row),
        )
        now_s = self._clock()
        with self._changed:
            stopping, replaced, accepted = self._stopping, None, False
            if not stopping:
                replaced, accepted = self._scheduler.submit(work, now_s)
                self._state.wake()
        if replaced is not None:
            replaced.payload.job.done(Superseded())
        if stopping:
            job.done(Unreachable("the server is going away; open a session again"))
        elif not accepted:
            job.done(too_late(work, now_s))

    def expect(self, model: str, row: Row, gate: int) -> None:
        """As EnginePort.expect.

        Args:
            gate: That the row's pictures will come through, 0 for none. The device waits for them there, unless it has other
                work.
        """
        served = self.models[model]
        is_launched = threading.Event()
        if gate and self._where_idle(functools.partial(_see_ahead, served, gate, is_launched)):
            # The pictures are awaited, the rest of the row is not: preparing it would take the interpreter from the launch.
            is_launched.wait(LAUNCHED_S)
        served.expect(row)

    def rehearse(self, model: str, row: Row) -> None:
        """As EnginePort.rehearse, where nothing else is in work."""
        served = self.models[model]
        try:
            chunk = served.chunk_row(row)
        except Exception as error:  # The row itself will say so.
            logger.debug("a row cannot be rehearsed: %s", error)
            return
        self._where_idle(functools.partial(_rehearse_launch, served, chunk))

    def _where_idle(self, change: Callable[[], None]) -> bool:
        """Has the engine's thread do it, unless it has anything else."""
        with self._changed:
            is_idle = not len(self._scheduler) and not self._state.num_outstanding
            if is_idle:
                self._state.between.append(change)
                self._state.wake()
        return is_idle

    def ask(self, question: Question, heard: Heard) -> Callable[[], None]:
        """As EnginePort.ask."""
        model = self.models[question.model]
        try:
            row = model.text_row(question.sample, text_request(question), question.owner)
        except Exception as error:
            heard(TextEnd(error=told(error, f"a question to {question.model}")))
            return lambda: None
        text_id = next(self._text_ids)
        work = TextWork(
            owner=f"text {text_id}",
            text_id=text_id,
            model=question.model,
            bucket=model.bucket(row),
            num_prefix_slices=model.num_prefix_slices,
            num_draft_tokens=len(row.draft),
            max_tokens=row.rules.max_new_tokens,
            arrived_s=self._clock(),
            deadline_s=question.until_s,
            payload=TextInWork(heard=heard, row=row),
            is_drawn=row.is_drawn,
            asked_by=question.owner,
        )
        with self._changed:
            stopping = self._stopping
            if not stopping:
                self._scheduler.ask(work)
                self._state.wake()
        if stopping:
            heard(TextEnd(error=Unreachable("the server is going away; open a session again")))
        return lambda: self._hush(text_id)

    def _hush(self, text_id: int) -> None:
        """Nobody listens to this answer any more."""
        with self._changed:
            self._forget(self._scheduler.withdraw_text(text_id))

    def withdraw(self, owner: str) -> None:
        """Drops the chunks that an owner has waiting and in progress; nobody is told."""
        with self._changed:
            self._forget(self._scheduler.withdraw(owner))

    def _forget(self, works: Sequence[ChunkWork[ChunkInWork] | TextWork[TextInWork]]) -> None:
        """Nobody is told of them; the lock is held."""
        for work in works:
            work.payload.is_over = True
        # Nobody looks at what they have made.
        self._state.release_later(works, wipe=True)

    def pending(self) -> int:
        with self._changed:
            return len(self._scheduler)

    def device_time(self) -> DeviceTime:
        """Of units since the start."""
        with self._changed:
            return self._state.use.so_far()

    def capacity(self, model: str) -> DeviceCapacity | None:
        """What the device can make, from how long units took when they were prepared."""
        return self._capacity.get(model)

    def between_passes(self, change: Callable[[], None]) -> float:
        """Runs change on the engine's thread while no chunk is in progress; answers how many seconds no unit ran.

        Raises:
            Whatever change raises; Unreachable when the engine stopped.
        """
        timed = TimedChange(functools.partial(self._change, change))
        with self._changed:
            if self._stopping:
                raise Unreachable("the server is going away")
            self._swaps.append(timed)
            self._state.wake()
        return timed.done.result()

    def _change(self, change: Callable[[], None]) -> None:
        """A question's prefix that is begun when weights change begins again: its layers must be of one version."""
        try:
            change()
        finally:
            with self._changed:
                begun = self._scheduler.restart_prefixes()
            for work in begun:
                work.payload.row.num_slices = 0

    # -- the engine's thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._prepare()
        except BaseException as error:
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        while True:
            swaps: list[Callable[[], None]] = []
            with self._changed:
                self._wait_for_turn()
                between, self._state.between = self._state.between, []
                if not between:
                    # Nothing is outstanding then: a unit is taken in with the weights it ran with, and how long the device
                    # pauses is what a change itself takes.
                    if self._swaps and not self._scheduler.num_in_progress and not self._state.num_outstanding:
                        swaps, self._swaps = self._swaps, []
                    now_s = self._clock()
                    decision = self._scheduler.next_unit(self._device.free_s(now_s), only_begun=bool(self._swaps))
                    self._state.is_waiting = decision.unit is None and not swaps
                    is_over = self._stopping and not len(self._scheduler) and not self._state.num_outstanding
            for change in (*between, *swaps):
                change()
            if between:
                continue
            for late in decision.late_chunks:
                end_chunk(late.payload, too_late(late, now_s))
            for late_text in decision.late_texts:
                # At once: what is launched next may want its place.
                self.models[late_text.model].release(late_text.payload.row, wipe=True)
                end_text(late_text.payload, TextEnd(error=TooLate("the text was not finished in time", field="deadline")))
            if decision.unit is not None:
                self._launch(decision.unit)
            elif is_over:
                return

    def _wait_for_turn(self) -> None:
        """Until something can be run, and the device is about to need it; the lock is held."""
        while not self._state.between:
            has_work = self._swaps or len(self._scheduler) or self._stopping
            if not has_work or self._state.is_waiting:
                self._changed.wait()
                continue
            patience_s = self._device.patience_s(self._clock())
            if patience_s == 0.0:
                return
            self._changed.wait(patience_s)

    def _launch(self, unit: Unit[ChunkInWork, TextInWork]) -> None:
        model = self.models[unit.model]
        takes: list[Take] = []
        try:
            wait = model.launched(lambda: takes.append(self._do(model, unit)))
        except Exception as error:
            self._results.tell_failed(unit, error)
            return
        now_s = self._clock()
        is_step = unit.kind is UnitKind.EXPERT
        nearly = [row.work for row in unit.rows if is_step and row.step == row.work.num_steps - 2]
        chunks: Sequence[ChunkWork[ChunkInWork]] = ()
        with self._changed:
            expected_s = self._scheduler.times.likely_s(unit.group, unit.size, now_s) if model.runs_ahead else 0.0
            self._device.add(expected_s, now_s)
            self._state.num_outstanding += 1
            if unit.kind in ACTION_KINDS:
                # What follows does not depend on what came out, so it is decided while the device works.
                chunks = self._scheduler.finished(unit, None, now_s).chunks
        self._results.put(
            LaunchedUnit(
                unit=unit,
                model=model,
                version=model.version,
                wait=wait,
                take=takes[0],
                chunks=chunks,
                fetch=fetching(model, [work.payload for work in chunks]),
                nearly=nearly,
            )
        )

    def _do(self, model: FusedModel, unit: Unit[ChunkInWork, TextInWork]) -> Take:
        if unit.kind is UnitKind.PREFIX:
            model.run_prefix([row.work.payload.row for row in unit.rows])
        elif unit.kind is UnitKind.EXPERT:
            model.run_expert([(row.work.payload.row, row.step) for row in unit.rows])
        elif unit.kind is UnitKind.TEXT_PREFIX:
            return model.run_text_prefix(unit.texts[0].work.payload.row)
        elif unit.kind is UnitKind.DRAFT_CHECK:
            return model.run_draft(unit.texts[0].work.payload.row)
        else:
            return model.run_text([text.work.payload.row for text in unit.texts])
        return _nothing

    # -- before the first robot ----------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        for name, model in self.models.items():
            model.fused.prepare(functools.partial(self._tell, name))
            if not np.isfinite(model.canary()).all():
                raise InternalError(f"model {name!r} fails on a plain observation: its chunk is not finite")
            self._capacity[name] = unit_warm_up.measure(name, model, self._scheduler.times, self._clock())

    def _tell(self, name: str, done: int, total: int, what: str) -> None:
        self._progress(f"preparing {name}: {what}", done, total)


def _see_ahead(model: FusedModel, gate: int, is_launched: threading.Event) -> None:
    try:
        model.see_ahead(gate)
    except Exception:
        logger.exception("pictures of %s cannot be seen ahead", model.name)
    finally:
        is_launched.set()


def _rehearse_launch(model: FusedModel, chunk: ChunkRow) -> None:
    try:
        model.rehearse_prefix(chunk)
    except Exception:
        logger.exception("a row of %s cannot be rehearsed", model.name)


def _nothing() -> None:
    """Actions are no tokens."""
