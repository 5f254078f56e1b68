"""An engine process without a model: python -m tests.support.fake_engine answers zeros at once.

MANNERS in its environment makes it a bad one: it answers BAD_AFTER rows as it should, and then misbehaves.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np

from manyhands.common.v1 import common_pb2
from manyhands.engine.v1 import engine_pb2
from manyhands.errors import InternalError, NotOffered
from manyhands.spec import Feature, FeatureKind, Spec
from services.inference import engine_lines, engine_process, slot_layout
from services.inference.capacity import DeviceCapacity
from services.inference.device_use import DeviceTime, UnitUse
from services.inference.engine_lines import Answers
from services.inference.engine_port import (
    Answer,
    EngineLoad,
    Job,
    ModelDescription,
    Outcome,
    Question,
    Rehearsal,
    Row,
    Swap,
    SwapResult,
    TextEnd,
)
from services.inference.engine_process import EngineHost, exit_at_once
from services.inference.picture_gate import PictureGate
from services.inference.shared_ring import Doorbell
from services.inference.units import UnitKind

MANNERS, CAMERA_SIZE, BUSY_S = "FAKE_ENGINE_MANNERS", "FAKE_ENGINE_CAMERA_SIZE", "FAKE_ENGINE_BUSY_S"
BAD_AFTER = 3
# Its driver pins no memory; no bad manners.
NO_GATE = "no gate"
HORIZON, ACTION_SIZE, STATE_SIZE = 50, 32, 14


def description(camera_size: int) -> ModelDescription:
    """Three cameras, as the large policies have."""
    spec = Spec(
        observation=(
            Feature(name="observation.state", kind=FeatureKind.STATE, dtype="float32", shape=(STATE_SIZE,)),
            *(
                Feature(
                    name=f"observation.images.{name}",
                    kind=FeatureKind.IMAGE,
                    dtype="uint8",
                    shape=(camera_size, camera_size, 3),
                )
                for name in ("front", "left", "right")
            ),
        ),
        action=(Feature(name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(STATE_SIZE,)),),
        control_rate_hz=50.0,
    )
    return ModelDescription(
        name="fake",
        type_name="fake",
        spec=spec,
        used_spec=spec,
        horizon=HORIZON,
        model_action_size=ACTION_SIZE,
        has_text_head=True,
        masks_missing_cameras=False,
        parameter_count=0,
        version=common_pb2.PolicyVersion(model="fake", number=0, digest=bytes(32)),
    )


class FakeEngine:
    """Answers each row at once, on the thread that submits it, after a rehearsal.

    The first numbers of a chunk are the row's seed, how many rows were told ahead and rehearsed so far, and, where its
    pictures came through a gate, 1 and the sum of what lies there. The first of its second action is how often somebody was
    withdrawn.
    """

    num_expected = num_rehearsed = num_answered = num_withdrawn = 0
    waits_at_gate = True
    gate: PictureGate | None = None

    def __init__(self, camera_size: int) -> None:
        self.models = {"fake": description(camera_size)}
        # What expect() was told last, what it answers where nobody closed a gate, and what is given up.
        self.expected_gate = self.next_gate = 0
        self.given_up: list[int] = []

    def start(self, progress: Any = None) -> None:
        pass

    def stop(self) -> None:
        pass

    def submit(self, *, owner: str, request_id: int, arrived_s: float, deadline_s: float, job: Job) -> None:
        actions = np.zeros((HORIZON, STATE_SIZE), dtype=np.float32)
        answer = Answer(
            actions=actions,
            model_actions=np.zeros((HORIZON, ACTION_SIZE), dtype=np.float32),
            version=self.models["fake"].version,
            queue_s=0.0,
            prefix_s=0.0,
            sample_s=0.0,
            postprocess_s=0.0,
            batch_size=1,
        )
        if job.rehearse is not None:
            job.rehearse(Rehearsal(answer=answer))
        until_s = time.monotonic() + float(os.environ.get(BUSY_S, "0"))
        while time.monotonic() < until_s:  # As a model whose Python holds the interpreter.
            pass
        actions[0, :3] = job.row.seed, self.num_expected, self.num_rehearsed
        actions[1, 0] = self.num_withdrawn
        if job.gate and job.gate == self.expected_gate and self.gate is not None and self.gate.is_open(job.gate):
            actions[0, 3:5] = 1, self.gate.pictures.sum()
        self.num_answered += 1
        job.done(answer)

    def use_gate(self, gate: PictureGate) -> None:
        if os.environ.get(MANNERS) != NO_GATE:
            self.gate = gate

    def open_left(self, now_s: float) -> None:
        pass

    @property
    def uses_gate(self) -> bool:
        return self.gate is not None

    def expect(self, model: str, row: Row, *, with_gate: bool = False, gate: int = 0) -> int:
        self.num_expected += 1
        self.expected_gate = gate
        return gate or (self.next_gate if with_gate else 0)

    def give_up(self, gate: int) -> None:
        self.given_up.append(gate)

    def rehearse(self, model: str, row: Row) -> None:
        self.num_rehearsed += 1

    def withdraw(self, owner: str) -> None:
        self.num_withdrawn += 1

    def capacity(self, model: str) -> DeviceCapacity | None:
        return None

    def load(self) -> EngineLoad:
        answered = UnitUse(device_s=0.5 * self.num_answered, num_units=self.num_answered, num_rows=2 * self.num_answered)
        return EngineLoad(
            waiting_count=2,
            device="fake",
            memory_used_bytes=3 << 30,
            memory_total_bytes=4 << 30,
            device_time=DeviceTime(units={("fake", UnitKind.PREFIX): answered}, gap_s=0.25),
        )

    def ask(self, question: Question, heard: Callable[[str | TextEnd], None]) -> Callable[[], None]:
        for word in question.user_text.split():
            heard(word)
        heard(TextEnd(version=self.models["fake"].version))
        return lambda: None

    def swap(self, model: str, number: int) -> Future[SwapResult]:
        failed: Future[SwapResult] = Future()
        failed.set_exception(NotOffered("a fake has no weights"))
        return failed

    def swaps(self) -> list[Swap]:
        return []

    def end_swaps(self) -> None:
        pass

    def is_pinned(self, model: str) -> bool:
        return False


LINE: engine_lines.Line
REQUEST_BELL: Doorbell


class FakeHost(EngineHost):
    def _load(self) -> Any:
        manners = os.environ.get(MANNERS, "")
        if manners == "fails to load":
            raise InternalError("the fake cannot be loaded")
        if manners == "dies while loading":
            os._exit(9)
        if manners == "hangs while loading":
            time.sleep(600.0)
        self._engine = FakeEngine(int(os.environ.get(CAMERA_SIZE, "16")))  # type: ignore[assignment]
        return self._engine


class BadAnswers(Answers):
    """Spoils what comes after the first answers."""

    manners = ""
    _number = 0

    def put(self, token: int, model: str, outcome: Outcome) -> None:
        self._number += 1
        if self._number <= BAD_AFTER:
            super().put(token, model, outcome)
            return
        BAD[self.manners](self, token, model, outcome)


def _scribble(answers: BadAnswers, token: int, model: str, outcome: Outcome) -> None:
    """Rubbish where the answer's header should be."""
    body = answers.ring.reserve()
    assert body is not None
    body[:] = os.urandom(len(body))
    answers.ring.publish()


