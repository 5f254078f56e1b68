"""LearnerService over a Runs object."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc

from manyhands import stamps
from manyhands.common.v1 import common_pb2
from manyhands.learner.v1 import learner_pb2, learner_pb2_grpc

from .progress import Point
from .runs import POLL_S, RunRequest, Runs, State, Status

_STATES = {
    State.IDLE: learner_pb2.RUN_STATE_IDLE,
    State.STARTING: learner_pb2.RUN_STATE_STARTING,
    State.TRAINING: learner_pb2.RUN_STATE_TRAINING,
    State.FINISHED: learner_pb2.RUN_STATE_FINISHED,
    State.FAILED: learner_pb2.RUN_STATE_FAILED,
}


class LearnerServicer(learner_pb2_grpc.LearnerServiceServicer):
    """Handlers only translate; Runs decides."""

    def __init__(self, runs: Runs, *, num_workers: int) -> None:
        self._runs = runs
        self._num_workers = num_workers
        self._draining = asyncio.Event()

    async def drain(self) -> None:
        """Ends the watchers' streams, then the run."""
        self._draining.set()
        await asyncio.to_thread(self._runs.close)

    async def GetStatus(  # noqa: N802
        self, request: learner_pb2.GetStatusRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> learner_pb2.GetStatusResponse:
        return self._status_message(self._runs.status)

    async def StartRun(  # noqa: N802
        self, request: learner_pb2.StartRunRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> learner_pb2.StartRunResponse:
        run = request.run
        asked = RunRequest(
            run_id=run.run_id,
            recipe=run.recipe,
            dataset=run.dataset,
            model=run.model,
            max_steps=run.max_steps,
            max_duration_s=stamps.to_seconds(run.max_duration),
            seed=run.seed,
        )
        await asyncio.to_thread(self._runs.start, asked)
        return learner_pb2.StartRunResponse(run_id=run.run_id)

    async def StopRun(  # noqa: N802
        self, request: learner_pb2.StopRunRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> learner_pb2.StopRunResponse:
        await asyncio.to_thread(self._runs.stop, request.run_id)
        return learner_pb2.StopRunResponse()

    async def WatchProgress(  # noqa: N802
        self, request: learner_pb2.WatchProgressRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> AsyncIterator[learner_pb2.WatchProgressResponse]:
        run_id: str | None = None
        num_read = 0
        last_step = 0
        last_state: tuple[State, str] | None = None
        while not self._draining.is_set():
            # The status first: points that it already counts are then there to read.
            status = self._runs.status
            points = self._runs.points()
            own_id = status.request.run_id if status.request else None
            if own_id != run_id or len(points) < num_read:
                run_id, num_read, last_step = own_id, 0, 0
            for point in points[num_read:]:
                # Steps that a restarted worker does again were told already.
                is_new = point.kind == "published" or (point.kind == "metrics" and point.step > last_step)
                if is_new and point.step >= request.from_step:
                    last_step = max(last_step, point.step)
                    yield self._point_message(point, status)
            num_read = len(points)
            if (status.state, status.detail) != last_state:
                last_state = (status.state, status.detail)
                yield learner_pb2.WatchProgressResponse(step=status.step, status=self._status_message(status))
            try:
                await asyncio.wait_for(self._draining.wait(), POLL_S)
            except TimeoutError:
                continue

    def _point_message(self, point: Point, status: Status) -> learner_pb2.WatchProgressResponse:
        message = learner_pb2.WatchProgressResponse(step=point.step, metrics=dict(point.metrics))
        message.status.CopyFrom(self._status_message(status))
        # A reader that stops at the end must not stop at a point before it.
        if status.state in (State.FINISHED, State.FAILED):
            message.status.state = learner_pb2.RUN_STATE_TRAINING
        if point.kind == "published" and status.request is not None:
            message.published.CopyFrom(_version(point, status.request.model))
        return message

    def _status_message(self, status: Status) -> learner_pb2.GetStatusResponse:
        message = learner_pb2.GetStatusResponse(
            state=_STATES[status.state],
            detail=status.detail,
            step=status.step,
            max_steps=status.max_steps,
            checkpoint_path=str(status.checkpoint or ""),
            worker_count=self._num_workers,
            restart_count=status.num_restarts,
        )
        if (request := status.request) is not None:
            message.run.CopyFrom(
                learner_pb2.RunDefinition(
                    run_id=request.run_id,
                    recipe=request.recipe,
                    dataset=request.dataset,
                    model=request.model,
                    max_steps=request.max_steps,
                    max_duration=stamps.to_duration(request.max_duration_s),
                    seed=request.seed,
                )
            )
            message.published.extend(_version(point, request.model) for point in status.published)
        return message


def _version(point: Point, model: str) -> common_pb2.PolicyVersion:
    return common_pb2.PolicyVersion(model=model, number=point.number, digest=bytes.fromhex(point.digest))
