"""Ten thousand messages that no robot sends, over either path: every one refused, the server alive, its memory flat."""

from __future__ import annotations

import random
import socket
import struct
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import psutil
import pytest

from manyhands import codec, stamps
from manyhands.clients.act_stream import Chunk
from manyhands.clients.inference import InferenceClient
from manyhands.common.v1 import common_pb2
from manyhands.inference.v1 import inference_pb2
from manyhands.server import MAX_MESSAGE_BYTES
from tests.support.fault_lab import TASK, Lab, engine_of, picture_and_state, talk, text
from tests.support.inference_lab import RAW, next_reply

SERVICE = "/manyhands.inference.v1.InferenceService"
UNARY = ("OpenSession", "CloseSession", "ListModels", "SwapWeights", "GetStatus")
# Of 10,000 messages: less than 2.5 kB of each in the front end, where they end, and none of them in the engine.
MAX_GROWTH_BYTES = {"front end": 24 * 1024 * 1024, "engine": 4 * 1024 * 1024}

WRONG_DTYPES = [*(set(common_pb2.DataType.values()) - {common_pb2.DATA_TYPE_FLOAT32}), 39, 1 << 20]

NUM_STREAMS = 6
REFUSED = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)

Bend = Callable[[inference_pb2.ActRequest, random.Random], None]


def wrong_session(request: inference_pb2.ActRequest, numbers: random.Random) -> None:
    request.session_id = numbers.choice(["somebody else's", "", "\0" * 32, "a" * 10_000])


def replayed(request: inference_pb2.ActRequest, numbers: random.Random) -> None:
    request.request_id = numbers.choice([0, 1, 2, -request.request_id, -(1 << 63)])


def absurd_deadline(request: inference_pb2.ActRequest, numbers: random.Random) -> None:
    request.deadline.seconds = numbers.choice([-(1 << 60), 1 << 60, 70])
    request.deadline.nanos = numbers.choice([-(1 << 31), (1 << 31) - 1, 0])


def huge_shape(request: inference_pb2.ActRequest, numbers: random.Random) -> None:
    tensor = tensor_of(request)
    tensor.shape[:] = [numbers.choice([-1, 0, 1 << 31, 1 << 40, 1 << 62]) for _ in range(numbers.randrange(1, 40))]


def wrong_dtype(request: inference_pb2.ActRequest, numbers: random.Random) -> None:
    tensor_of(request).dtype = numbers.choice(WRONG_DTYPES)  # type: ignore[assignment]


