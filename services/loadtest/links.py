"""One robot's connection to a server: open, ask and wait for the answer, close. Two kinds of servers, the same questions."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
import numpy as np
import numpy.typing as npt

from manyhands import channel, codec, errors, stamps
from manyhands.clients.act_stream import SESSION_KEY, Chunk, Drain, Refusal, decode_reply
from manyhands.common.v1 import common_pb2
from manyhands.inference.v1 import inference_pb2, inference_pb2_grpc
from manyhands.shared_memory import SharedMemory
from manyhands.spec import Spec

from . import observations
from .plan import Plan

CALL_TIMEOUT_S = 5.0
ACT = "/manyhands.inference.v1.InferenceService/Act"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """To one request.

    Attributes:
        refusal: Reason, "" for a chunk.
        message: For people, of a refusal.
        retry_after_s: 0 without.
        drained_s: After how long the server asks to come again, None where it stays.
        version: Number of the weights.
        replan_interval_steps: Actions to execute of the chunk, as the server asks; 0 where it asks for nothing.
    """

    refusal: str = ""
    message: str = ""
    retry_after_s: float = 0.0
    stage_s: Mapping[str, float] = field(default_factory=dict)
    batch_size: int = 0
    drained_s: float | None = None
    version: int = 0
    replan_interval_steps: int = 0


class Link(Protocol):
    """Raises errors.ManyhandsError where the server or the connection fails."""

    async def open(self) -> None: ...

    def prepare(self) -> None:
        """Before each ask(), when there is time: what a request says is known then, but for its observation."""

    async def ask(self, tick: int) -> Answer: ...

    async def close(self) -> None: ...


class ServiceLink:
    """A session and its stream.

    Requests are put together from bytes: what all have in common is serialised once, and a protobuf message may come in
    parts.
    """

    def __init__(
        self, plan: Plan, index: int, connection: grpc.aio.Channel, shared: dict[tuple[str, ...], list[bytes]]
    ) -> None:
        self._plan = plan
        self._robot_id = f"{plan.name}-{index:04}"
        self._client_id = uuid.uuid4().hex
        self._connection = connection
        self._stub = inference_pb2_grpc.InferenceServiceStub(connection)
        self._shared = shared
        self._call: Any = None
        self._request_id = 0
        self._last_chunk: npt.NDArray[np.float32] | None = None
        self._prepared = b""
        self.session_id = ""
        self.required: tuple[str, ...] = ()
        self._bodies: list[bytes] = []
        self._memory: SharedMemory | None = None
        # What was observed last.
        self._newest = b""

    async def open(self) -> None:
        plan = self._plan
        spec = common_pb2.Spec.FromString(bytes.fromhex(plan.spec))
        request = inference_pb2.OpenSessionRequest(
            robot_id=self._robot_id,
            client_id=self._client_id,
            model=plan.model,
            spec=spec,
            replan_interval_steps=plan.replan_interval_steps,
            wants_shared_memory=plan.shared_memory,
        )
        with channel.translated_errors():
            session = await self._stub.OpenSession(request, timeout=CALL_TIMEOUT_S)
        self.session_id = session.session_id
        self.required = tuple(session.required_observations)
        if plan.shared_memory:
            self._memory = SharedMemory.find(session.shared_memory)
            if self._memory is None:
                raise errors.NotOffered(
                    "the server has no shared memory for these pictures: it is on another machine or in another container, "
                    "its model has no cameras, or they are too large"
                )
        self._bodies = self._encoded(Spec.from_proto(spec))
        self._newest = self._bodies[0]
        self._request_id = 0
        self._last_chunk = None
        act: Any = self._connection.stream_stream(ACT, response_deserializer=inference_pb2.ActResponse.FromString)
        self._call = act(metadata=((SESSION_KEY, self.session_id),))

    def prepare(self) -> None:
        self._request_id += 1
        request = inference_pb2.ActRequest(session_id=self.session_id, request_id=self._request_id)
        steps, last = self._plan.replan_interval_steps, self._last_chunk
        if last is not None and len(last) > steps:
            request.committed_prefix.CopyFrom(codec.encode_tensor(last[steps:]))
            request.delay_steps = min(1, len(last) - steps)
        self._prepared = request.SerializeToString()

    async def ask(self, tick: int) -> Answer:
        head = inference_pb2.ActRequest(sent=stamps.now(), noise_seed=tick).SerializeToString()
        drained_s: float | None = None
        self._newest = self._bodies[tick % len(self._bodies)]
        with channel.translated_errors():
            try:
                await self._call.write(b"".join((self._prepared, head, self._placed())))
            except asyncio.InvalidStateError:  # The stream had ended between two requests.
                raise errors.Unreachable(f"the stream has ended: {await self._call.details()}") from None
            while True:
                response = await self._call.read()
                if response is grpc.aio.EOF:
                    raise errors.Unreachable("the server ended the stream")
                reply = decode_reply(response)
                if isinstance(reply.result, Drain):
                    drained_s = reply.result.reconnect_after_s
                elif reply.request_id == self._request_id:
                    break
        if self._memory is not None:
            self._memory.answered(self._request_id)
        if isinstance(reply.result, Chunk):
            if self._plan.with_prefix:
                self._last_chunk = reply.result.model_actions
            return Answer(
                stage_s=reply.stage_s,
                batch_size=reply.batch_size,
                drained_s=drained_s,
                version=reply.version.number,
                replan_interval_steps=reply.result.replan_interval_steps,
            )
        assert isinstance(reply.result, Refusal)
        return Answer(
            refusal=reply.result.reason,
            message=reply.result.message,
            retry_after_s=reply.result.retry_after_s,
            drained_s=drained_s,
        )

    def _placed(self) -> bytes:
        """The newest observation, as it is sent."""
        if self._memory is None:
            return self._newest
        request = inference_pb2.ActRequest.FromString(self._newest)
        request.request_id = self._request_id
        return self._memory.place(request).SerializeToString()

    def generate(self, tokens: int, previous_text: str) -> Any:
        """The call, an asynchronous iterator of GenerateResponse. About what it acts on, as an actor's subtask is."""
        body = inference_pb2.ActRequest.FromString(self._newest)
        request = inference_pb2.GenerateRequest(
            session_id=self.session_id,
            request_id=uuid.uuid4().hex,
            kind=inference_pb2.TEXT_KIND_SUBTASK,
            observation=body.observation,
            task=self._plan.task,
            previous_text=previous_text,
            max_new_tokens=tokens,
            deadline=stamps.to_duration(10.0),
        )
        return self._stub.Generate(request, timeout=11.0)

    async def close(self) -> None:
        if self._call is not None:
            self._call.cancel()
        if self.session_id:
            with channel.translated_errors():
                request = inference_pb2.CloseSessionRequest(session_id=self.session_id)
                await self._stub.CloseSession(request, timeout=CALL_TIMEOUT_S)
            self.session_id = ""

    def _encoded(self, spec: Spec) -> list[bytes]:
        jpeg_quality = None if self._plan.shared_memory else self._plan.jpeg_quality
        if self.required not in self._shared:
            self._shared[self.required] = [
                inference_pb2.ActRequest(
                    observation=common_pb2.Observation(
                        values=observations.encode(observations.make(spec, self.required, seed), jpeg_quality)
                    ),
                    task=self._plan.task,
                    deadline=stamps.to_duration(self._plan.deadline_s),
                ).SerializeToString()
                for seed in range(observations.NUM_VARIANTS)
            ]
        return self._shared[self.required]


