"""What an actor says to the inference service: a session, its stream (act_stream.py), text, and status.

Needs numpy and grpc only. Everything blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from .. import channel, codec, errors, stamps
from ..common.v1 import common_pb2
from ..inference.v1 import inference_pb2, inference_pb2_grpc
from ..security import SecuritySettings, is_loopback
from ..shared_memory import SharedMemory
from ..spec import Spec
from .act_stream import ActStream, Arrays, Reply, short_name

CALL_TIMEOUT_S = 5.0
SWAP_TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """What the service does to fit a feature to the model; kind is "ignored", "resized", "padded" or "masked"."""

    feature: str
    kind: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Session:
    """What OpenSession answered.

    Attributes:
        required_observations: Names to send with every request, in this order.
        replan_interval_steps: Actions to execute of each chunk, as the server asks; longer than asked for when it is busy.
        idle_timeout_s: The session ends when it had no stream and no question for this long.
    """

    session_id: str
    robot_id: str
    model_spec: Spec
    version: common_pb2.PolicyVersion
    adaptations: tuple[Adaptation, ...]
    chunk_horizon: int
    has_text_head: bool
    replan_interval_steps: int
    idle_timeout_s: float
    max_request_bytes: int
    required_observations: tuple[str, ...]


@dataclass(frozen=True)
class _Counters:
    """Of one session: they go on over its streams, and over no clock that somebody may set back."""

    streams: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    requests: Iterator[int] = field(default_factory=lambda: itertools.count(1))


class InferenceClient(channel.Client):
    """Calls of one inference service.

    Args:
        address: "host:port".
        security_settings: Certificates and token; None on loopback.
    """

    SERVER = "inference service"

    def __init__(self, address: str, *, security_settings: SecuritySettings | None = None) -> None:
        super().__init__(address, security_settings=security_settings)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._counters: dict[str, _Counters] = {}
        self._may_share = is_loopback(address)
        # By robot, its session and that one's memory: sessions come and go while robots act.
        self._shared: dict[str, tuple[str, SharedMemory]] = {}

    def open_session(
        self,
        *,
        robot_id: str,
        client_id: str,
        model: str,
        spec: Spec,
        replan_interval_steps: int,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Session:
        """The handshake, before any motion. client_id: random, one per actor process. Idempotent for the same two ids.

        Raises:
            InvalidInput: Names the feature of spec that does not fit the model.
            AlreadyExists: A live session has this robot_id; retry_after_s says when it may be gone.
            NotFound: Lists the models that are served.
            Overloaded: With retry_after_s.
            Unreachable: No server there (also while it drains).
        """
        request = inference_pb2.OpenSessionRequest(
            robot_id=robot_id,
            client_id=client_id,
            model=model,
            spec=spec.to_proto(),
            replan_interval_steps=replan_interval_steps,
            wants_shared_memory=self._may_share,
        )
        with channel.translated_errors():
            answer = self._stub.OpenSession(request, timeout=timeout_s)
        self._counters[answer.session_id] = _Counters()
        self._shared.pop(robot_id, None)
        memory = SharedMemory.find(answer.shared_memory) if answer.HasField("shared_memory") else None
        if memory is not None:
            self._shared[robot_id] = answer.session_id, memory
        return Session(
            session_id=answer.session_id,
            robot_id=robot_id,
            model_spec=Spec.from_proto(answer.model_spec),
            version=answer.version,
            adaptations=tuple(
                Adaptation(
                    feature=item.feature, kind=short_name(inference_pb2.AdaptationKind, item.kind), detail=item.detail
                )
                for item in answer.adaptations
            ),
            chunk_horizon=answer.chunk_horizon,
            has_text_head=answer.has_text_head,
            replan_interval_steps=answer.replan_interval_steps,
            idle_timeout_s=stamps.to_seconds(answer.idle_timeout),
            max_request_bytes=answer.max_request_bytes,
            required_observations=tuple(answer.required_observations),
        )

    def act_stream(
        self,
        session_id: str,
        *,
        on_reply: Callable[[Reply], None] | None = None,
        on_broken: Callable[[errors.ManyhandsError], None] | None = None,
    ) -> ActStream:
        """The session's stream; a second one takes over from the first. Request ids go on growing over streams."""
        counters = self._counters.setdefault(session_id, _Counters())
        memory = next((memory for session, memory in self._shared.values() if session == session_id), None)
        return ActStream(
            self._stub,
            session_id,
            counters.requests,
            number=next(counters.streams),
            on_reply=on_reply,
            on_broken=on_broken,
            shared_memory=memory,
        )

    def close_session(self, session_id: str, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Frees the robot_id. Closing twice is fine."""
        self._counters.pop(session_id, None)
        self._shared = {robot: shared for robot, shared in self._shared.items() if shared[0] != session_id}
        with channel.translated_errors():
            self._stub.CloseSession(inference_pb2.CloseSessionRequest(session_id=session_id), timeout=timeout_s)

    def generate(
        self,
        session_id: str,
        *,
        kind: inference_pb2.TextKind.ValueType,
        observation: Arrays,
        task: str,
        user_text: str = "",
        previous_text: str = "",
        max_new_tokens: int = 0,
        temperature: float = 0.0,
        top_p: float = 0.0,
        deadline_s: float = 10.0,
        request_id: str = "",
    ) -> Iterator[inference_pb2.GenerateResponse]:
        """Text, a message per token; the last one is finished and has full_text.

        Raises:
            Refused: The model has no text head.
            NotFound: The session is unknown.
            TooLate: The deadline passed.
        """
        request = inference_pb2.GenerateRequest(
            session_id=session_id,
            request_id=request_id,
            kind=kind,
            observation=common_pb2.Observation(values=codec.encode_values(observation)),
            task=task,
            user_text=user_text,
            previous_text=previous_text,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            deadline=stamps.to_duration(deadline_s),
        )
        with channel.translated_errors():
            yield from self._stub.Generate(request, timeout=deadline_s + 1.0)

    def list_models(self, *, timeout_s: float = CALL_TIMEOUT_S) -> tuple[inference_pb2.Model, ...]:
        with channel.translated_errors():
            return tuple(self._stub.ListModels(inference_pb2.ListModelsRequest(), timeout=timeout_s).models)

    def swap_weights(
        self, model: str, number: int = 0, *, timeout_s: float = SWAP_TIMEOUT_S
    ) -> inference_pb2.SwapWeightsResponse:
        """Swaps to a version of the weights service, 0 being the newest. Idempotent.

        Raises:
            Refused: The version does not fit or failed its canary, or the server follows no weights service.
            NotFound: No such model or version.
        """
        request = inference_pb2.SwapWeightsRequest(model=model, number=number)
        with channel.translated_errors():
            return self._stub.SwapWeights(request, timeout=timeout_s)

    def status(self, *, timeout_s: float = CALL_TIMEOUT_S) -> inference_pb2.GetStatusResponse:
        with channel.translated_errors():
            return self._stub.GetStatus(inference_pb2.GetStatusRequest(), timeout=timeout_s)