def not_finite(request: inference_pb2.ActRequest, numbers: random.Random) -> None:
    tensor = tensor_of(request)
    value = struct.pack("<f", numbers.choice([float("nan"), float("inf"), float("-inf")]))
    place = 4 * numbers.randrange(len(tensor.data) // 4)
    tensor.data = tensor.data[:place] + value + tensor.data[place + 4 :]


def bytes_that_do_not_fit(request: inference_pb2.ActRequest, numbers: random.Random) -> None:
    tensor_of(request).data = numbers.randbytes(numbers.choice([0, 1, 3000]))


def bomb(request: inference_pb2.ActRequest, numbers: random.Random) -> None:
    """A picture of gigabytes, in a few bytes that say so honestly or not."""
    image = image_of(request)
    size = numbers.choice([1 << 14, 65_535])
    header = b"\xff\xd8\xff\xc0\x00\x11\x08" + struct.pack(">HH", size, size) + b"\x03\x01\x11\x00\x02\x11\x01\x03\x11\x01"
    image.encoding = common_pb2.IMAGE_ENCODING_JPEG
    image.data = header + numbers.randbytes(300) + b"\xff\xd9"
    if numbers.random() < 0.5:
        image.height = image.width = size


def no_picture(request: inference_pb2.ActRequest, numbers: random.Random) -> None:
    image = image_of(request)
    image.encoding = numbers.randrange(0, 9)  # type: ignore[assignment]
    image.data = numbers.randbytes(500)
    image.height = image.width = numbers.choice([image.height, 1 << 30, -5, 0])


def out_of_place(request: inference_pb2.ActRequest, numbers: random.Random) -> None:
    values = request.observation.values
    kind = numbers.randrange(4)
    if kind == 0:
        del values[numbers.randrange(len(values))]
    elif kind == 1:
        values[0].name, values[1].name = values[1].name, values[0].name
    elif kind == 2:
        values.add().CopyFrom(values[0])
    else:
        values[0].name = "../" * numbers.randrange(1, 500)


def bad_prefix(request: inference_pb2.ActRequest, numbers: random.Random) -> None:
    prefix = request.committed_prefix
    prefix.dtype = common_pb2.DATA_TYPE_FLOAT32
    prefix.shape.extend(numbers.choice([[1 << 62, 4], [3, 5], [-1, -1], [4]]))
    prefix.data = numbers.randbytes(64)


def bad_numbers(request: inference_pb2.ActRequest, numbers: random.Random) -> None:
    name = numbers.choice(["delay_steps", "execution_horizon", "current_index"])
    setattr(request, name, numbers.choice([-1, -(1 << 31)]))


def long_text(request: inference_pb2.ActRequest, numbers: random.Random) -> None:
    request.task = "\u202e" * numbers.randrange(4097, 20_000)


def over_the_sessions_limit(request: inference_pb2.ActRequest, numbers: random.Random) -> None:
    request.observation.values.add(name="padding").tensor.data = bytes(1 << 20)


BENDS: tuple[Bend, ...] = (
    wrong_session, replayed, absurd_deadline, huge_shape, wrong_dtype, not_finite, bytes_that_do_not_fit, bomb, no_picture,
    out_of_place, bad_prefix, bad_numbers, long_text,
)  # fmt: skip


def tensor_of(request: inference_pb2.ActRequest) -> common_pb2.Tensor:
    return next(value.tensor for value in request.observation.values if value.HasField("tensor"))


def image_of(request: inference_pb2.ActRequest) -> common_pb2.Image:
    return next(value.image for value in request.observation.values if value.HasField("image"))


class Attacker:
    """Counts what it threw; each throw fails when one of its messages is not refused."""

    def __init__(self, lab: Lab, client: InferenceClient, raw: grpc.Channel, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self._lab, self._client, self._raw = lab, client, raw
        self._numbers = random.Random(seed)
        self._good = inference_pb2.ActRequest(
            observation=common_pb2.Observation(values=codec.encode_values(lab.observation(1), image_encoding=RAW)),
            task=TASK,
            deadline=stamps.to_duration(5.0),
        )

    def bent_requests(self, num: int) -> None:
        """Of several robots at once."""
        seeds = [self._numbers.randrange(1 << 32) for _ in range(NUM_STREAMS)]
        with ThreadPoolExecutor(NUM_STREAMS) as pool:
            for counts in pool.map(self._bent_stream, [num // NUM_STREAMS] * NUM_STREAMS, seeds):
                self.counts.update(counts)

    def _bent_stream(self, num: int, seed: int) -> Counter[str]:
        """Well-formed messages with absurd content, over one stream, which outlives them all."""
        numbers, counts = random.Random(seed), Counter[str]()
        robot = f"hostile-{uuid.uuid4().hex[:8]}"
        session = self._lab.open_session(self._client, robot)
        act = self._raw.stream_stream(
            f"{SERVICE}/Act",
            request_serializer=inference_pb2.ActRequest.SerializeToString,
            response_deserializer=inference_pb2.ActResponse.FromString,
        )

        bent: dict[int, str] = {}

        def requests() -> Iterator[inference_pb2.ActRequest]:
            for request_id in range(2, num + 2):
                request = inference_pb2.ActRequest(session_id=session.session_id, request_id=request_id)
                request.MergeFrom(self._good)
                bend = over_the_sessions_limit if request_id % 250 == 0 else numbers.choice(BENDS)
                if request_id == 2:  # Refused when its id is known already, so that it can be replayed.
                    bend = bad_numbers
                bend(request, numbers)
                counts[bend.__name__] += 1
                bent[request.request_id] = bend.__name__
                yield request

        answered = 0
        for response in act(requests(), timeout=120.0):
            assert response.WhichOneof("result") == "refusal", bent[response.request_id]
            assert response.refusal.reason in {
                inference_pb2.REFUSAL_REASON_INVALID,
                inference_pb2.REFUSAL_REASON_REPLAYED,
                inference_pb2.REFUSAL_REASON_UNKNOWN_SESSION,
                inference_pb2.REFUSAL_REASON_SUPERSEDED,
            }, response
            answered += 1
        assert answered == num
        self._client.close_session(session.session_id)
        return counts

    def random_bytes(self, num: int) -> None:
        """A few are messages by chance, as of fields that are not known yet."""
        answered = 0
        for number in range(num):
            payload = b"\x0a\xff" + self._numbers.randbytes(self._numbers.randrange(0, 3000))
            try:
                if number % 10:
                    self._raw.unary_unary(f"{SERVICE}/{self._numbers.choice(UNARY)}")(payload, timeout=10.0)
                elif self._numbers.random() < 0.5:
                    list(self._raw.stream_stream(f"{SERVICE}/Act")(iter([payload]), timeout=10.0))
                else:
                    list(self._raw.unary_stream(f"{SERVICE}/Generate")(payload, timeout=10.0))
                answered += 1
            except grpc.RpcError as error:
                self._check_code(error, *REFUSED, grpc.StatusCode.UNKNOWN)
        assert answered <= num / 50
        self.counts["random bytes"] += num

    def _check_code(self, error: grpc.RpcError, *codes: grpc.StatusCode) -> None:
        assert error.code() in codes, error  # type: ignore[attr-defined]

    def flipped_bytes(self, num: int) -> None:
        """A good request of a session with some bits the other way: a chunk, a refusal or the end of the stream."""
        session = self._lab.open_session(self._client, f"flips-{uuid.uuid4().hex[:8]}")
        stream = self._raw.stream_stream(f"{SERVICE}/Act")
        for number in range(num):
            request = inference_pb2.ActRequest(session_id=session.session_id, request_id=number + 1)
            request.MergeFrom(self._good)
            content = bytearray(request.SerializeToString())
            for _ in range(self._numbers.randrange(1, 6)):
                content[self._numbers.randrange(min(len(content), 400))] ^= 1 << self._numbers.randrange(8)
            try:
                assert len(list(stream(iter([bytes(content)]), timeout=10.0))) <= 1
            except grpc.RpcError as error:
                self._check_code(error, *REFUSED)
        self._client.close_session(session.session_id)
        self.counts["flipped bits"] += num

    def bent_questions(self, num: int) -> None:
        session = self._lab.open_talk(self._client, f"asks-{uuid.uuid4().hex[:8]}")
        generate = self._raw.unary_stream(
            f"{SERVICE}/Generate", request_serializer=inference_pb2.GenerateRequest.SerializeToString
        )
        values = codec.encode_values(picture_and_state(1), image_encoding=RAW)
        for _ in range(num):
            request = inference_pb2.GenerateRequest(
                session_id=session.session_id, kind=1, observation=common_pb2.Observation(values=values)
            )
            kind = self._numbers.randrange(6)
            if kind == 0:
                request.temperature = self._numbers.choice([float("nan"), float("inf"), -1.0])
            elif kind == 1:
                request.user_text = "x" * 9000
            elif kind == 2:
                request.max_new_tokens = self._numbers.choice([-1, 1 << 30])
            elif kind == 3:
                request.kind = self._numbers.choice([0, 5, 1 << 20])  # type: ignore[assignment]
            elif kind == 4:
                request.session_id = "nobody's"
            else:
                request.observation.values[1].tensor.CopyFrom(codec.encode_tensor(np.full(2, np.nan, dtype=np.float32)))
            with pytest.raises(grpc.RpcError) as refused:
                list(generate(request, timeout=10.0))
            assert refused.value.code() in REFUSED, refused.value
        self._client.close_session(session.session_id)
        self.counts["questions"] += num

    def bent_handshakes(self, num: int) -> None:
        open_session = self._raw.unary_unary(
            f"{SERVICE}/OpenSession", request_serializer=inference_pb2.OpenSessionRequest.SerializeToString
        )
        for number in range(num):
            request = inference_pb2.OpenSessionRequest(
                robot_id=f"x{number}", client_id="c", model=self._lab.model, spec=self._lab.spec.to_proto()
            )
            kind = self._numbers.randrange(8)
            if kind == 0:
                request.spec.control_rate_hz = self._numbers.choice([float("nan"), -1.0, float("inf"), 0.0])
            elif kind == 1:
                request.spec.observation[0].shape[:] = [1 << 62, -1]
            elif kind == 2:
                request.robot_id = self._numbers.choice(["", "\n", "x" * 100_000])
            elif kind == 3:
                request.replan_interval_steps = self._numbers.choice([-1, 1 << 30])
            elif kind == 4:
                request.model = "../../etc/passwd"
            elif kind == 5:
                for _ in range(200):
                    request.spec.observation.add().CopyFrom(request.spec.observation[0])
            elif kind == 6:
                request.spec.observation.extend(common_pb2.Feature(name=f"camera {index}") for index in range(20_000))
            else:
                cameras = [feature for feature in request.spec.observation if len(feature.shape) == 3]
                cameras[0].shape[:] = self._numbers.choice([[1 << 40, 1 << 40, 3], [1 << 62] * 20_000])
            with pytest.raises(grpc.RpcError) as refused:
                open_session(request, timeout=10.0)
            assert refused.value.code() in REFUSED, refused.value
        self.counts["handshakes"] += num

    def too_large(self, num: int) -> None:
        """Over what any message may have: gRPC refuses it by its length."""
        for _ in range(num):
            with pytest.raises(grpc.RpcError) as refused:
                list(self._raw.stream_stream(f"{SERVICE}/Act")(iter([bytes(MAX_MESSAGE_BYTES + 1)]), timeout=10.0))
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        self.counts["too large"] += num

    def junk_on_the_socket(self, num: int) -> None:
        host, _, port = self._lab.address.rpartition(":")
        for _ in range(num):
            with socket.create_connection((host, int(port)), timeout=5.0) as connection:
                connection.sendall(self._numbers.randbytes(4096))
        self.counts["junk"] += num

    def everything(self, scale: int) -> None:
        self.bent_requests(82 * scale)
        self.random_bytes(8 * scale)
        self.flipped_bytes(3 * scale)
        self.bent_questions(3 * scale)
        self.bent_handshakes(3 * scale)
        self.too_large(max(1, scale // 50))
        self.junk_on_the_socket(max(1, scale // 4))


def test_ten_thousand_hostile_messages_leave_the_server_alive_and_its_memory_flat(lab: Lab) -> None:
    engine = engine_of(lab.service)
    assert engine is not None
    processes = {"front end": psutil.Process(lab.service.process.pid), "engine": psutil.Process(engine.pid)}
    with InferenceClient(lab.address) as client:
        # A channel's own limit would refuse what the server's must.
        options = [("grpc.max_send_message_length", -1)]
        with (
            grpc.insecure_channel(lab.address, options=options) as unlimited,
            client.act_stream(lab.open_session(client, "honest").session_id) as honest,
        ):
            attacker = Attacker(lab, client, unlimited, seed=11)
            attacker.everything(60)  # Whatever an allocator keeps of the first ones.
            before = {name: process.memory_info().rss for name, process in processes.items()}
            attacker.counts.clear()
            attacker.everything(102)
            assert attacker.counts.total() >= 10_000
            assert min(attacker.counts[bend.__name__] for bend in BENDS) > 400
            grown = {name: process.memory_info().rss - before[name] for name, process in processes.items()}
            assert all(grown[name] < most for name, most in MAX_GROWTH_BYTES.items()), f"bytes that they grew by: {grown}"
            lab.ask(honest, 2)
            result = next_reply(honest).result
            assert isinstance(result, Chunk)
            lab.check_chunk(result.actions, 2)
        *_, last = talk(client, lab.open_talk(client, "honest-asks"), 2)
        assert last.full_text == text(2)
        robots = {session.robot_id for session in client.status().sessions}
        assert not any(robot.startswith(("hostile", "flips", "asks-", "x")) for robot in robots)
    assert lab.service.process.poll() is None
    survivor = engine_of(lab.service)
    assert survivor is not None
    assert survivor.pid == engine.pid, "the engine was replaced"