class PlainLink:
    """The reference server's: one message there, one back."""

    def __init__(self, plan: Plan, shared: dict[tuple[str, ...], list[bytes]]) -> None:
        self._plan = plan
        self._shared = shared
        self._socket: Any = None
        # Only here, so that the tool runs without them where nothing is compared.
        import msgpack
        from websockets.asyncio.client import connect

        self._msgpack: Any = msgpack
        self._connect = connect

    async def open(self) -> None:
        try:
            self._socket = await self._connect(f"ws://{self._plan.address}", compression=None, max_size=None)
            required = tuple(self._msgpack.unpackb(await self._socket.recv())["required_observations"])
        except Exception as error:
            raise errors.Unreachable(f"the plain server: {error}") from error
        spec = Spec.from_proto(common_pb2.Spec.FromString(bytes.fromhex(self._plan.spec)))
        if required not in self._shared:
            self._shared[required] = [self._packed(spec, required, seed) for seed in range(observations.NUM_VARIANTS)]
        self._bodies = self._shared[required]

    def prepare(self) -> None:
        """Its requests are ready from the beginning."""

    async def ask(self, tick: int) -> Answer:
        try:
            await self._socket.send(self._bodies[tick % len(self._bodies)])
            reply = self._msgpack.unpackb(await self._socket.recv())
        except Exception as error:
            raise errors.Unreachable(f"the plain server: {error}") from error
        for name in ("actions", "model_actions"):
            actions = np.frombuffer(reply[name]["data"], dtype=np.float32).reshape(reply[name]["shape"])
            if not np.isfinite(actions).all():
                raise errors.InvalidInput("holds values that are not finite", field=name)
        return Answer(stage_s=reply["stage_s"], batch_size=1)

    async def close(self) -> None:
        if self._socket is not None:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                await self._socket.close()

    def _packed(self, spec: Spec, required: tuple[str, ...], seed: int) -> bytes:
        values: dict[str, Any] = {}
        for value in observations.encode(observations.make(spec, required, seed), self._plan.jpeg_quality):
            if value.WhichOneof("value") == "image":
                values[value.name] = {"jpeg": value.image.data}
            else:
                dtype = codec.numpy_dtype_of(value.tensor.dtype).str
                values[value.name] = {"data": value.tensor.data, "dtype": dtype, "shape": list(value.tensor.shape)}
        packed: bytes = self._msgpack.packb({"observation": values, "task": self._plan.task, "noise_seed": seed})
        return packed
