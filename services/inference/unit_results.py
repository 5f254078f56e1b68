"""The threads that take in what the device has done: they wait for it, answer robots and tell the scheduler.

One takes units in, in their order. Text that is drawn goes to another: to draw one of 257 000 tokens takes milliseconds, in
which chunks that are done would wait for their answers. While it has something all text goes there: texts keep their order.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from . import launches
from .engine import is_fatal
from .engine_port import TextEnd
from .fused_model import FusedModel
from .rows_in_work import Chunk
from .unit_answers import (
    ChunkInWork,
    LaunchedUnit,
    TextInWork,
    answer_chunk,
    end_chunk,
    end_of,
    end_text,
    rehearse_answer,
    send_pieces,
    told,
)
from .unit_state import EngineState
from .units import ACTION_KINDS, TextWork, Unit, UnitKind

logger = logging.getLogger(__name__)

# After so long without an answer, what answers pass through has left the processor's caches.
COLD_S = 0.004
# By how much the device's clock may be slower than the host's, at most.
CLOCKS_DIFFER = 1e-3


class UnitResults:
    """
    Args:
        on_fatal: Told, on any thread, when the device has failed and will fail every further unit.
    """

    def __init__(self, state: EngineState, on_fatal: Callable[[Exception], None] | None) -> None:
        self._state = state
        self._on_fatal = on_fatal
        self._launched: queue.SimpleQueue[LaunchedUnit | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="results", daemon=True)
        self._drawing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="drawing")
        # The unit that it was given last.
        self._drawn: Future[None] | None = None
        self._answered_s = 0.0
        # The unit that was done last, and when; None where the device had nothing to do since.
        self._before: tuple[Callable[[], float], float] | None = None

    def start(self) -> None:
        self._thread.start()

    def put(self, launched: LaunchedUnit) -> None:
        self._launched.put(launched)

    def stop(self) -> None:
        """When nothing is outstanding."""
        self._launched.put(None)
        self._thread.join()
        self._drawing.shutdown()

    def tell_failed(self, unit: Unit[ChunkInWork, TextInWork], error: Exception) -> None:
        """All rows of the unit: what may be wrong with a single one was looked for before it got here."""
        state = self._state
        with state.changed:
            state.scheduler.failed(unit, state.clock())
            state.release_later((row.work for row in unit.rows), wipe=True)
            state.release_later((text.work for text in unit.texts), wipe=True)
        answer = told(error, f"a {unit.kind.value} unit of {unit.model}")
        if self._on_fatal is not None and is_fatal(error):
            self._on_fatal(error)
        for row in unit.rows:
            end_chunk(row.work.payload, answer)
        for text in unit.texts:
            end_text(text.work.payload, TextEnd(error=answer))

    def _run(self) -> None:
        while (launched := self._launched.get()) is not None:
            self._rehearse(launched)
            try:
                seconds = launched.wait()
            except Exception as error:
                self._device_is_done(self._state.clock())
                self.tell_failed(launched.unit, error)
                self._before = None
                self._is_taken_in(launched, None)
                continue
            gap_s, done_s = self._when_done(launched, seconds)
            self._device_is_done(done_s)
            if self._is_for_drawing(launched):
                self._drawn = self._drawing.submit(self._take_in, launched, seconds, done_s, gap_s)
            else:
                self._take_in(launched, seconds, done_s, gap_s)

    def _is_for_drawing(self, launched: LaunchedUnit) -> bool:
        """Text that is drawn, and any text while some is: a text that was in a step with it may be in this one too, and its
        pieces must not pass each other."""
        if not launched.unit.texts:
            return False
        is_busy = self._drawn is not None and not self._drawn.done()
        return is_busy or any(text.work.payload.row.is_drawn for text in launched.unit.texts)

    def _when_done(self, launched: LaunchedUnit, seconds: float) -> tuple[float, float]:
        """How long the device stood still before the unit, and when it was done with it.

        This thread learns of that late: it takes tokens in, and waits for the interpreter. Counted on from the unit before,
        by the device's own clock, it is known better; a unit that is noticed earlier than it should be done puts that right.
        """
        now_s = self._state.clock()
        gap_s = launches.gap_s(self._before[0], launched.wait) if self._before is not None else None
        done_s = now_s
        if self._before is not None and gap_s is not None:
            done_s = min(now_s, self._before[1] + (gap_s + seconds) * (1.0 + CLOCKS_DIFFER))
        self._before = (launched.wait, done_s)
        return gap_s or 0.0, done_s

    def _rehearse(self, launched: LaunchedUnit) -> None:
        """Of a chunk that comes after a pause, while the device is at its last step but one and this thread only waits.

        At the last one the answer might have to wait for its rehearsal, which takes about as long as a step.
        """
        if launched.nearly and launched.model.runs_ahead and self._state.clock() - self._answered_s > COLD_S:
            try:
                rehearse_answer(launched.nearly[0], launched)
            except Exception:
                logger.exception("an answer of %s cannot be rehearsed", launched.model.name)

    def _device_is_done(self, since_s: float) -> None:
        """With the unit that was launched first."""
        state = self._state
        with state.changed:
            state.device.done(since_s)
            # Woken for nothing, the engine's thread would take the interpreter from this one, which has a chunk to answer.
            if len(state.scheduler) and not state.is_waiting:
                state.changed.notify()

    def _is_taken_in(self, launched: LaunchedUnit, seconds: float | None, gap_s: float = 0.0) -> None:
        """seconds, gap_s: Of the device, for it and between the unit before and it; whatever came of it. None: not known."""
        state, unit = self._state, launched.unit
        with state.changed:
            if seconds is not None:
                state.use.add(unit.model, unit.kind, num_rows=unit.size, device_s=seconds, gap_s=gap_s)
            state.num_outstanding -= 1
            if not state.num_outstanding and not len(state.scheduler):
                # What comes now is no gap, however soon the next chunk is there.
                self._before = None
            state.wake()

    def _take_in(self, launched: LaunchedUnit, seconds: float, done_s: float, gap_s: float) -> None:
        try:
            known = {text.work.text_id: len(text.work.payload.row.tokens) for text in launched.unit.texts}
            launched.take()
            chunks = launched.fetch()
        except Exception as error:
            self.tell_failed(launched.unit, error)
        else:
            # Robots first. No chunk ends with its prefix, so what that took is known by now.
            self._answer_chunks(launched, chunks, done_s)
            texts = self._tell_scheduler(launched, seconds, done_s, known)
            self._answer_texts(launched, texts)
        self._is_taken_in(launched, seconds, gap_s)

    def _tell_scheduler(
        self, launched: LaunchedUnit, seconds: float, done_s: float, known: Mapping[Hashable, int]
    ) -> Sequence[TextWork[TextInWork]]:
        """Answers the texts that are complete. known: Tokens of texts before the unit."""
        state, unit = self._state, launched.unit
        if unit.kind is UnitKind.PREFIX:
            for row in unit.rows:
                row.work.payload.began_s, row.work.payload.prefix_s = done_s - seconds, seconds
        new = {text.work.text_id: len(text.work.payload.row.tokens) - known[text.work.text_id] for text in unit.texts}
        ended = [text.work.text_id for text in unit.texts if text.work.payload.row.has_ended]
        slices = {}
        if unit.kind is UnitKind.TEXT_PREFIX:
            slices = {text.work.text_id: text.work.payload.row.num_slices for text in unit.texts}
        with state.changed:
            if unit.kind in ACTION_KINDS:
                state.scheduler.times.observe(unit.group, unit.size, seconds, done_s)
                return ()
            texts = state.scheduler.finished(unit, seconds, done_s, num_new_tokens=new, num_slices=slices, ended=ended).texts
            for work in texts:
                state.release_later([work], wipe=work.payload.row.is_broken)
            state.wake()
        return texts

    def _answer_chunks(self, launched: LaunchedUnit, chunks: Sequence[Chunk], done_s: float) -> None:
        state = self._state
        answered = [
            (work, answer_chunk(work, chunk, launched, done_s, state.clock()))
            for work, chunk in zip(launched.chunks, chunks, strict=True)
        ]
        if answered:
            self._answered_s = state.clock()
            with state.changed:
                for work, is_finite in answered:
                    state.release_later([work], wipe=not is_finite)

    def _answer_texts(self, launched: LaunchedUnit, complete: Sequence[TextWork[TextInWork]]) -> None:
        for text in launched.unit.texts:
            send_pieces(text.work.payload)
        for work in complete:
            end_text(work.payload, end_of(work, launched))


def fetching(model: FusedModel, launched_chunks: Sequence[ChunkInWork]) -> Callable[[], list[Chunk]]:
    """model.fetch() of the chunks; where that cannot even begin, what is answered raises why."""
    try:
        return model.fetch([chunk.row for chunk in launched_chunks])
    except Exception as error:
        return _raiser(error)


def _raiser(error: Exception) -> Callable[[], list[Chunk]]:
    def fail() -> list[Chunk]:
        raise error

    return fail
