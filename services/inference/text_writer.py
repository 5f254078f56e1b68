"""Text from a policy's language head, on one thread beside the engine's: piece by piece, while no chunk needs the device."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from manyhands.errors import Cancelled, InternalError, ManyhandsError, TooLate, Unreachable
from manyhands.inference.v1 import inference_pb2
from policies.policy import Sample, TextKind, TextRequest

from .engine_port import Question, TextEnd
from .models import ServedModel
from .unit_scheduler import MAX_TEXT_WAIT_S

logger = logging.getLogger(__name__)

Heard = Callable[[str | TextEnd], None]

_KINDS: Mapping[int, TextKind] = {
    inference_pb2.TEXT_KIND_SUBTASK: TextKind.SUBTASK,
    inference_pb2.TEXT_KIND_MEMORY: TextKind.MEMORY,
    inference_pb2.TEXT_KIND_INTERJECTION: TextKind.INTERJECTION,
    inference_pb2.TEXT_KIND_VISUAL_QUESTION: TextKind.VISUAL_QUESTION,
}


class TextWriter:
    """Answers questions one after the other.

    A piece, which is a token, or those of one character, is begun when no chunk waits or runs, or after max_wait_s. A chunk
    that comes meanwhile shares the device with it, so it is held up by what is left of that piece at most. The first comes
    with the question's whole prefix.

    Args:
        wait_for_gap: Blocks while a chunk needs the device, for as many seconds at most.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        wait_for_gap: Callable[[float], None],
        *,
        max_wait_s: float = MAX_TEXT_WAIT_S,
    ) -> None:
        self._models = models
        self._wait_for_gap = wait_for_gap
        self._max_wait_s = max_wait_s
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="text")

    def ask(self, question: Question, heard: Heard) -> Callable[[], None]:
        """As EnginePort.ask."""
        nobody_listens = threading.Event()
        try:
            self._thread.submit(self._write, question, heard, nobody_listens)
        except RuntimeError:  # Shut down.
            heard(TextEnd(error=Unreachable("the server is going away; open a session again")))
        return nobody_listens.set

    def stop(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _write(self, question: Question, heard: Heard, nobody_listens: threading.Event) -> None:
        try:
            end = self._answer(question, heard, nobody_listens)
        except ManyhandsError as error:
            end = TextEnd(error=error)
        except Exception:
            logger.exception("a question to %s failed", question.model)
            end = TextEnd(error=InternalError("the model failed on this question; the server's log has the reason"))
        heard(end)

    def _answer(self, question: Question, heard: Heard, nobody_listens: threading.Event) -> TextEnd:
        if nobody_listens.is_set() or time.monotonic() > question.until_s:  # It waited for the ones before it.
            return TextEnd(error=_too_late(question))
        request = text_request(question)
        sample = Sample(observation=question.sample.observation, task=question.sample.task)
        with self._models[question.model].borrow() as (policy, version), torch.inference_mode():
            device = next(policy.parameters()).device
            self._wait_for_gap(self._max_wait_s)
            for piece in policy.generate([sample], request, device):
                if nobody_listens.is_set():
                    return TextEnd(error=Cancelled("nobody listens any more"))
                if time.monotonic() > question.until_s:
                    raise _too_late(question)
                heard(piece)
                self._wait_for_gap(self._max_wait_s)
        return TextEnd(version=version)


def _too_late(question: Question) -> TooLate:
    return TooLate(f"the text was not finished within {question.allowed_s:g} s", field="deadline")


def text_request(question: Question) -> TextRequest:
    """As a policy takes it. InvalidInput for what no text head can be asked."""
    return TextRequest(
        kind=_KINDS[question.kind],
        user_text=question.user_text,
        previous_text=question.previous_text,
        max_new_tokens=question.max_new_tokens,
        temperature=question.temperature,
        top_p=question.top_p,
    )
