"""What an operator's tool or the dashboard says to a learner. Blocking.

with LearnerClient("127.0.0.1:50054") as learner:
    learner.start_run(learner_pb2.RunDefinition(run_id="mug-1", recipe="flow_metaworld", dataset="mug", model="mug"))
    for point in learner.watch():
        if point.status.state == learner_pb2.RUN_STATE_FINISHED:
            break
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from google.protobuf.message import Message

from .. import channel
from ..errors import ManyhandsError, Unreachable
from ..learner.v1 import learner_pb2, learner_pb2_grpc
from ..retry import Patience, call_with_retry
from ..security import SecuritySettings

ResponseT = TypeVar("ResponseT")
# With a broken stream: enough for a learner that restarts with its Ray.
_WATCH_PATIENCE_S = 16.0


class LearnerClient(channel.Client):
    """One connection to one learner; any number of threads may use it. All calls are retried while it is unreachable.

    Args:
        address: "host:port".
        timeout_s: Deadline of every call but watch(), attempts at a learner that is not there included.
    """

    SERVER = "learner"

    def __init__(self, address: str, *, security_settings: SecuritySettings | None = None, timeout_s: float = 20.0) -> None:
        super().__init__(address, security_settings=security_settings)
        self._timeout_s = timeout_s
        self._stub = learner_pb2_grpc.LearnerServiceStub(self._channel)

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
        patience = Patience(_WATCH_PATIENCE_S)
        while True:
            try:
                with channel.translated_errors():
                    for response in self._stub.WatchProgress(learner_pb2.WatchProgressRequest(from_step=from_step)):
                        patience.progress()
                        if response.metrics:
                            from_step = response.step + 1
                        yield response
                raise Unreachable("the learner ended the stream: it is shutting down")
            except ManyhandsError as error:
                patience.wait(error)

    def _call(self, method: Callable[..., ResponseT], request: Message) -> ResponseT:
        return call_with_retry(lambda left_s: method(request, timeout=left_s), timeout_s=self._timeout_s, idempotent=True)