def _nan(answers: BadAnswers, token: int, model: str, outcome: Outcome) -> None:
    assert isinstance(outcome, Answer)
    outcome.actions[:] = np.nan
    Answers.put(answers, token, model, outcome)


def _stale(answers: BadAnswers, token: int, model: str, outcome: Outcome) -> None:
    """A slot as a process before this one left it."""
    answers.ring._generation = 0
    Answers.put(answers, token, model, outcome)


def _overcount(answers: BadAnswers, token: int, model: str, outcome: Outcome) -> None:
    os.eventfd_write(answers.ring.doorbell.filled_fd, 1 << 40)


def _free_too_much(answers: BadAnswers, token: int, model: str, outcome: Outcome) -> None:
    os.eventfd_write(REQUEST_BELL.free_fd, 1 << 40)


def _speak(content: bytes) -> Callable[[BadAnswers, int, str, Outcome], None]:
    def speak(answers: BadAnswers, token: int, model: str, outcome: Outcome) -> None:
        LINE.connection.send(content)

    return speak


def _tell(**message: Any) -> Callable[[BadAnswers, int, str, Outcome], None]:
    def tell(answers: BadAnswers, token: int, model: str, outcome: Outcome) -> None:
        LINE.post(**message)

    return tell


def _twice(answers: BadAnswers, token: int, model: str, outcome: Outcome) -> None:
    """Each answer twice, and one that nobody asked for: not fatal, nobody may notice."""
    Answers.put(answers, token + 1_000_000, model, outcome)
    Answers.put(answers, token, model, outcome)
    Answers.put(answers, token, model, outcome)


def _hang(answers: BadAnswers, token: int, model: str, outcome: Outcome) -> None:
    threading.Event().wait()


def _die(answers: BadAnswers, token: int, model: str, outcome: Outcome) -> None:
    os._exit(9)


BAD: dict[str, Callable[[BadAnswers, int, str, Outcome], None]] = {
    "scribbles": _scribble,
    "not finite": _nan,
    "stale": _stale,
    "announces too much": _overcount,
    "frees too much": _free_too_much,
    "absurd frame": _speak(b"\xff\xff\xff\xff"),
    "no frame": _speak(b"\x05\x00\x00\x00\xff\xff\xff\xff\xff"),
    "empty frame": _speak(b"\x00\x00\x00\x00"),
    "serves another model": _tell(
        version_served=engine_pb2.VersionServed(version=common_pb2.PolicyVersion(model="stranger", number=1))
    ),
    "runs another model": _tell(
        load=engine_pb2.Load(units=[engine_pb2.UnitUse(model="stranger", kind="prefix")], gap_s=0.25)
    ),
    "did less than before": _tell(load=engine_pb2.Load(units=[engine_pb2.UnitUse(model="fake", kind="prefix")])),
    "describes itself again": _tell(described=engine_pb2.Described()),
    "status that is none": _tell(failed=engine_pb2.Failed(status=b"\xff\xff")),
    "twice": _twice,
    "hangs": _hang,
    "dies": _die,
}


class BadHost(FakeHost):
    def _use_rings(self, layout: slot_layout.SlotLayout) -> Any:
        global LINE, REQUEST_BELL
        LINE, REQUEST_BELL = self._line, self._request_bell
        use = super()._use_rings(layout)
        if use is not None:
            use[1].__class__ = BadAnswers
            use[1].manners = os.environ[MANNERS]
        return use


if __name__ == "__main__":
    bad = os.environ.get(MANNERS, "") in BAD
    exit_at_once(engine_process.main(sys.argv[1:], BadHost if bad else FakeHost))
