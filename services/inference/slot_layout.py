"""What is in a slot: a fixed header, then arrays at places that the models' descriptions fix. Everything read is checked.

Both processes work the places out from the same descriptions, so nothing in a slot says where to read. Numbers are
little-endian; arrays begin on multiples of 64 bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from manyhands import errors
from manyhands.common.v1 import common_pb2
from manyhands.errors import InternalError, ManyhandsError

from .engine_port import Answer, Model, Observed, Outcome, Rehearsal, Row, Superseded
from .prepare import MAX_TASK_CHARACTERS

_ALIGNMENT = 64
_MAX_OWNER_BYTES = 64
_MAX_TASK_BYTES = 4 * MAX_TASK_CHARACTERS
_MAX_DIGEST_BYTES = 64
_MAX_STATUS_BYTES = 8 * 1024
_MAX_FEATURES = 64
_NO_PREFIX = -1

# token, request_id, arrived_s, deadline_s, seed, features that are there (a bit each), model, delay_steps,
# execution_horizon, prefix steps, bytes of owner, bytes of task, gate, whether it is told ahead, whether it is a rehearsal.
_REQUEST = struct.Struct("<QqddqQIiiiIII??")
_OWNER_AT = 128
_TASK_AT = _OWNER_AT + _MAX_OWNER_BYTES
_REQUEST_ARRAYS_AT = _TASK_AT + _MAX_TASK_BYTES

# token, kind, model, version number, queue_s, prefix_s, sample_s, postprocess_s, batch size, bytes of digest, of status.
_ANSWER = struct.Struct("<QIIqddddiII")
_DIGEST_AT = 128
_ANSWER_ARRAYS_AT = _DIGEST_AT + _MAX_DIGEST_BYTES

_CHUNK, _SUPERSEDED, _ERROR, _REHEARSAL = 1, 2, 3, 4


class BadSlot(InternalError):
    """A slot's content cannot be: the peer is broken."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A row on its way to the engine; token is the front end's name for it, never used twice. Stamps on CLOCK_MONOTONIC.

    Attributes:
        is_ahead: Not asked for yet: see EnginePort.expect. It has no pictures, no owner, no times, and is not answered.
        is_rehearsal: See EnginePort.rehearse. Likewise, but for its pictures.
        gate: Number of the one that its pictures come or came through (picture_gate.py); 0: none.
    """

    token: int
    owner: str
    request_id: int
    arrived_s: float
    deadline_s: float
    model: str
    row: Row
    is_ahead: bool = False
    is_rehearsal: bool = False
    gate: int = 0


@dataclass(frozen=True, kw_only=True)
class _Place:
    name: str
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape) * self.dtype.itemsize

    def view(self, body: memoryview) -> npt.NDArray[np.generic]:
        return np.ndarray(self.shape, dtype=self.dtype, buffer=body, offset=self.start)


class SlotLayout:
    """Where things are in the slots of some models, which both sides list in the same order.

    Attributes:
        request_bytes, answer_bytes: Of a slot's body.
    """

    def __init__(self, models: Sequence[Model]) -> None:
        self._models = tuple(models)
        self._index = {model.name: index for index, model in enumerate(models)}
        self._features = [_feature_places(model) for model in models]
        self._prefixes = [
            _place("prefix", _end(features, _REQUEST_ARRAYS_AT), (model.horizon, model.model_action_size), "<f4")
            for model, features in zip(models, self._features, strict=True)
        ]
        self._actions = [
            _place("actions", _ANSWER_ARRAYS_AT, (model.horizon, action_size(model)), "<f4") for model in models
        ]
        self._model_actions = [
            _place("model_actions", actions.end, (model.horizon, model.model_action_size), "<f4")
            for model, actions in zip(models, self._actions, strict=True)
        ]
        self.request_bytes = max(place.end for place in self._prefixes)
        self.answer_bytes = max(_ANSWER_ARRAYS_AT + _MAX_STATUS_BYTES, *(place.end for place in self._model_actions))

    def write_request(self, body: memoryview, request: Request) -> None:
        """Raises InternalError for a row that is not as its model's spec has it; the slot is not to be published then."""
        index = self._index[request.model]
        row = request.row
        owner, task = request.owner.encode(), row.sample.task.encode("utf-8", "surrogatepass")
        if len(owner) > _MAX_OWNER_BYTES or len(task) > _MAX_TASK_BYTES:
            raise InternalError(f"an owner of {len(owner)} bytes and a task of {len(task)} do not fit a slot")
        present = 0
        for bit, place in enumerate(self._features[index]):
            array = row.sample.observation.get(place.name)
            if array is not None:
                _copy_in(body, place, array)
                present |= 1 << bit
        steps = _NO_PREFIX if row.prefix is None else len(row.prefix)
        if row.prefix is not None:
            _copy_in(body, _first_steps(self._prefixes[index], steps), row.prefix)
        body[_OWNER_AT : _OWNER_AT + len(owner)] = owner
        body[_TASK_AT : _TASK_AT + len(task)] = task
        _REQUEST.pack_into(
            body, 0, request.token, request.request_id, request.arrived_s, request.deadline_s, row.seed, present, index,
            row.delay_steps, row.execution_horizon, steps, len(owner), len(task), request.gate, request.is_ahead,
            request.is_rehearsal,
        )  # fmt: skip

    def read_request(self, body: memoryview) -> Request:
        """A copy of what the slot holds; BadSlot where it cannot be."""
        (
            token, request_id, arrived_s, deadline_s, seed, present, index, delay_steps, execution_horizon, steps,
            owner_bytes, task_bytes, gate, is_ahead, is_rehearsal,
        ) = _REQUEST.unpack_from(body, 0)  # fmt: skip
        model = self._model(index)
        features = self._features[index]
        _check(present >> len(features) == 0, "features", present)
        _check(steps == _NO_PREFIX or 0 < steps <= model.horizon, "prefix steps", steps)
        _check(0 <= delay_steps <= model.horizon, "delay_steps", delay_steps)
        _check(0 <= execution_horizon <= model.horizon, "execution_horizon", execution_horizon)
        _check(owner_bytes <= _MAX_OWNER_BYTES and task_bytes <= _MAX_TASK_BYTES, "text bytes", (owner_bytes, task_bytes))
        _check(math.isfinite(arrived_s) and math.isfinite(deadline_s), "stamps", (arrived_s, deadline_s))
        observation = {place.name: np.array(place.view(body)) for bit, place in enumerate(features) if present >> bit & 1}
        prefix = None
        if steps != _NO_PREFIX:
            prefix = np.array(_first_steps(self._prefixes[index], steps).view(body), dtype=np.float32)
        try:
            owner = bytes(body[_OWNER_AT : _OWNER_AT + owner_bytes]).decode()
            task = bytes(body[_TASK_AT : _TASK_AT + task_bytes]).decode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            raise BadSlot(f"a slot's text is no UTF-8: {error.reason}") from None
        row = Row(
            sample=Observed(observation=observation, task=task),
            prefix=prefix,
            delay_steps=delay_steps,
            execution_horizon=execution_horizon,
            seed=seed,
        )
        return Request(
            token=token,
            owner=owner,
            request_id=request_id,
            arrived_s=arrived_s,
            deadline_s=deadline_s,
            model=model.name,
            row=row,
            is_ahead=is_ahead,
            is_rehearsal=is_rehearsal,
            gate=gate,
        )

    def write_answer(self, body: memoryview, token: int, model: str, outcome: Outcome | Rehearsal) -> None:
        index = self._index[model]
        chunk_kind = _CHUNK
        if isinstance(outcome, Rehearsal):
            chunk_kind, outcome = _REHEARSAL, outcome.answer
        if isinstance(outcome, Answer):
            places = (self._actions[index], self._model_actions[index])
            shapes = (outcome.actions.shape, outcome.model_actions.shape)
            if shapes == tuple(place.shape for place in places) and len(outcome.version.digest) <= _MAX_DIGEST_BYTES:
                for place, array in zip(places, (outcome.actions, outcome.model_actions), strict=True):
                    _copy_in(body, place, array)
                digest = outcome.version.digest
                body[_DIGEST_AT : _DIGEST_AT + len(digest)] = digest
                _ANSWER.pack_into(
                    body, 0, token, chunk_kind, index, outcome.version.number, outcome.queue_s, outcome.prefix_s,
                    outcome.sample_s, outcome.postprocess_s, outcome.batch_size, len(digest), 0,
                )  # fmt: skip
                return
            outcome = InternalError(f"the model answered {shapes}, its description says otherwise")
        status = b""
        if isinstance(outcome, ManyhandsError):
            status = errors.to_status(outcome).SerializeToString()[:_MAX_STATUS_BYTES]
            body[_ANSWER_ARRAYS_AT : _ANSWER_ARRAYS_AT + len(status)] = status
        kind = _ERROR if status else _SUPERSEDED
        _ANSWER.pack_into(body, 0, token, kind, index, 0, 0.0, 0.0, 0.0, 0.0, 0, 0, len(status))

    def read_answer(self, body: memoryview) -> tuple[int, Outcome | Rehearsal]:
        """(token, outcome), copied; BadSlot where it cannot be."""
        (
            token, kind, index, number, queue_s, prefix_s, sample_s, postprocess_s, batch_size, digest_bytes, status_bytes,
        ) = _ANSWER.unpack_from(body, 0)  # fmt: skip
        model = self._model(index)
        if kind == _SUPERSEDED:
            return token, Superseded()
        if kind == _ERROR:
            _check(0 < status_bytes <= _MAX_STATUS_BYTES, "status bytes", status_bytes)
            try:
                status = status_pb2.Status.FromString(bytes(body[_ANSWER_ARRAYS_AT : _ANSWER_ARRAYS_AT + status_bytes]))
                return token, errors.from_status(status)
            except (DecodeError, ValueError) as error:
                raise BadSlot(f"a slot's status cannot be read: {error}") from None
        _check(kind in (_CHUNK, _REHEARSAL), "kind", kind)
        times_s = (queue_s, prefix_s, sample_s, postprocess_s)
        _check(all(0.0 <= seconds < 1e6 for seconds in times_s), "stage times", times_s)
        _check(number >= 0 and batch_size > 0, "version and batch size", (number, batch_size))
        _check(digest_bytes <= _MAX_DIGEST_BYTES, "digest bytes", digest_bytes)
        actions = np.array(self._actions[index].view(body), dtype=np.float32)
        model_actions = np.array(self._model_actions[index].view(body), dtype=np.float32)
        _check(bool(np.isfinite(actions).all() and np.isfinite(model_actions).all()), "chunk", "not finite")
        digest = bytes(body[_DIGEST_AT : _DIGEST_AT + digest_bytes])
        answer = Answer(
            actions=actions,
            model_actions=model_actions,
            version=common_pb2.PolicyVersion(model=model.name, number=number, digest=digest),
            queue_s=queue_s,
            prefix_s=prefix_s,
            sample_s=sample_s,
            postprocess_s=postprocess_s,
            batch_size=batch_size,
        )
        return token, answer if kind == _CHUNK else Rehearsal(answer=answer)

    def _model(self, index: int) -> Model:
        _check(index < len(self._models), "model", index)
        return self._models[index]


