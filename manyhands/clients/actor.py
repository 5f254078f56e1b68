"""What an operator's tool, the demo or the dashboard says to an actor. Blocking.

with ActorClient("127.0.0.1:50071") as actor:
    run_id = actor.start_run(teleoperate("reach", teleoperator="expert", episode_count=10, max_episode_steps=200))
    for result in actor.results():
        print(result.episode_number, result.success)
    print(actor.status().detail)
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .. import channel
from ..actor.v1 import actor_pb2, actor_pb2_grpc
from ..errors import ManyhandsError, Refused, Unreachable
from ..retry import Backoff, Patience
from ..security import SecuritySettings

OVER = (actor_pb2.RUN_STATE_IDLE, actor_pb2.RUN_STATE_FINISHED, actor_pb2.RUN_STATE_FAILED)
# Between two attempts at a broken Watch stream: the actor may be restarting, and somebody sits before the progress bar.
RECONNECT = Backoff(first_s=0.2, longest_s=1.0)


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """How a run ended. results are its episodes in order; detail says why it failed."""

    state: actor_pb2.RunState.ValueType
    detail: str
    results: tuple[actor_pb2.EpisodeResult, ...]

    @property
    def success_count(self) -> int:
        return sum(result.success for result in self.results)


def teleoperate(
    dataset: str,
    *,
    teleoperator: str,
    episode_count: int,
    max_episode_steps: int,
    task: str = "",
    first_seed: int = 0,
    discard_failures: bool = False,
) -> actor_pb2.RunDefinition:
    """A run in which the robot's teleoperator acts, recorded into dataset ("": not recorded)."""
    return actor_pb2.RunDefinition(
        run_id=uuid.uuid4().hex,
        mode=actor_pb2.RUN_MODE_TELEOPERATE,
        episode_count=episode_count,
        task=task,
        max_episode_steps=max_episode_steps,
        first_seed=first_seed,
        dataset=dataset,
        teleoperator=teleoperator,
        discard_failures=discard_failures,
    )


def roll_out(
    model: str,
    *,
    episode_count: int,
    max_episode_steps: int,
    replan_interval_steps: int,
    task: str = "",
    first_seed: int = 0,
    dataset: str = "",
    teleoperator: str = "",
    subtask_every_chunks: int = 0,
) -> actor_pb2.RunDefinition:
    """A run in which the served policy acts; with a teleoperator named, that one may intervene.

    Args:
        subtask_every_chunks: Asks the model's text head what to do next after so many chunks, and acts on that; 0: acts on
            the task.
    """
    return actor_pb2.RunDefinition(
        run_id=uuid.uuid4().hex,
        mode=actor_pb2.RUN_MODE_POLICY,
        episode_count=episode_count,
        task=task,
        max_episode_steps=max_episode_steps,
        first_seed=first_seed,
        dataset=dataset,
        teleoperator=teleoperator,
        model=model,
        replan_interval_steps=replan_interval_steps,
        subtask_every_chunks=subtask_every_chunks,
    )


class ActorClient(channel.Client):
    """One connection to one actor; any number of threads may use it.

    Args:
        address: "host:port".
        timeout_s: Deadline of status calls.
        start_timeout_s: Deadline of start_run(): the handshake with robot, store and model is in it.
    """

    SERVER = "actor"

    def __init__(
        self,
        address: str,
        *,
        security_settings: SecuritySettings | None = None,
        timeout_s: float = 5.0,
        start_timeout_s: float = 60.0,
    ) -> None:
        super().__init__(address, security_settings=security_settings)
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._stub = actor_pb2_grpc.ActorServiceStub(self._channel)

    def status(self) -> actor_pb2.GetStatusResponse:
        with channel.translated_errors():
            return self._stub.GetStatus(actor_pb2.GetStatusRequest(), timeout=self._timeout_s)

    def start_run(self, run: actor_pb2.RunDefinition) -> str:
        """Returns the run's id once the handshake is done and the robot may move.

        Raises:
            InvalidInput: The run cannot be, or robot, dataset and model do not fit; names the field. Nothing has moved.
            Refused: Another run is in progress, or somebody is not there. Nothing has moved.
        """
        with channel.translated_errors():
            return self._stub.StartRun(actor_pb2.StartRunRequest(run=run), timeout=self._start_timeout_s).run_id

    def stop_run(self, run_id: str = "", *, discard_episode: bool = False) -> None:
        """Ends the run (the one in progress by default) after its present tick. Stopping what is over is fine."""
        request = actor_pb2.StopRunRequest(run_id=run_id, discard_episode=discard_episode)
        with channel.translated_errors():
            self._stub.StopRun(request, timeout=15.0)

    def watch(self, max_tick_rate_hz: float = 0.0, *, timeout_s: float | None = None) -> Iterator[actor_pb2.WatchResponse]:
        """Events as they come, the present status first. Ends with the actor (Unreachable) or when the caller closes it."""
        call = self._stub.Watch(actor_pb2.WatchRequest(max_tick_rate_hz=max_tick_rate_hz), timeout=timeout_s)
        try:
            with channel.translated_errors():
                yield from call
        finally:
            call.cancel()

    def results(self, *, patience_s: float = 0.0) -> Iterator[actor_pb2.EpisodeResult]:
        """Every episode of the present run, those done already included, until the run is over.

        Args:
            patience_s: How long an actor may be away (restart with --resume-run) before Unreachable is raised.

        Raises:
            Refused: The run failed; the message says why.
        """
        for event in self._follow(patience_s=patience_s, timeout_s=None):
            if isinstance(event, actor_pb2.EpisodeResult):
                yield event
            elif event.state == actor_pb2.RUN_STATE_FAILED:
                raise Refused(event.detail or "the run failed", field="run")

    def wait(
        self,
        *,
        timeout_s: float,
        patience_s: float = 0.0,
        on_result: Callable[[actor_pb2.EpisodeResult], None] | None = None,
    ) -> RunSummary:
        """Waits for the end of the present run. Raises TooLate after timeout_s; a failed run is told by its state."""
        results: list[actor_pb2.EpisodeResult] = []
        for event in self._follow(patience_s=patience_s, timeout_s=timeout_s):
            if isinstance(event, actor_pb2.EpisodeResult):
                results.append(event)
                if on_result is not None:
                    on_result(event)
            else:
                return RunSummary(state=event.state, detail=event.detail, results=tuple(results))
        raise AssertionError("_follow ends with a status")

    def _follow(
        self, *, patience_s: float, timeout_s: float | None
    ) -> Iterator[actor_pb2.EpisodeResult | actor_pb2.GetStatusResponse]:
        """Results, then the status of a run that is over. Follows an actor through restarts."""
        give_up_s = time.monotonic() + timeout_s if timeout_s is not None else None
        reported = 0
        patience = Patience(patience_s, backoff=RECONNECT)
        while True:
            seen = 0
            status: actor_pb2.GetStatusResponse | None = None
            remaining_s = give_up_s - time.monotonic() if give_up_s is not None else None
            try:
                for event in self.watch(timeout_s=remaining_s):
                    patience.progress()
                    if event.WhichOneof("event") == "status":
                        status = event.status
                    elif event.WhichOneof("event") == "episode":
                        # A stream that was opened again tells the run's results from the first one on.
                        seen += 1
                        if seen > reported:
                            reported = seen
                            yield event.episode
                    if status is not None and status.state in OVER and seen >= status.finished_episode_count:
                        yield status
                        return
                raise Unreachable(f"the actor on {self.address} ended its stream")
            except ManyhandsError as error:
                patience.wait(error)
