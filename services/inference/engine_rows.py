"""Rows to one engine process and chunks back, through the two rings; the front end's side. Lives on an event loop.

Never waits for the engine: a row that finds no slot waits here, at most one of a robot, and what comes back is checked
before it is believed.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from manyhands.engine.v1 import engine_pb2
from manyhands.errors import InternalError, ManyhandsError, TooLate, Unreachable

from .engine_port import Job, Model, Outcome, Rehearsal, Row, Superseded
from .picture_gate import PictureGate, gate_bytes, whole_pages
from .sessions import shown
from .shared_ring import Doorbell, RingBroken, RingReader, RingShape, RingWriter, grow_and_seal, make_memory
from .slot_layout import Request, SlotLayout

logger = logging.getLogger(__name__)

REQUEST_SLOTS = 16
ANSWER_SLOTS = 64

_tokens = itertools.count(1)
# Never used twice either: an engine's gate is no other one's. They have 32 bits, enough for years.
_gates = itertools.count(1)
# Of rows that are not answered.
_NOBODY: dict[str, Any] = {"owner": "", "request_id": 0, "arrived_s": 0.0, "deadline_s": 0.0}


@dataclass(frozen=True, kw_only=True)
class _Asked:
    request: Request
    job: Job


@dataclass(frozen=True, kw_only=True)
class _InFlight:
    owner: str
    deadline_s: float
    job: Job


class EngineRows:
    """Of one engine process, which is given the files and then lay_out()'s answer.

    Args:
        broken: Told that the engine says what cannot be, while a method of this object runs; it calls close().
    """

    def __init__(self, broken: Callable[[Exception], None]) -> None:
        self._broken = broken
        self._loop = asyncio.get_running_loop()
        self._memory_fd = make_memory()
        self._request_bell, self._answer_bell = Doorbell.make(), Doorbell.make()
        self._requests: RingWriter | None = None
        self._answers: RingReader | None = None
        self._layout: SlotLayout | None = None
        self._models: dict[str, Model] = {}
        self._gate: PictureGate | None = None
        # The gate that the device may be waiting at.
        self._closed = 0
        self._in_flight: dict[int, _InFlight] = {}
        self._waiting: dict[str, _Asked] = {}
        self._answered_s = 0.0
        self._is_closed = False

    @property
    def files(self) -> list[int]:
        """Descriptors that the engine process inherits, in its order."""
        return [self._memory_fd, *(fd for bell in self._bells for fd in (bell.filled_fd, bell.free_fd))]

    @property
    def _bells(self) -> tuple[Doorbell, Doorbell]:
        return self._request_bell, self._answer_bell

    def lay_out(self, models: Sequence[Model], generation: int, *, with_gate: bool) -> engine_pb2.UseRings:
        """Once, when the engine has described its models; answers what it is to be told."""
        layout = SlotLayout(models)
        requests = RingShape(slot_count=REQUEST_SLOTS, slot_bytes=layout.request_bytes)
        answers = RingShape(slot_count=ANSWER_SLOTS, slot_bytes=layout.answer_bytes)
        gate_at = whole_pages(requests.num_bytes + answers.num_bytes)
        of_gate = gate_bytes(models) if with_gate else 0
        memory = grow_and_seal(self._memory_fd, gate_at + of_gate)
        if with_gate:
            self._gate = PictureGate(memory, gate_at, of_gate)
        self._models = {model.name: model for model in models}
        self._layout = layout
        self._requests = RingWriter(memory, 0, requests, self._request_bell, generation)
        self._answers = RingReader(memory, requests.num_bytes, answers, self._answer_bell, generation)
        self._loop.add_reader(self._answer_bell.filled_fd, self._take_answers)
        return engine_pb2.UseRings(
            request_slot_count=requests.slot_count,
            request_slot_bytes=requests.slot_bytes,
            answer_slot_count=answers.slot_count,
            answer_slot_bytes=answers.slot_bytes,
            gate_bytes=of_gate,
        )

    def submit(self, *, owner: str, request_id: int, arrived_s: float, deadline_s: float, job: Job) -> None:
        """As EnginePort.submit."""
        older = self._waiting.pop(owner, None)
        if older is not None:
            older.job.done(Superseded())
        request = Request(
            token=next(_tokens),
            owner=owner,
            request_id=request_id,
            arrived_s=arrived_s,
            deadline_s=deadline_s,
            model=job.model,
            row=job.row,
            gate=self._pass_gate(job),
        )
        if not self._waiting and self._has_slot():
            self._put(request, job)
        elif self._is_closed:
            job.done(Unreachable("the engine process ended; ask again", retry_after_s=1.0))
        else:
            if not self._waiting:
                self._loop.add_reader(self._request_bell.free_fd, self._put_waiting)
            self._waiting[owner] = _Asked(request=request, job=job)

    def expect(self, model: str, row: Row, *, with_gate: bool) -> int:
        """As EnginePort.expect; where no slot is free, rows that are ready need them more.

        A gate is closed only where the engine has nothing else to do, and opened when something else comes: nobody waits
        behind another's.
        """
        may_wait = with_gate and not (self._closed or self._in_flight or self._waiting)
        gate = next(_gates) if may_wait and self._gate is not None else 0
        self._write_unasked(Request(**_NOBODY, token=next(_tokens), model=model, row=row, is_ahead=True, gate=gate))
        if not self._is_closed:  # As it is where the ring turned out to be broken.
            self._closed = gate or self._closed
        return gate

    def give_up(self, gate: int) -> None:
        """As EnginePort.give_up."""
        if gate and gate == self._closed:
            self._open_gate()

    def leave_gate(self) -> None:
        """Opens the gate that is closed, if one is: somebody else needs the device, or it is to end."""
        self.give_up(self._closed)

    def use_no_gate(self) -> None:
        """The engine waits at none."""
        self.leave_gate()
        self._gate = None

    def rehearse(self, model: str, row: Row) -> None:
        """As EnginePort.rehearse; likewise."""
        if self._gate is not None and not (self._closed or self._in_flight or self._waiting):
            self._gate.write(self._models[model], row.sample)
        self._write_unasked(Request(**_NOBODY, token=next(_tokens), model=model, row=row, is_rehearsal=True))

    def withdraw(self, owner: str) -> int:
        """Forgets what an owner has waiting and in flight; answers the last token that the engine is to forget, or 0."""
        self._waiting.pop(owner, None)
        # The engine tells nobody of them: kept here, they would be waited for until it seemed to hang.
        withdrawn = [token for token, asked in self._in_flight.items() if asked.owner == owner]
        for token in withdrawn:
            del self._in_flight[token]
        return max(withdrawn, default=0)

    def late_s(self, now_s: float) -> float:
        """Seconds for which nothing was answered since a deadline passed; not above 0 where none has."""
        waited_for = [asked.deadline_s for asked in self._in_flight.values()]
        waited_for += [waiting.request.deadline_s for waiting in self._waiting.values()]
        return now_s - max(self._answered_s, min(waited_for)) if waited_for else 0.0

    def close(self) -> None:
        """Nothing more is heard; what was asked is for fail_all()."""
        self.leave_gate()
        self._is_closed = True
        for bell in self._bells:
            for fd in (bell.filled_fd, bell.free_fd):
                self._loop.remove_reader(fd)
            bell.close()
        os.close(self._memory_fd)
        # Whoever ended knows this object and this one whom to tell: the memory need not wait for the garbage collector.
        self._requests = self._answers = self._layout = self._gate = None

    def fail_all(self, error: ManyhandsError) -> None:
        """Answers everything that was asked, after close()."""
        waiting, self._waiting = self._waiting, {}
        in_flight, self._in_flight = self._in_flight, {}
        for job in (*(asked.job for asked in in_flight.values()), *(left.job for left in waiting.values())):
            _tell(job, error)

    def _pass_gate(self, job: Job) -> int:
        """Opens a row's gate with its pictures; 0 where they went no such way. Another row's is opened for what there is."""
        if not job.gate or job.gate != self._closed:
            self.leave_gate()
            return 0
        assert self._gate is not None
        is_whole = self._gate.write(self._models[job.model], job.row.sample)
        self._open_gate()
        return job.gate if is_whole else 0

    def _open_gate(self) -> None:
        assert self._gate is not None
        self._gate.open(self._closed)
        self._closed = 0

    def _write_unasked(self, request: Request) -> None:
        if not self._waiting and self._has_slot():
            self._write(request)

    def _has_slot(self) -> bool:
        if self._is_closed:
            return False
        assert self._requests is not None, "rows come after ready"
        try:
            return self._requests.reserve() is not None
        except RingBroken as error:
            self._broken(error)
            return False

    def _put(self, request: Request, job: Job) -> None:
        """Into the slot that there is."""
        self._in_flight[request.token] = _InFlight(owner=request.owner, deadline_s=request.deadline_s, job=job)
        error = self._write(request)
        if error is not None:
            del self._in_flight[request.token]
            logger.error(
                "request %d of session %s cannot be handed to the engine: %s",
                request.request_id,
                shown(request.owner),
                error,
            )
            job.done(error)

    def _write(self, request: Request) -> InternalError | None:
        """Answers why it does not fit its slot, which is free then."""
        assert self._requests is not None
        assert self._layout is not None
        body = self._requests.reserve()
        assert body is not None
        try:
            self._layout.write_request(body, request)
        except InternalError as error:
            return error
        try:
            self._requests.publish()
        except RingBroken as error:
            self._broken(error)
        return None

    def _put_waiting(self) -> None:
        while self._waiting:
            owner, waiting = next(iter(self._waiting.items()))
            if time.monotonic() > waiting.request.deadline_s:
                del self._waiting[owner]
                waiting.job.done(TooLate("the model was busy until the deadline; replan less often", field="deadline"))
            elif self._has_slot():
                del self._waiting[owner]
                self._put(waiting.request, waiting.job)
            else:
                return
        if not self._is_closed:
            self._loop.remove_reader(self._request_bell.free_fd)

    def _take_answers(self) -> None:
        assert self._answers is not None
        assert self._layout is not None
        answered: list[tuple[Job, Outcome]] = []
        rehearsed: dict[int, tuple[Job, Rehearsal]] = {}
        try:
            for body in self._answers.take():
                token, outcome = self._layout.read_answer(body)
                asked = self._in_flight.get(token)
                if asked is None:
                    logger.debug("an answer that nobody waits for is dropped")
                elif isinstance(outcome, Rehearsal):
                    rehearsed[token] = asked.job, outcome
                else:
                    self._answered_s = time.monotonic()
                    del self._in_flight[token]
                    rehearsed.pop(token, None)  # Too late for it.
                    answered.append((asked.job, outcome))
            if self._answers.num_passed_over:
                raise InternalError("a slot was announced that holds no answer of this engine's")
        except Exception as error:
            self._broken(error)
        # Not inside: whoever hears it does so on this stack, and what they do wrong is not the engine's.
        for job, outcome in answered:
            _tell(job, outcome)
        for job, rehearsal in rehearsed.values():
            if job.rehearse is not None:
                job.rehearse(rehearsal)


def _tell(job: Job, outcome: Outcome) -> None:
    """Whatever one robot's answer does, others get theirs."""
    try:
        job.done(outcome)
    except Exception:
        logger.exception("an answer could not be told")