def action_size(model: Model) -> int:
    """R: elements of all action features."""
    return sum(feature.shape[0] for feature in model.spec.action)


def _feature_places(model: Model) -> list[_Place]:
    places: list[_Place] = []
    for feature in model.used_spec.observation:
        places.append(_place(feature.name, _end(places, _REQUEST_ARRAYS_AT), feature.shape, feature.dtype))
    if len(places) > _MAX_FEATURES:
        raise InternalError(f"{model.name!r} reads {len(places)} features, a slot has room for {_MAX_FEATURES}")
    return places


def _place(name: str, after: int, shape: tuple[int, ...], dtype: str) -> _Place:
    start = -(-after // _ALIGNMENT) * _ALIGNMENT
    return _Place(name=name, start=start, shape=shape, dtype=np.dtype(dtype).newbyteorder("<"))


def _first_steps(place: _Place, steps: int) -> _Place:
    return _Place(name=place.name, start=place.start, shape=(steps, *place.shape[1:]), dtype=place.dtype)


def _end(places: Sequence[_Place], empty: int) -> int:
    return places[-1].end if places else empty


def _copy_in(body: memoryview, place: _Place, array: npt.NDArray[np.generic]) -> None:
    if array.shape != place.shape or array.dtype.newbyteorder("<") != place.dtype:
        raise InternalError(
            f"is {array.shape} {array.dtype.name}, its place is {place.shape} {place.dtype.name}", field=place.name
        )
    np.copyto(place.view(body), array)


def _check(good: bool, what: str, value: object) -> None:
    if not good:
        raise BadSlot(f"{what} of a slot cannot be {value}")
