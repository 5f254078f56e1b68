"""The small messages between a front end and its engine process: frames, and what they stand for in Python."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from manyhands import codec, errors, stamps
from manyhands.common.v1 import common_pb2
from manyhands.engine.v1 import engine_pb2
from manyhands.errors import InternalError, ManyhandsError
from manyhands.inference.v1 import inference_pb2
from manyhands.security import SecuritySettings
from manyhands.spec import Spec

from .capacity import DeviceCapacity
from .device_use import DeviceTime, UnitUse
from .engine_port import EngineLoad, Model, ModelDescription, Observed, Question, Swap, SwapResult, TextEnd
from .units import UnitKind

MessageT = TypeVar("MessageT", engine_pb2.ToEngine, engine_pb2.FromEngine)

_SECURITY_FILES = ("certificate", "key", "authority", "token_file")

FRAME_HEADER = struct.Struct("<I")
# A question with its pictures; everything else is far smaller.
MAX_FRAME_BYTES = codec.MAX_DECODED_BYTES


class BadFrame(InternalError):
    """The peer says what cannot be: it is broken."""


def frame(message: engine_pb2.ToEngine | engine_pb2.FromEngine) -> bytes:
    content = message.SerializeToString()
    return FRAME_HEADER.pack(len(content)) + content


def frame_length(header: bytes) -> int:
    """Bytes that follow the header; BadFrame for an absurd number."""
    length: int = FRAME_HEADER.unpack(header)[0]
    if length > MAX_FRAME_BYTES:
        raise BadFrame(f"a frame of {length} bytes cannot be, at most {MAX_FRAME_BYTES}")
    return length


def parse(kind: type[MessageT], content: bytes) -> MessageT:
    try:
        message = kind.FromString(content)
    except DecodeError as error:
        raise BadFrame(f"a frame is no {kind.DESCRIPTOR.name}: {error}") from None
    if message.WhichOneof("message") is None:
        raise BadFrame(f"a {kind.DESCRIPTOR.name} is empty")
    return message


def to_status_bytes(error: ManyhandsError | None) -> bytes:
    """Empty for None."""
    return b"" if error is None else errors.to_status(error).SerializeToString()


def from_status_bytes(content: bytes) -> ManyhandsError | None:
    if not content:
        return None
    try:
        return errors.from_status(status_pb2.Status.FromString(content))
    except (DecodeError, ValueError) as error:
        raise BadFrame(f"a status cannot be read: {error}") from None


def to_security(settings: SecuritySettings) -> engine_pb2.Security:
    """What it takes to call somebody."""
    files = {name: str(file) for name in _SECURITY_FILES if (file := getattr(settings, name)) is not None}
    return engine_pb2.Security(**files)


def from_security(message: engine_pb2.Security) -> SecuritySettings:
    files = {name: Path(file) for name in _SECURITY_FILES if (file := getattr(message, name))}
    return SecuritySettings(**files)


def describe(model: Model) -> engine_pb2.Model:
    return engine_pb2.Model(
        model=inference_pb2.Model(
            name=model.name,
            policy_type=model.type_name,
            version=model.version,
            spec=model.spec.to_proto(),
            chunk_horizon=model.horizon,
            has_text_head=model.has_text_head,
            parameter_count=model.parameter_count,
        ),
        used_observations=[feature.name for feature in model.used_spec.observation],
        model_action_size=model.model_action_size,
        masks_missing_cameras=model.masks_missing_cameras,
    )


def described(message: engine_pb2.Model) -> ModelDescription:
    """Raises InvalidInput for a spec that cannot be, BadFrame for sizes that cannot."""
    told = message.model
    spec = Spec.from_proto(told.spec)
    if told.chunk_horizon < 1 or message.model_action_size < 1 or not told.name:
        raise BadFrame(f"model {told.name!r} has horizon {told.chunk_horizon}, action size {message.model_action_size}")
    used = set(message.used_observations)
    return ModelDescription(
        name=told.name,
        type_name=told.policy_type,
        spec=spec,
        used_spec=Spec(
            observation=tuple(feature for feature in spec.observation if feature.name in used),
            action=spec.action,
            control_rate_hz=spec.control_rate_hz,
        ),
        horizon=told.chunk_horizon,
        model_action_size=message.model_action_size,
        has_text_head=told.has_text_head,
        masks_missing_cameras=message.masks_missing_cameras,
        parameter_count=told.parameter_count,
        version=told.version,
    )


def same_model(one: ModelDescription, other: ModelDescription) -> bool:
    """Whether sessions that were opened with the one fit the other: everything but the version."""
    return (
        (one.name, one.type_name, one.horizon, one.model_action_size, one.has_text_head)
        == (other.name, other.type_name, other.horizon, other.model_action_size, other.has_text_head)
        and one.masks_missing_cameras == other.masks_missing_cameras
        and one.spec.digest == other.spec.digest
        and one.used_spec.digest == other.used_spec.digest
    )


def to_ask(question_id: int, question: Question) -> engine_pb2.Ask:
    return engine_pb2.Ask(
        question_id=question_id,
        model=question.model,
        kind=question.kind,
        observation=[
            common_pb2.NamedValue(name=name, tensor=codec.encode_tensor(array))
            for name, array in question.sample.observation.items()
        ],
        task=question.sample.task,
        user_text=question.user_text,
        previous_text=question.previous_text,
        max_new_tokens=question.max_new_tokens,
        temperature=question.temperature,
        top_p=question.top_p,
        until_s=question.until_s,
        allowed_s=question.allowed_s,
        owner=question.owner,
    )


def from_ask(message: engine_pb2.Ask) -> Question:
    return Question(
        model=message.model,
        owner=message.owner,
        sample=Observed(observation=codec.decode_values(message.observation), task=message.task),
        kind=message.kind,
        user_text=message.user_text,
        previous_text=message.previous_text,
        max_new_tokens=message.max_new_tokens,
        temperature=message.temperature,
        top_p=message.top_p,
        until_s=message.until_s,
        allowed_s=message.allowed_s,
    )


def to_text_end(question_id: int, end: TextEnd) -> engine_pb2.TextEnd:
    return engine_pb2.TextEnd(question_id=question_id, version=end.version, status=to_status_bytes(end.error))


def from_text_end(message: engine_pb2.TextEnd) -> TextEnd:
    version = message.version if message.HasField("version") else None
    return TextEnd(version=version, error=from_status_bytes(message.status))


def to_swap_end(swap_id: int, result: SwapResult | ManyhandsError) -> engine_pb2.SwapEnd:
    if isinstance(result, ManyhandsError):
        return engine_pb2.SwapEnd(swap_id=swap_id, status=to_status_bytes(result))
    return engine_pb2.SwapEnd(
        swap_id=swap_id,
        previous=result.previous,
        current=result.current,
        pause=stamps.to_duration(result.pause_s),
    )


def from_swap_end(message: engine_pb2.SwapEnd) -> SwapResult | ManyhandsError:
    error = from_status_bytes(message.status)
    if error is not None:
        return error
    return SwapResult(previous=message.previous, current=message.current, pause_s=stamps.to_seconds(message.pause))


def to_swap_event(swap: Swap) -> engine_pb2.SwapEvent:
    return engine_pb2.SwapEvent(
        version=swap.version,
        accepted=swap.accepted,
        reason=swap.reason,
        pause=stamps.to_duration(swap.pause_s),
        at_s=swap.at_s,
    )


def from_swap_event(message: engine_pb2.SwapEvent) -> Swap:
    return Swap(
        version=message.version,
        accepted=message.accepted,
        reason=message.reason,
        pause_s=stamps.to_seconds(message.pause),
        at_s=message.at_s,
    )


def to_capacity(model: str, capacity: DeviceCapacity | None) -> engine_pb2.Capacity:
    if capacity is None:
        return engine_pb2.Capacity(model=model)
    return engine_pb2.Capacity(
        model=model,
        chunks_per_s=capacity.chunks_per_s,
        question_s=capacity.question_s,
        text_step_s=capacity.text_step_s,
        max_text_count=capacity.max_texts,
    )


def from_capacity(message: engine_pb2.Capacity) -> DeviceCapacity | None:
    """None where nothing ran. Raises BadFrame for durations that cannot be."""
    for field in ("chunks_per_s", "question_s", "text_step_s"):
        value = getattr(message, field)
        if not 0.0 <= value < math.inf:
            raise BadFrame(f"{field} of {message.model!r} is {value}; it must be finite and not negative")
    if not message.chunks_per_s:
        return None
    return DeviceCapacity(
        chunks_per_s=message.chunks_per_s,
        question_s=message.question_s,
        text_step_s=message.text_step_s,
        max_texts=max(1, message.max_text_count),
    )


def to_load(load: EngineLoad) -> engine_pb2.Load:
    return engine_pb2.Load(
        waiting_count=load.waiting_count,
        memory_used_bytes=load.memory_used_bytes,
        memory_total_bytes=load.memory_total_bytes,
        units=[
            engine_pb2.UnitUse(
                model=model,
                kind=kind.value,
                device_s=use.device_s,
                unit_count=use.num_units,
                row_count=use.num_rows,
            )
            for (model, kind), use in load.device_time.units.items()
        ],
        gap_s=load.device_time.gap_s,
    )


def from_load(message: engine_pb2.Load, device: str) -> EngineLoad:
    """Raises BadFrame for a use of the device that cannot be."""
    return EngineLoad(
        waiting_count=max(0, message.waiting_count),
        device=device,
        memory_used_bytes=max(0, message.memory_used_bytes),
        memory_total_bytes=max(0, message.memory_total_bytes),
        device_time=_device_time(message),
    )


def _device_time(message: engine_pb2.Load) -> DeviceTime:
    units = {}
    for use in message.units:
        try:
            kind = UnitKind(use.kind)
        except ValueError:
            raise BadFrame(f"{use.model!r} has units of a kind {use.kind!r}, which there is not") from None
        counts = (use.device_s, use.unit_count, use.row_count)
        if not all(0 <= count < math.inf for count in counts):
            raise BadFrame(f"{use.kind} units of {use.model!r} took (s, units, rows) {counts}; none can be")
        units[use.model, kind] = UnitUse(device_s=use.device_s, num_units=use.unit_count, num_rows=use.row_count)
    if not 0 <= message.gap_s < math.inf:
        raise BadFrame(f"gap_s is {message.gap_s}; it must be finite and not negative")
    return DeviceTime(units=units, gap_s=message.gap_s)


def descriptions(messages: Sequence[engine_pb2.Model]) -> dict[str, ModelDescription]:
    found = [described(message) for message in messages]
    return {model.name: model for model in found}
