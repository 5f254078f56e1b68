"""The thread that runs a GPU: prepared units of chunks and texts, one after the other, as the scheduler decides.

Between two units weights may change. A version comes in when no chunk is in progress: those begun are finished first, which
takes a few expert steps and no prefix, so every chunk is of one version.
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from manyhands.errors import InternalError, ManyhandsError, TooLate, Unreachable

from . import unit_warm_up
from .capacity import DeviceCapacity
from .engine import Progress, is_fatal
from .engine_port import Answer, Job, Outcome, Question, Superseded, TextEnd
from .fused_model import ChunkRow, FusedModel, TextRowInWork
from .text_writer import Heard, text_request
from .timed_change import TimedChange
from .unit_scheduler import UnitScheduler
from .units import ChunkWork, TextWork, Unit, UnitKind

logger = logging.getLogger(__name__)

# Units that the device may have before it: one that runs and one behind it.
MAX_AHEAD = 1


@dataclass(kw_only=True)
class _Chunk:
    job: Job
    row: ChunkRow
    began_s: float = 0.0
    prefix_s: float = 0.0


@dataclass(kw_only=True)
class _Text:
    heard: Heard
    row: TextRowInWork
    num_sent: int = 0


class UnitEngine:
    """Runs units of several robots on one device.

    Args:
        models: By name, prepared or not.
        max_rows: Chunks in progress at once.
        max_texts: Texts in progress at once.
        on_fatal: Told, on the engine's thread, when the device has failed and will fail every further unit.
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
        self._on_fatal = on_fatal
        self._scheduler: UnitScheduler[_Chunk, _Text] = UnitScheduler(max_rows=max_rows, max_texts=max_texts)
        self._changed = threading.Condition()
        # Slots to give back, at once; and changes of weights, when no chunk is in progress.
        self._between: list[Callable[[], None]] = []
        self._swaps: list[Callable[[], None]] = []
        self._capacity: dict[str, DeviceCapacity] = {}
        # Of units that the device may still run.
        self._ahead: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
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

    def stop(self) -> None:
        """Finishes the chunks and texts in hand, then ends the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    # -- requests: any thread ------------------------------------------------------------------------------------------

    def submit(self, *, owner: str, request_id: int, arrived_s: float, deadline_s: float, job: Job) -> None:
        """Puts a row in line. Its outcome, and that of the owner's row it replaces, goes to job.done."""
        model = self.models[job.model]
        try:
            row = model.chunk_row(job.row)
        except Exception as error:  # Whatever is wrong with one robot's request must not end the engine of all.
            job.done(_told(error, f"request {request_id} of session {owner}"))
            return
        work = ChunkWork(
            owner=owner,
            request_id=request_id,
            model=job.model,
            bucket=model.bucket(row),
            num_steps=model.num_steps,
            arrived_s=arrived_s,
            deadline_s=deadline_s,
            payload=_Chunk(job=job, row=row),
        )
        now_s = self._clock()
        with self._changed:
            stopping, replaced, accepted = self._stopping, None, False
            if not stopping:
                replaced, accepted = self._scheduler.submit(work, now_s)
                self._changed.notify()
        if replaced is not None:
            replaced.payload.job.done(Superseded())
        if stopping:
            job.done(Unreachable("the server is going away; open a session again"))
        elif not accepted:
            job.done(_too_late(work, now_s))

    def ask(self, question: Question, heard: Heard) -> Callable[[], None]:
        """As EnginePort.ask."""
        model = self.models[question.model]
        try:
            row = model.text_row(question.sample, text_request(question))
        except Exception as error:
            heard(TextEnd(error=_told(error, f"a question to {question.model}")))
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
            payload=_Text(heard=heard, row=row),
        )
        with self._changed:
            stopping = self._stopping
            if not stopping:
                self._scheduler.ask(work)
                self._changed.notify()
        if stopping:
            heard(TextEnd(error=Unreachable("the server is going away; open a session again")))
        return lambda: self._hush(text_id)

    def _hush(self, text_id: int) -> None:
        """Nobody listens to this answer any more."""
        with self._changed:
            self._release_later(self._scheduler.withdraw_text(text_id))
            self._changed.notify()

    def withdraw(self, owner: str) -> None:
        """Drops what an owner has waiting and in progress; nobody is told."""
        with self._changed:
            chunks, texts = self._scheduler.withdraw(owner)
            self._release_later((*chunks, *texts))
            self._changed.notify()

    def pending(self) -> int:
        with self._changed:
            return len(self._scheduler)

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
            self._changed.notify()
        return timed.done.result()

    def _release_later(self, works: Sequence[ChunkWork[_Chunk] | TextWork[_Text]]) -> None:
        """A unit that runs may still write into their slots."""
        for work in works:
            self._between.append(functools.partial(self.models[work.model].release, work.payload.row))

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
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._between or self._swaps or len(self._scheduler))
                between, self._between = self._between, []
                swaps: list[Callable[[], None]] = []
                if self._swaps and not self._scheduler.num_in_progress:
                    swaps, self._swaps = self._swaps, []
                now_s = self._clock()
                decision = self._scheduler.next_unit(now_s, only_begun=bool(self._swaps))
                is_over = self._stopping and not len(self._scheduler)
            for change in (*between, *swaps):
                change()
            for late in decision.late_chunks:
                late.payload.job.done(_too_late(late, now_s))
            for late_text in decision.late_texts:
                self._end_text(late_text, TextEnd(error=TooLate("the text was not finished in time", field="deadline")))
            if decision.unit is not None:
                self._run_unit(decision.unit)
            elif is_over:
                return

    def _run_unit(self, unit: Unit[_Chunk, _Text]) -> None:
        started_s = self._clock()
        model = self.models[unit.model]
        known = {text.work.text_id: len(text.work.payload.row.tokens) for text in unit.texts}
        try:
            self._do(model, unit)
            if unit.kind is UnitKind.EXPERT and all(row.num_steps_left > 1 for row in unit.rows):
                self._run_on(model, unit)
                return
            self._ahead.clear()
            model.wait()
        except Exception as error:
            self._fail(unit, error)
            return
        now_s = self._clock()
        new = {text.work.text_id: len(text.work.payload.row.tokens) - known[text.work.text_id] for text in unit.texts}
        ended = [text.work.text_id for text in unit.texts if text.work.payload.row.has_ended]
        for row in unit.rows:
            chunk = row.work.payload
            if unit.kind is UnitKind.PREFIX:
                chunk.began_s, chunk.prefix_s = started_s, now_s - started_s
        with self._changed:
            finished = self._scheduler.finished(unit, now_s - started_s, now_s, num_new_tokens=new, ended=ended)
        for text in unit.texts:
            self._send_pieces(text.work.payload)
        for work in finished.chunks:
            self._end_chunk(model, work, now_s, unit.size)
        for text_work in finished.texts:
            if text_work.payload.row.is_broken:
                logger.error("version %d of %s has no text that is a number", model.version.number, model.name)
                self._end_text(text_work, TextEnd(error=InternalError("the model's text is not finite")))
            else:
                self._end_text(text_work, TextEnd(version=model.version))

    def _run_on(self, model: FusedModel, unit: Unit[_Chunk, _Text]) -> None:
        """An Euler step that gives nothing to anybody yet: what follows is decided while the device still works.

        So the device does not idle while Python thinks. How long the step took is not known then, and needs not be: prepared
        units always take the same, and the last step of a chunk is measured.
        """
        if len(self._ahead) >= MAX_AHEAD:
            self._ahead.popleft()()
        self._ahead.append(model.mark())
        with self._changed:
            self._scheduler.finished(unit, None, self._clock())

    def _do(self, model: FusedModel, unit: Unit[_Chunk, _Text]) -> None:
        if unit.kind is UnitKind.PREFIX:
            model.run_prefix([row.work.payload.row for row in unit.rows])
        elif unit.kind is UnitKind.EXPERT:
            model.run_expert([(row.work.payload.row, row.step) for row in unit.rows])
        elif unit.kind is UnitKind.TEXT_PREFIX:
            model.run_text_prefix(unit.texts[0].work.payload.row)
        elif unit.kind is UnitKind.DRAFT_CHECK:
            model.run_draft(unit.texts[0].work.payload.row)
        else:
            model.run_text([text.work.payload.row for text in unit.texts])

    def _end_chunk(self, model: FusedModel, work: ChunkWork[_Chunk], now_s: float, batch_size: int) -> None:
        payload = work.payload
        actions, model_actions = model.chunk(payload.row)
        is_finite = bool(np.isfinite(actions).all() and np.isfinite(model_actions).all())
        model.release(payload.row, wipe=not is_finite)
        finished_s = self._clock()
        outcome: Outcome
        if is_finite:
            outcome = Answer(
                actions=actions,
                model_actions=model_actions,
                version=model.version,
                queue_s=payload.began_s - work.arrived_s,
                prefix_s=payload.prefix_s,
                sample_s=now_s - payload.began_s - payload.prefix_s,
                postprocess_s=finished_s - now_s,
                batch_size=batch_size,
            )
        else:
            logger.error("version %d of %s answered a chunk that is not finite", model.version.number, model.name)
            outcome = InternalError("the model's chunk is not finite; no action was sent")
        payload.job.done(outcome)

    def _send_pieces(self, text: _Text) -> None:
        row = text.row
        for token in row.tokens[text.num_sent :]:
            piece = row.pieces.add(token)
            if piece is not None:
                text.heard(piece)
        text.num_sent = len(row.tokens)

    def _end_text(self, work: TextWork[_Text], end: TextEnd) -> None:
        self.models[work.model].release(work.payload.row, wipe=work.payload.row.is_broken)
        work.payload.heard(end)

    def _fail(self, unit: Unit[_Chunk, _Text], error: Exception) -> None:
        """All rows of the unit: what may be wrong with a single one was looked for before it got here."""
        with self._changed:
            self._scheduler.failed(unit, self._clock())
        told = _told(error, f"a {unit.kind.value} unit of {unit.model}")
        if self._on_fatal is not None and is_fatal(error):
            self._on_fatal(error)
        for row in unit.rows:
            self.models[unit.model].release(row.work.payload.row)
            row.work.payload.job.done(told)
        for text in unit.texts:
            self._end_text(text.work, TextEnd(error=told))

    # -- before the first robot ----------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        for name, model in self.models.items():
            model.fused.prepare(functools.partial(self._tell, name))
            if not np.isfinite(model.canary()).all():
                raise InternalError(f"model {name!r} fails on a plain observation: its chunk is not finite")
            self._capacity[name] = unit_warm_up.measure(name, model, self._scheduler.times, self._clock())

    def _tell(self, name: str, done: int, total: int, what: str) -> None:
        self._progress(f"preparing {name}: {what}", done, total)


def _told(error: Exception, what: str) -> ManyhandsError:
    """What a client hears of an error; what it could not have known goes to the log."""
    if isinstance(error, ManyhandsError):
        return error
    logger.error("%s failed", what, exc_info=error)
    return InternalError("the model failed on this request; the server's log has the reason")


def _too_late(work: ChunkWork[_Chunk], now_s: float) -> TooLate:
    left_ms = max(0.0, work.deadline_s - now_s) * 1e3
    return TooLate(
        f"{left_ms:.1f} ms are left, less than a chunk takes; give a longer deadline or replan less often", field="deadline"
    )
