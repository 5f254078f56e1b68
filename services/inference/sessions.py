"""Who is served: the handshake of a robot's spec with a model's, and the sessions that are alive. No grpc, no torch.

The clock is an argument everywhere, in seconds.
"""

from __future__ import annotations

import enum
import math
import secrets
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from manyhands.errors import AlreadyExists, InvalidInput, NotFound, Overloaded
from manyhands.spec import Feature, FeatureKind, Spec

from .question_rate import QuestionRate
from .refusals import RefusalLog
from .shared_pictures import SharedPictures

MAX_NAME_CHARACTERS = 128
LATENCIES_KEPT = 512
SHOWN_CHARACTERS = 8


class AdaptationKind(enum.Enum):
    IGNORED = "ignored"
    RESIZED = "resized"
    PADDED = "padded"
    MASKED = "masked"


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    feature: str
    kind: AdaptationKind
    detail: str


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a robot's values become the model's.

    Attributes:
        required: The robot's features that it has to send, in order.
        action_size: R, leading actions of a model's row that are the robot's.
    """

    required: tuple[Feature, ...]
    adaptations: tuple[Adaptation, ...]
    action_size: int


def fit(robot: Spec, model: Spec, *, masks_cameras: bool) -> Fit:
    """Checks that robot can be driven by model, and says what has to be adapted.

    Args:
        masks_cameras: The model was trained to do without some of its cameras.

    Raises:
        InvalidInput: Names the first feature that does not fit, both values and the remedy.
    """
    if not math.isclose(robot.control_rate_hz, model.control_rate_hz, rel_tol=1e-6):
        raise InvalidInput(
            f"is {robot.control_rate_hz} on the robot, the model was trained at {model.control_rate_hz}; run the robot at "
            "the model's rate or serve a model of the robot's",
            field="spec.control_rate_hz",
        )
    adaptations: list[Adaptation] = []
    required: list[Feature] = []
    own = {feature.name: feature for feature in robot.observation}
    for wanted in model.observation:
        sent = own.get(wanted.name)
        if sent is None:
            if wanted.kind is FeatureKind.IMAGE and masks_cameras:
                adaptations.append(
                    Adaptation(feature=wanted.name, kind=AdaptationKind.MASKED, detail="the robot lacks this camera")
                )
                continue
            have = ", ".join(own) or "nothing"
            raise InvalidInput(f"the model needs it, the robot observes {have}", field=wanted.name)
        required.append(sent)
        adaptations.extend(_fit_feature(sent, wanted))
    _check_order(robot, [feature.name for feature in required])
    if any(f.kind is FeatureKind.IMAGE for f in model.observation) and not any(
        f.kind is FeatureKind.IMAGE for f in required
    ):
        raise InvalidInput("the robot has none of the model's cameras", field=model.images[0].name)
    wanted_names = {feature.name for feature in model.observation}
    adaptations.extend(
        Adaptation(feature=name, kind=AdaptationKind.IGNORED, detail="the model does not use it; it need not be sent")
        for name in own
        if name not in wanted_names
    )
    action_adaptations = _fit_actions(robot, model)
    return Fit(
        required=tuple(required),
        adaptations=(*adaptations, *action_adaptations),
        action_size=sum(feature.shape[0] for feature in robot.action),
    )


def _fit_feature(sent: Feature, wanted: Feature) -> list[Adaptation]:
    if sent.kind is not wanted.kind:
        raise InvalidInput(f"is {sent.kind.name} on the robot, {wanted.kind.name} in the model", field=wanted.name)
    if sent.dtype != wanted.dtype:
        raise InvalidInput(f"is {sent.dtype} on the robot, {wanted.dtype} in the model", field=wanted.name)
    if wanted.kind is not FeatureKind.IMAGE:
        return _fit_vector(sent, wanted)
    if sent.shape == wanted.shape:
        return []
    sizes = f"{sent.shape[0]}x{sent.shape[1]} to {wanted.shape[0]}x{wanted.shape[1]} pixels, ratio kept, padded with black"
    return [Adaptation(feature=wanted.name, kind=AdaptationKind.RESIZED, detail=sizes)]


def _fit_vector(sent: Feature, wanted: Feature) -> list[Adaptation]:
    """Same elements in the same order with the same units; only a model that names no elements takes a shorter vector."""
    for label, robots, models in (
        ("element", sent.element_names, wanted.element_names),
        ("unit", sent.element_units, wanted.element_units),
    ):
        if models and robots != models:
            for index in range(max(len(robots), len(models))):
                robot_has = repr(robots[index]) if index < len(robots) else "nothing"
                model_has = repr(models[index]) if index < len(models) else "nothing"
                if robot_has != model_has:
                    raise InvalidInput(
                        f"{label} {index} is {robot_has} on the robot, {model_has} in the model; names, order and units of "
                        "all elements must be those the model was trained with",
                        field=wanted.name,
                    )
    if sent.shape == wanted.shape:
        return []
    if wanted.element_names or sent.shape[0] > wanted.shape[0]:
        raise InvalidInput(f"has {sent.shape[0]} elements on the robot, {wanted.shape[0]} in the model", field=wanted.name)
    detail = f"{sent.shape[0]} to {wanted.shape[0]} elements with zeros"
    return [Adaptation(feature=wanted.name, kind=AdaptationKind.PADDED, detail=detail)]


def _fit_actions(robot: Spec, model: Spec) -> list[Adaptation]:
    robots, models = [f.name for f in robot.action], [f.name for f in model.action]
    if robots != models:
        wrong = next((name for name in robots if name not in models), None) or next(
            (name for name in models if name not in robots), robots[0]
        )
        raise InvalidInput(
            f"the robot is commanded with {', '.join(robots)}, the model answers {', '.join(models)}, in this order",
            field=wrong,
        )
    adaptations: list[Adaptation] = []
    for index, (sent, wanted) in enumerate(zip(robot.action, model.action, strict=True)):
        if sent.dtype != wanted.dtype:
            raise InvalidInput(f"is {sent.dtype} on the robot, {wanted.dtype} in the model", field=wanted.name)
        feature_adaptations = _fit_vector(sent, wanted)
        if feature_adaptations and index < len(models) - 1:
            raise InvalidInput("only the last action feature can be shorter than the model's", field=wanted.name)
        adaptations.extend(feature_adaptations)
    return adaptations


def _check_order(robot: Spec, required: list[str]) -> None:
    """Cameras are told apart by place in some models: the robot's order must be the model's, not merely its set."""
    listed = [feature.name for feature in robot.observation if feature.name in required]
    for sent, wanted in zip(listed, required, strict=True):
        if sent != wanted:
            raise InvalidInput(
                f"is out of order: the robot lists {', '.join(listed)}, the model was trained on {', '.join(required)}",
                field=sent,
            )


def shown(session_id: str) -> str:
    """What logs, traces and status have of it: whoever has all of it can speak for the session."""
    return session_id[:SHOWN_CHARACTERS]


@dataclass(kw_only=True)
class Session:
    """One robot that is served. Counters are for people; nothing a chunk depends on is in here (rule 4).

    Attributes:
        delay_steps: Actions that it executes while it waits for a chunk, as it said with the last it sent a prefix for; 0
            until then.
        num_questions: By Generate, that are being answered; they keep the session alive as a stream does.
        pictures: Where it may leave them; None where they come in requests.
    """

    session_id: str
    robot_id: str
    client_id: str
    model: str
    fit: Fit
    asked_interval_steps: int
    control_rate_hz: float
    delay_steps: int = 0
    last_request_id: int = 0
    num_questions: int = 0
    stream: object | None = None
    idle_since_s: float = 0.0
    chunk_count: int = 0
    refused_count: int = 0
    missed_deadline_count: int = 0
    subtask_count: int = 0
    refused_subtask_count: int = 0
    last_subtask: str = ""
    refusals: RefusalLog = field(default_factory=RefusalLog)
    question_rate: QuestionRate = field(default_factory=QuestionRate)
    pictures: SharedPictures | None = None
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCIES_KEPT))

    @property
    def shown_id(self) -> str:
        """For people."""
        return shown(self.session_id)


class Sessions:
    """Live sessions by id and robot.

    Args:
        max_sessions: Admission limit.
        idle_timeout_s: A session without a stream or a question for this long is gone. Short: an actor that was killed comes
            back under a new client_id and waits for it, while its robot holds.
    """

    def __init__(self, *, max_sessions: int, idle_timeout_s: float) -> None:
        self._max_sessions = max_sessions
        self.idle_timeout_s = idle_timeout_s
        self._by_id: dict[str, Session] = {}
        self._by_robot: dict[str, Session] = {}

    def __iter__(self) -> Iterator[Session]:
        return iter(tuple(self._by_id.values()))

    def __len__(self) -> int:
        return len(self._by_id)

    def open(
        self,
        *,
        robot_id: str,
        client_id: str,
        model: str,
        robot_fit: Fit,
        asked_interval_steps: int,
        control_rate_hz: float,
        now_s: float,
    ) -> tuple[Session, Session | None]:
        """A new session, and the client's own older one that it replaces.

        Raises:
            AlreadyExists: Another client has a live session for this robot; says when it may end.
            Overloaded: max_sessions are alive.
        """
        for label, value in (("robot_id", robot_id), ("client_id", client_id)):
            if not value or len(value) > MAX_NAME_CHARACTERS or not value.isprintable():
                raise InvalidInput(f"must be 1 to {MAX_NAME_CHARACTERS} printable characters", field=label)
        older = self._by_robot.get(robot_id)
        if older is not None and older.client_id != client_id:
            if older.stream is not None or older.num_questions:
                what = "stream is open" if older.stream is not None else "question is being answered"
                raise AlreadyExists(
                    f"{robot_id!r} is served to another client, whose {what}; stop that one (its session ends "
                    f"{self.idle_timeout_s:g} s after it) or use another robot_id",
                    field="robot_id",
                    retry_after_s=self.idle_timeout_s,
                )
            left_s = max(0.0, older.idle_since_s + self.idle_timeout_s - now_s)
            raise AlreadyExists(
                f"{robot_id!r} has a session of another client, without a stream; it expires in {left_s:.1f} s",
                field="robot_id",
                retry_after_s=left_s + 0.05,
            )
        if older is None and len(self._by_id) >= self._max_sessions:
            raise Overloaded(
                f"{len(self._by_id)} sessions are open, the limit is {self._max_sessions}; close one, or raise max_sessions",
                field="robot_id",
                retry_after_s=self.idle_timeout_s,
            )
        if older is not None:
            self.close(older.session_id)
        session = Session(
            session_id=secrets.token_hex(16),
            robot_id=robot_id,
            client_id=client_id,
            model=model,
            fit=robot_fit,
            asked_interval_steps=asked_interval_steps,
            control_rate_hz=control_rate_hz,
            idle_since_s=now_s,
        )
        self._by_id[session.session_id] = session
        self._by_robot[robot_id] = session
        return session, older

    def get(self, session_id: str) -> Session:
        """Raises NotFound for one that ended or was never there."""
        session = self._by_id.get(session_id)
        if session is None:
            raise NotFound("the session has ended or is from before a restart; open a new one", field="session_id")
        return session

    def attach(self, session: Session, stream: object) -> object | None:
        """Binds a stream, which keeps the session alive; answers the one it takes over from."""
        older, session.stream = session.stream, stream
        return older if older is not stream else None

    def detach(self, session: Session, stream: object, now_s: float) -> None:
        if session.stream is stream:
            session.stream = None
            session.idle_since_s = now_s

    def touch(self, session: Session, now_s: float) -> None:
        """A call outside the stream shows that the client lives."""
        session.idle_since_s = now_s

    def close(self, session_id: str) -> Session | None:
        session = self._by_id.pop(session_id, None)
        if session is not None and self._by_robot.get(session.robot_id) is session:
            del self._by_robot[session.robot_id]
        if session is not None and session.pictures is not None:
            session.pictures.close()
        return session

    def expire(self, now_s: float) -> list[Session]:
        """Closes and answers the sessions that had no stream and no question for idle_timeout_s."""
        ended = [
            s for s in self if s.stream is None and not s.num_questions and now_s - s.idle_since_s >= self.idle_timeout_s
        ]
        for session in ended:
            self.close(session.session_id)
        return ended
