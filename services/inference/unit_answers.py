"""What became of units, told to whom they were for: chunks, pieces of text and their ends.

Shapes: T horizon, A action size of the model, R of the robot.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from manyhands.common.v1 import common_pb2
from manyhands.errors import InternalError, ManyhandsError, TooLate

from .engine_port import Answer, Job, Outcome, Rehearsal, TextEnd
from .fused_model import FusedModel
from .rows_in_work import Chunk, ChunkRow, Take, TextRowInWork
from .text_writer import Heard
from .units import ChunkWork, TextWork, Unit

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ChunkInWork:
    """Attributes:
    began_s, prefix_s: When its prefix began on the device, and how long that took; known when it is done.
    is_over: It was answered, or is given up; units that were launched before that may still come back.
    """

    job: Job
    row: ChunkRow
    began_s: float = 0.0
    prefix_s: float = 0.0
    is_over: bool = False


@dataclass(kw_only=True)
class TextInWork:
    """Attributes:
    num_sent: Tokens that were heard.
    is_over: Its end was heard, or nobody listens; a unit that was launched before that may still come back.
    """

    heard: Heard
    row: TextRowInWork
    num_sent: int = 0
    is_over: bool = False


@dataclass(frozen=True, kw_only=True)
class LaunchedUnit:
    """A unit that the device runs or ran.

    Attributes:
        wait: Until it is done; answers the seconds it took.
        take: Takes the tokens of a text unit in.
        chunks: That are complete with this unit, and fetch: makes them, when it is done.
        nearly: Chunks that have one unit to go behind this one.
        version: Of the weights it ran with.
    """

    unit: Unit[ChunkInWork, TextInWork]
    model: FusedModel
    version: common_pb2.PolicyVersion
    wait: Callable[[], float]
    take: Take
    chunks: Sequence[ChunkWork[ChunkInWork]] = ()
    fetch: Callable[[], list[Chunk]] = list
    nearly: Sequence[ChunkWork[ChunkInWork]] = ()


def answer_chunk(work: ChunkWork[ChunkInWork], chunk: Chunk, launched: LaunchedUnit, done_s: float, now_s: float) -> bool:
    """Answers whether the chunk is one; done_s: when the device had it."""
    actions, model_actions = chunk
    is_finite = bool(np.isfinite(actions).all() and np.isfinite(model_actions).all())
    payload = work.payload
    outcome: Outcome
    if is_finite:
        outcome = Answer(
            actions=actions,
            model_actions=model_actions,
            version=launched.version,
            queue_s=max(0.0, payload.began_s - work.arrived_s),
            prefix_s=payload.prefix_s,
            sample_s=done_s - payload.began_s - payload.prefix_s,
            postprocess_s=now_s - done_s,
            batch_size=launched.unit.size,
        )
    else:
        logger.error(
            "version %d of %s answered a chunk that is not finite", launched.version.number, launched.model.name
        )  # fmt: skip
        outcome = InternalError("the model's chunk is not finite; no action was sent")
    end_chunk(payload, outcome)
    return is_finite


def rehearse_answer(work: ChunkWork[ChunkInWork], launched: LaunchedUnit) -> None:
    """Goes the way that answer_chunk() will go."""
    if work.payload.job.rehearse is None:
        return
    actions, model_actions = launched.model.rehearsed(work.payload.row)
    if not (np.isfinite(actions).all() and np.isfinite(model_actions).all()):
        return
    answer = Answer(
        actions=actions,
        model_actions=model_actions,
        version=launched.version,
        queue_s=0.0,
        prefix_s=0.0,
        sample_s=0.0,
        postprocess_s=0.0,
        batch_size=launched.unit.size,
    )
    work.payload.job.rehearse(Rehearsal(answer=answer))


def end_chunk(chunk: ChunkInWork, outcome: Outcome) -> None:
    """Answers it, once."""
    if not chunk.is_over:
        chunk.is_over = True
        chunk.job.done(outcome)


def end_text(text: TextInWork, end: TextEnd) -> None:
    """Ends it, once."""
    if not text.is_over:
        text.is_over = True
        text.heard(end)


def send_pieces(text: TextInWork) -> None:
    """Of tokens that nobody heard yet."""
    row = text.row
    if text.is_over:
        return
    for token in row.tokens[text.num_sent :]:
        piece = row.pieces.add(token)
        if piece is not None:
            text.heard(piece)
    text.num_sent = len(row.tokens)


def end_of(work: TextWork[TextInWork], launched: LaunchedUnit) -> TextEnd:
    if not work.payload.row.is_broken:
        return TextEnd(version=launched.version)
    logger.error("version %d of %s has no text that is a number", launched.version.number, launched.model.name)
    return TextEnd(error=InternalError("the model's text is not finite"))


def told(error: Exception, what: str) -> ManyhandsError:
    """What a client hears of an error; what it could not have known goes to the log."""
    if isinstance(error, ManyhandsError):
        return error
    logger.error("%s failed", what, exc_info=error)
    return InternalError("the model failed on this request; the server's log has the reason")


def too_late(work: ChunkWork[ChunkInWork], now_s: float) -> TooLate:
    left_ms = max(0.0, work.deadline_s - now_s) * 1e3
    return TooLate(
        f"{left_ms:.1f} ms are left, less than a chunk takes; give a longer deadline or replan less often", field="deadline"
    )
