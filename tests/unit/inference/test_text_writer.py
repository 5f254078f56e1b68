"""Text on the plain path goes where chunks leave gaps, and goes on all the same where they leave none."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from policies.policy import Sample, TextRequest
from services.inference.engine import Engine, canary_row
from services.inference.engine_port import Answer, Job, Outcome, TextEnd
from services.inference.models import ServedModel, canary_sample
from services.inference.text_writer import TextWriter
from tests.support.inference_lab import GatedPolicy, make_policy
from tests.support.questions import question_about


class CountingPolicy(GatedPolicy):
    """Counts to three, and says that it has begun to."""

    has_text_head = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.begun = [threading.Event() for _ in range(3)]

    def generate(self, samples: Sequence[Sample], request: TextRequest, device: torch.device) -> Iterator[str]:
        for number, begun in enumerate(self.begun):
            begun.set()
            yield str(number)


class Lab:
    def __init__(self, max_wait_s: float) -> None:
        made = make_policy(policy_class=CountingPolicy)
        assert isinstance(made, CountingPolicy)
        self.policy = made
        served = ServedModel("tiny", made)
        self.engine = Engine({"tiny": served})
        self.writer = TextWriter({"tiny": served}, self.engine.wait_for_gap, max_wait_s=max_wait_s)
        self.heard: list[str | TextEnd] = []
        self.end: Future[TextEnd] = Future()

    def chunk(self) -> Future[Outcome]:
        """Stays at the gate."""
        self.policy.gate.clear()
        outcome: Future[Outcome] = Future()
        now_s = time.monotonic()
        job = Job(model="tiny", row=canary_row(self.policy), done=outcome.set_result)
        self.engine.submit(owner="robot", request_id=1, arrived_s=now_s, deadline_s=now_s + 60.0, job=job)
        return outcome

    def ask(self, on_piece: Callable[[], object] = lambda: None) -> None:
        def hear(piece: str | TextEnd) -> None:
            if isinstance(piece, TextEnd):
                self.end.set_result(piece)
            else:
                self.heard.append(piece)
                on_piece()

        self.writer.ask(question_about(canary_sample(self.policy.spec), deadline_s=60.0), hear)


@contextlib.contextmanager
def lab(max_wait_s: float) -> Iterator[Lab]:
    made = Lab(max_wait_s)
    made.engine.start()
    try:
        yield made
    finally:
        made.policy.gate.set()
        made.writer.stop()
        made.engine.stop()


def test_no_token_is_begun_while_a_chunk_waits_or_runs() -> None:
    with lab(max_wait_s=60.0) as at:
        first = at.chunk()
        second: Future[Future[Outcome]] = Future()
        at.ask(on_piece=lambda: second.set_result(at.chunk()) if len(at.heard) == 1 else None)
        assert not at.policy.begun[0].wait(0.2)
        at.policy.gate.set()
        assert isinstance(first.result(20.0), Answer)
        # Another chunk came with the first token: the second token waits for it.
        other = second.result(20.0)
        assert not at.policy.begun[1].wait(0.2)
        at.policy.gate.set()
        assert at.end.result(20.0).error is None
        assert at.heard == ["0", "1", "2"]
        assert isinstance(other.result(20.0), Answer)


def test_text_goes_on_where_chunks_leave_no_gap() -> None:
    with lab(max_wait_s=0.05) as at:
        chunk = at.chunk()
        at.ask()
        assert at.end.result(20.0).error is None
        assert at.heard == ["0", "1", "2"]
        assert not chunk.done()
