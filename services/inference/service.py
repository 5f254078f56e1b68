"""The RPCs of the inference service, and its going away without losing a chunk that was asked for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from manyhands import stamps
from manyhands.clients.act_stream import NUMBER_KEY, SESSION_KEY
from manyhands.errors import InvalidInput, ManyhandsError, NotFound, Overloaded, Unreachable
from manyhands.inference.v1 import inference_pb2, inference_pb2_grpc
from manyhands.security import is_same_machine
from manyhands.spec import FeatureKind, Spec

from . import capacity, operator_metrics, text
from .engine_port import EnginePort, Model
from .operator_notes import OperatorNotes
from .prepare import MAX_TASK_CHARACTERS
from .service_status import ModelUse, status
from .sessions import AdaptationKind, Session, Sessions, fit
from .shared_pictures import MAX_BYTES_IN_ALL, SharedPictures
from .stats import ServiceStats
from .stream import RobotStream
from .text_watch import watching_text
from .tracing import Traces

logger = logging.getLogger(__name__)

SERVICE_NAME = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
EXPIRY_PERIOD_S = 0.25
# Clients that were told to leave get this long to go by themselves; then their streams are ended.
DRAIN_S = 1.5
RECONNECT_AFTER_S = 1.0
# Room for names, stamps and protobuf around the arrays.
MESSAGE_OVERHEAD_BYTES = 64 * 1024
# Faster than robots observe: beyond it one has lost its clock, and each request costs the loop that all robots share what
# its bytes take to read. What is not read waits in the connection, whose window fills.
MAX_REQUESTS_HZ = 200.0
# Of a stream's number, as of a request's id: 64 bits.
MAX_NUMBER_DIGITS = 20

_KINDS = {
    AdaptationKind.IGNORED: inference_pb2.ADAPTATION_KIND_IGNORED,
    AdaptationKind.RESIZED: inference_pb2.ADAPTATION_KIND_RESIZED,
    AdaptationKind.PADDED: inference_pb2.ADAPTATION_KIND_PADDED,
    AdaptationKind.MASKED: inference_pb2.ADAPTATION_KIND_MASKED,
}


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Serves an engine's models.

    Args:
        engine: Started.
        max_sessions: Robots at once.
        idle_timeout_s: A session without a stream or a question for this long is closed.
        max_requests_hz: Requests a second that are read of one stream; more wait.
        traces: Where requests are traced to, if anywhere.
    """

    def __init__(
        self,
        engine: EnginePort,
        *,
        max_sessions: int = 64,
        idle_timeout_s: float = 4.0,
        max_requests_hz: float = MAX_REQUESTS_HZ,
        traces: Traces | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self.sessions = Sessions(max_sessions=max_sessions, idle_timeout_s=idle_timeout_s)
        self.max_requests_hz = max_requests_hz
        self.stats = ServiceStats()
        self.notes = OperatorNotes(self.stats, traces)
        self.decoders = ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 1), thread_name_prefix="decode")
        self._clock = clock
        self._started_s = clock()
        self._streams: set[RobotStream] = set()
        self._no_stream = asyncio.Event()
        self._no_stream.set()
        self._questions = text.Questions()
        self._text_shares: dict[str, float] = {}  # By model, at most EXPIRY_PERIOD_S old.
        self._draining = False
        self._expiry: asyncio.Task[None] | None = None

    @property
    def models(self) -> Mapping[str, Model]:
        return self.engine.models

    @property
    def num_in_flight(self) -> int:
        """Requests for chunks that wait for their answer."""
        return sum(stream.num_in_flight for stream in self._streams)

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    def start(self) -> None:
        """On the server's loop."""
        operator_metrics.show((model.name, model.has_text_head) for model in self.models.values())
        self._show()
        self._expiry = asyncio.get_running_loop().create_task(self._expire())

    async def drain(self) -> None:
        """Tells every robot to leave, answers what was asked, ends the streams; new sessions are refused meanwhile."""
        self._draining = True
        self.engine.end_swaps()
        for stream in self._streams:
            stream.drain(RECONNECT_AFTER_S, "the server goes away")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                await self._no_stream.wait()
                await self._questions.all_answered()
        self._questions.end_all(_goes_away())
        await asyncio.gather(*(stream.finish(DRAIN_S) for stream in tuple(self._streams)))
        if self._expiry is not None:
            self._expiry.cancel()

    def close(self) -> None:
        """After the server stopped: ends the worker threads."""
        self.decoders.shutdown(wait=False, cancel_futures=True)

    async def OpenSession(  # noqa: N802
        self, request: inference_pb2.OpenSessionRequest, context: Any
    ) -> inference_pb2.OpenSessionResponse:
        if self._draining:
            raise _goes_away()
        served = self._served(request.model)
        robot_spec = Spec.from_proto(request.spec)
        horizon = served.horizon
        if not 0 <= request.replan_interval_steps <= horizon:
            raise InvalidInput(
                f"is {request.replan_interval_steps}; it must be 0 (the server's choice) to {horizon}, the chunk's horizon",
                field="replan_interval_steps",
            )
        robot_fit = fit(robot_spec, served.used_spec, masks_cameras=served.masks_missing_cameras)
        asked_steps = request.replan_interval_steps or max(1, horizon // 2)
        self._check_capacity(request, robot_spec.control_rate_hz, horizon)
        session, older = self.sessions.open(
            robot_id=request.robot_id,
            client_id=request.client_id,
            model=served.name,
            robot_fit=robot_fit,
            asked_interval_steps=asked_steps,
            control_rate_hz=robot_spec.control_rate_hz,
            now_s=self._clock(),
        )
        if older is not None:
            self._end(older, "the same client opened a new session")
        if request.wants_shared_memory and is_same_machine(context.peer()):
            used = sum(other.pictures.num_bytes for other in self.sessions if other.pictures is not None)
            session.pictures = SharedPictures.of(robot_fit.required, MAX_BYTES_IN_ALL - used)
        how = ", pictures may lie in shared memory" if session.pictures is not None else ""
        logger.info("session %s: %s on %s%s", session.shown_id, session.robot_id, served.name, how)
        return inference_pb2.OpenSessionResponse(
            session_id=session.session_id,
            model_spec=served.spec.to_proto(),
            version=served.version,
            adaptations=[
                inference_pb2.Adaptation(feature=item.feature, kind=_KINDS[item.kind], detail=item.detail)
                for item in robot_fit.adaptations
            ],
            chunk_horizon=horizon,
            has_text_head=served.has_text_head,
            replan_interval_steps=self.replan_interval_steps(session),
            idle_timeout=stamps.to_duration(self.sessions.idle_timeout_s),
            max_request_bytes=self.max_request_bytes(session),
            required_observations=[feature.name for feature in robot_fit.required],
            shared_memory=session.pictures.told() if session.pictures is not None else None,
        )

    async def Act(  # noqa: N802
        self, request_iterator: AsyncIterator[inference_pb2.ActRequest], context: Any
    ) -> AsyncIterator[inference_pb2.ActResponse]:
        metadata = dict(context.invocation_metadata() or ())
        session_id, said = (str(metadata.get(key, "")) for key in (SESSION_KEY, NUMBER_KEY))
        number = int(said) if said.isdecimal() and len(said) <= MAX_NUMBER_DIGITS else 0
        stream = RobotStream(self, session_id, self._clock, number=number)
        self._streams.add(stream)
        self._no_stream.clear()
        if self._draining:
            stream.drain(RECONNECT_AFTER_S, "the server goes away")
        responses = stream.responses(request_iterator)
        try:
            async for response in responses:
                yield response
        finally:
            self._streams.discard(stream)
            if not self._streams:
                self._no_stream.set()
            await responses.aclose()  # type: ignore[attr-defined]

    async def Generate(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        if self._draining:
            raise _goes_away()
        session = self.sessions.get(request.session_id)
        self.sessions.touch(session, self._clock())
        with self._attended(session):
            if request.ByteSize() > self.max_request_bytes(session):
                raise InvalidInput(
                    f"has {request.ByteSize()} bytes, this session's limit is {self.max_request_bytes(session)}",
                    field="observation",
                )
            with watching_text(request, session, self.notes.traces) as watch:
                model = self._served(session.model)
                answers = text.generate(
                    request, model, session, self.engine, self._questions, self.decoders, self._clock
                )  # fmt: skip
                async for response in answers:
                    if response.finished:
                        watch.whole()
                    else:
                        watch.token()
                    yield response

    @contextlib.contextmanager
    def _attended(self, session: Session) -> Iterator[None]:
        """A question keeps its session alive; where it is refused, the session's log says why."""
        session.num_questions += 1
        try:
            yield
        except ManyhandsError as error:
            self.notes.question_refused(session, error, self._clock())
            raise
        finally:
            session.num_questions -= 1
            self.sessions.touch(session, self._clock())

    async def CloseSession(  # noqa: N802
        self, request: inference_pb2.CloseSessionRequest, context: Any
    ) -> inference_pb2.CloseSessionResponse:
        session = self.sessions.close(request.session_id)
        if session is not None:
            self._end(session, "the session was closed")
        return inference_pb2.CloseSessionResponse()

    async def ListModels(  # noqa: N802
        self, request: inference_pb2.ListModelsRequest, context: Any
    ) -> inference_pb2.ListModelsResponse:
        return inference_pb2.ListModelsResponse(models=self._models())

    async def SwapWeights(  # noqa: N802
        self, request: inference_pb2.SwapWeightsRequest, context: Any
    ) -> inference_pb2.SwapWeightsResponse:
        self._served(request.model)
        if self._draining:
            raise Unreachable("the server goes away; nothing was changed", retry_after_s=RECONNECT_AFTER_S)
        result = await asyncio.wrap_future(self.engine.swap(request.model, request.number))
        return inference_pb2.SwapWeightsResponse(
            previous=result.previous, current=result.current, pause=stamps.to_duration(result.pause_s)
        )

    async def GetStatus(  # noqa: N802
        self, request: inference_pb2.GetStatusRequest, context: Any
    ) -> inference_pb2.GetStatusResponse:
        return status(
            sessions=tuple(self.sessions),
            stats=self.stats,
            engine=self.engine,
            uses=self._uses(),
            models=self._models(),
            now_s=self._clock(),
            started_s=self._started_s,
        )

    def max_request_bytes(self, session: Session) -> int:
        """What the session's own observation and prefix can need: pictures uncompressed."""
        served = self.models[session.model]
        values = 0
        for feature in session.fit.required:
            size = 1 if feature.kind is FeatureKind.IMAGE else 8
            for extent in feature.shape:
                size *= extent
            values += size
        prefix = 4 * served.horizon * served.model_action_size
        tasks = 2 * 4 * MAX_TASK_CHARACTERS  # What is acted on, and what a subtask is asked for.
        return values + prefix + tasks + MESSAGE_OVERHEAD_BYTES

    def replan_interval_steps(self, session: Session) -> int:
        """What the session asked for, longer while the device cannot keep up with everybody."""
        device = self.engine.capacity(session.model)
        share = min(capacity.MAX_TEXT_SHARE, sum(self._text_shares.values()))
        demands = self._demands(self.sessions, session.model, device)
        factor = capacity.stretch(demands, device.chunks_per_s if device else None, share)
        return capacity.interval_steps(self._demand(session), factor)

    def _demand(self, session: Session, cost: float = 1.0) -> capacity.Demand:
        return capacity.Demand(
            rate_hz=session.control_rate_hz,
            interval_steps=session.asked_interval_steps,
            horizon=self.models[session.model].horizon,
            delay_steps=session.delay_steps,
            cost=cost,
        )

    def _demands(
        self, sessions: Iterable[Session], model: str, meant: capacity.DeviceCapacity | None
    ) -> list[capacity.Demand]:
        """In chunks of that model, whose capacity is meant; sessions of one whose capacity is not known do not count."""
        costs = {model: 1.0}
        for name in self.models.keys() - {model}:
            theirs = self.engine.capacity(name)
            if meant is not None and theirs is not None:
                costs[name] = meant.chunks_per_s / theirs.chunks_per_s
        return [self._demand(session, costs[session.model]) for session in sessions if session.model in costs]

    def _check_capacity(self, request: inference_pb2.OpenSessionRequest, rate_hz: float, horizon: int) -> None:
        others = [session for session in self.sessions if session.robot_id != request.robot_id]
        device = self.engine.capacity(request.model)
        shares = (
            self._text_share([session for session in others if session.model == name], self.engine.capacity(name))
            for name in self.models
        )
        try:
            capacity.admit(
                self._demands(others, request.model, device),
                capacity.Demand(rate_hz=rate_hz, interval_steps=horizon, horizon=horizon),
                chunks_per_s=device.chunks_per_s if device else None,
                text_share=min(capacity.MAX_TEXT_SHARE, sum(shares)),
            )
        except capacity.DeviceFull as full:
            raise Overloaded(str(full), field="model", retry_after_s=self.sessions.idle_timeout_s) from None

    def _text_share(self, sessions: Sequence[Session], device: capacity.DeviceCapacity | None) -> float:
        """Of the device, for the questions of sessions as they came lately; 0 where it is not known."""
        if device is None:
            return 0.0
        now_s = self._clock()
        demands = [demand for session in sessions if (demand := session.question_rate.demand(now_s)) is not None]
        return capacity.text_share(demands, device)

    def _uses(self) -> list[ModelUse]:
        uses = []
        for name in self.models:
            sessions = [session for session in self.sessions if session.model == name]
            device = self.engine.capacity(name)
            uses.append(
                ModelUse(
                    model=name,
                    possible_per_s=device.chunks_per_s if device else None,
                    text_share=self._text_share(sessions, device),
                    asked_per_s=capacity.asked_per_s([self._demand(session) for session in sessions]),
                    session_count=len(sessions),
                )
            )
        return uses

    def _served(self, name: str) -> Model:
        if name not in self.models:
            raise NotFound(f"{name!r} is not served; there are {', '.join(self.models)}", field="model")
        return self.models[name]

    def _models(self) -> list[inference_pb2.Model]:
        return [
            inference_pb2.Model(
                name=served.name,
                policy_type=served.type_name,
                version=served.version,
                spec=served.spec.to_proto(),
                chunk_horizon=served.horizon,
                has_text_head=served.has_text_head,
                parameter_count=served.parameter_count,
            )
            for served in self.models.values()
        ]

    def _end(self, session: Session, reason: str) -> None:
        """Of a session that is closed: its chunks, its questions and its stream."""
        error = NotFound(f"{reason}; open a new one", field="session_id")
        self.engine.withdraw(session.session_id)
        self._questions.end_of(session.session_id, error)
        if isinstance(session.stream, RobotStream):
            session.stream.end(error)

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(EXPIRY_PERIOD_S)
            for session in self.sessions.expire(self._clock()):
                logger.info("session %s of %s expired", session.shown_id, session.robot_id)
                self.engine.withdraw(session.session_id)
            self._show()

    def _show(self) -> None:
        """What is so now, for whoever scrapes, and for intervals: a chunk's answer need not count everybody's questions."""
        for use in self._uses():
            self._text_shares[use.model] = use.text_share
            operator_metrics.of_model(use.model).now(
                sessions=use.session_count,
                version=self.models[use.model].version.number,
                possible_per_s=use.possible_per_s,
                text_share=use.text_share,
                asked_per_s=use.asked_per_s,
            )
        operator_metrics.now(in_flight=self.num_in_flight, load=self.engine.load())


def _goes_away() -> Unreachable:
    return Unreachable("the server goes away; open a session again and ask there", retry_after_s=RECONNECT_AFTER_S)
