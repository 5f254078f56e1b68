"""What an operator's tool or the dashboard says to a learner. Blocking.

with LearnerClient("127.0.0.1:50054") as learner:
    learner.start_run(learner_pb2.RunDefinition(run_id="mug-1", recipe="flow_metaworld", dataset="mug", model="mug"))
    for point in learner.watch():
        if point.status.state == learner_pb2.RUN_STATE_FINISHED:
            break
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self, TypeVar

from google.protobuf.message import Message

from .. import channel
from ..errors import Unreachable
from ..learner.v1 import learner_pb2, learner_pb2_grpc
from ..retry import call_with_retry
from ..security import SecuritySettings

ResponseT = TypeVar("ResponseT")
# Between attempts at a broken stream; enough for a learner that restarts with its Ray.
_RETRY_DELAYS_S = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)


class LearnerClient:
    """One connection to one learner; any number of threads may use it. All calls are retried while it is unreachable.

    Args:
        address: "host:port".
        timeout_s: Deadline of every call but watch(), attempts at a learner that is not there included.
    """

    def __init__(self, address: str, *, security_settings: SecuritySettings | None = None, timeout_s: float = 20.0) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._channel = channel.connect(address, security_settings=security_settings)
        self._stub = learner_pb2_grpc.LearnerServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def status(self) -> learner_pb2.GetStatusResponse:
        request = learner_pb2.GetStatusRequest()
        return self._call(self._stub.GetStatus, request)

    def start_run(self, run: learner_pb2.RunDefinition) -> str:
        """Begins or resumes run and answers its run_id at once.

        Raises:
            InvalidInput: Names the field that cannot be.
            Refused: Another run is in progress.
            AlreadyExists: run_id was another run.
        """
        request = learner_pb2.StartRunRequest(run=run)
        return self._call(self._stub.StartRun, request).run_id

    def stop_run(self, run_id: str) -> None:
        """Ends the run after its present step, with a checkpoint; watch() shows when."""
        request = learner_pb2.StopRunRequest(run_id=run_id)
        self._call(self._stub.StopRun, request)

    def watch(self, from_step: int = 0) -> Iterator[learner_pb2.WatchProgressResponse]:
        """The present run's points from from_step on, each new one, and a response for every change of state, for ever.

        Goes on where it was when the learner restarts; Unreachable when it stays away.
        """
        delays = iter(_RETRY_DELAYS_S)
        while True:
            try:
                with channel.translated_errors():
                    for response in self._stub.WatchProgress(learner_pb2.WatchProgressRequest(from_step=from_step)):
                        delays = iter(_RETRY_DELAYS_S)
                        if response.metrics:
                            from_step = response.step + 1
                        yield response
                raise Unreachable("the learner ended the stream: it is shutting down")
            except Unreachable:
                delay_s = next(delays, None)
                if delay_s is None:
                    raise
                time.sleep(delay_s)

    def _call(self, method: Callable[..., ResponseT], request: Message) -> ResponseT:
        return call_with_retry(lambda left_s: method(request, timeout=left_s), timeout_s=self._timeout_s, idempotent=True)
