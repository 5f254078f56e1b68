"""What the front end knows of an engine: rows in, chunks out, text, versions. No torch, no grpc.

LocalEngine is one in this process, EngineSupervisor one in a process of its own; the service does not know which it has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from manyhands.common.v1 import common_pb2
from manyhands.errors import ManyhandsError
from manyhands.inference.v1 import inference_pb2
from manyhands.spec import Spec

from .capacity import DeviceCapacity
from .device_use import DeviceTime


class Model(Protocol):
    """A model that is served, described. What it says stays as it is for the life of the server, but for the version."""

    @property
    def name(self) -> str: ...
    @property
    def type_name(self) -> str: ...
    @property
    def spec(self) -> Spec: ...
    @property
    def used_spec(self) -> Spec:
        """spec with only the observation features that the policy reads: the rest need not be sent."""
        ...

    @property
    def horizon(self) -> int: ...
    @property
    def model_action_size(self) -> int: ...
    @property
    def has_text_head(self) -> bool: ...
    @property
    def masks_missing_cameras(self) -> bool: ...
    @property
    def parameter_count(self) -> int: ...
    @property
    def version(self) -> common_pb2.PolicyVersion: ...


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """A Model whose policy is in another process."""

    name: str
    type_name: str
    spec: Spec
    used_spec: Spec
    horizon: int
    model_action_size: int
    has_text_head: bool
    masks_missing_cameras: bool
    parameter_count: int
    version: common_pb2.PolicyVersion


@dataclass(frozen=True, kw_only=True)
class Observed:
    """One observation as the model's spec has it, and the instruction.

    Attributes:
        observation: Arrays by feature name; cameras the robot lacks are absent.
    """

    observation: Mapping[str, npt.NDArray[np.generic]]
    task: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One robot's inputs.

    Attributes:
        prefix: (steps, A) float32, model space, steps in 1..H; None without a previous chunk.
        seed: All randomness of the chunk.
    """

    sample: Observed
    prefix: npt.NDArray[np.float32] | None
    delay_steps: int
    execution_horizon: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A row's chunk.

    Attributes:
        actions: (H, R) float32, the robot's units, R of the model's spec.
        model_actions: (H, A) float32, model space.
    """

    actions: npt.NDArray[np.float32]
    model_actions: npt.NDArray[np.float32]
    version: common_pb2.PolicyVersion
    queue_s: float
    prefix_s: float
    sample_s: float
    postprocess_s: float
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class Superseded:
    """A newer observation of the same robot took the place."""


Outcome = Answer | Superseded | ManyhandsError


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """Goes an answer's way shortly before it and reaches nobody: what it passes through is then awake and in the caches.

    Attributes:
        answer: Of the same shape, its numbers mean nothing.
    """

    answer: Answer


@dataclass(frozen=True, kw_only=True)
class Job:
    """A row, its model, and who hears of the outcome (called once, on any thread, must not block).

    Attributes:
        rehearse: Called likewise, perhaps, shortly before done.
        gate: What expect() answered for the row.
    """

    model: str
    row: Row
    done: Callable[[Outcome], None]
    rehearse: Callable[[Rehearsal], None] | None = None
    gate: int = 0


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a model's text head is asked.

    Attributes:
        owner: As of chunks: pictures that the owner's last chunks were made from need not be seen again. "": nobody's.
        kind: One of those that the contract names.
        until_s: When the text must be finished, on the monotonic clock.
        allowed_s: What the client gave, for people.
    """

    model: str
    owner: str
    sample: Observed
    kind: inference_pb2.TextKind.ValueType
    user_text: str
    previous_text: str
    max_new_tokens: int
    temperature: float
    top_p: float
    until_s: float
    allowed_s: float


@dataclass(frozen=True, kw_only=True)
class TextEnd:
    """The last thing that is heard of a question: who answered, or why the text is not whole."""

    version: common_pb2.PolicyVersion | None = None
    error: ManyhandsError | None = None


@dataclass(frozen=True, kw_only=True)
class Swap:
    """What became of a version; at_s on the monotonic clock."""

    version: common_pb2.PolicyVersion
    accepted: bool
    reason: str
    pause_s: float
    at_s: float


@dataclass(frozen=True, kw_only=True)
class SwapResult:
    previous: common_pb2.PolicyVersion
    current: common_pb2.PolicyVersion
    pause_s: float


@dataclass(frozen=True, kw_only=True)
class EngineLoad:
    """How full an engine is.

    Attributes:
        waiting_count: Rows in line.
        device: torch's name.
        memory_used_bytes: Of the device, by all its processes.
        memory_total_bytes: 0 where the device has no memory of its own.
        device_time: Of units, since the engine began.
    """

    waiting_count: int
    device: str
    memory_used_bytes: int = 0
    memory_total_bytes: int = 0
    device_time: DeviceTime = field(default_factory=DeviceTime)


class EnginePort(Protocol):
    """An engine, here or elsewhere. Nothing here blocks."""

    @property
    def models(self) -> Mapping[str, Model]:
        """By name; versions are those that serve now."""
        ...

    def submit(self, *, owner: str, request_id: int, arrived_s: float, deadline_s: float, job: Job) -> None:
        """Puts a row in line. Its outcome, and that of the owner's row it replaces, goes to job.done."""

    def expect(self, model: str, row: Row, *, with_gate: bool) -> int:
        """Tells of a row that is about to be submitted, without its pictures, which are still being decoded.

        The engine may prepare what it can; the row may never come. Where it has the device wait for the pictures
        (picture_gate.py) it answers a gate, for Job.gate, or for give_up() if the row does not come; else 0.

        Args:
            with_gate: All of the model's pictures are likely to be there in a moment.
        """
        ...

    def give_up(self, gate: int) -> None:
        """The row of this gate does not come. Nothing happens for 0, and for a gate that is open."""

    def rehearse(self, model: str, row: Row) -> None:
        """Goes the way of a row that is likely to come in a moment, as far as its first unit; nothing comes of it."""

    def withdraw(self, owner: str) -> None:
        """Forgets an owner: chunks that it waits for are dropped, and nobody need be told. Its questions go on."""

    def capacity(self, model: str) -> DeviceCapacity | None:
        """As units were measured, or passes of the last seconds showed it; None when none ran."""

    def load(self) -> EngineLoad | None:
        """As it was a moment ago; None while the engine is away."""
        ...

    def is_pinned(self, model: str) -> bool:
        """Whether an operator went back to the version that serves: newer ones do not replace it."""
        ...

    @property
    def restart_count(self) -> int:
        """Engine processes that took the place of one that ended."""
        ...

    def ask(self, question: Question, heard: Callable[[str | TextEnd], None]) -> Callable[[], None]:
        """Text from a model's language head: heard is called with pieces and at last a TextEnd, on any thread, and must not
        block. The callable that is answered stops it: nobody listens any more."""
        ...

    def swap(self, model: str, number: int) -> Future[SwapResult]:
        """Swaps to a version of the weights service, 0 being the newest.

        The future raises NotFound, Refused (also where there is no weights service), Unreachable or Cancelled.
        """
        ...

    def swaps(self) -> Sequence[Swap]:
        """What became of versions, newest last."""
        ...

    def end_swaps(self) -> None:
        """No version comes in from now on; a swap that runs ends with Cancelled and changes nothing."""
