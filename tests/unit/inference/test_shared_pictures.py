"""A session's memory for pictures, both ends: what a client leaves there is what the server reads, and nothing else is."""

from __future__ import annotations

import fcntl
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from manyhands import codec
from manyhands.common.v1 import common_pb2
from manyhands.errors import InvalidInput, NotOffered
from manyhands.inference.v1 import inference_pb2
from manyhands.security import is_same_machine
from manyhands.shared_memory import HEADER_BYTES, MOST_BYTES, NAME, SharedMemory
from manyhands.spec import Feature, FeatureKind
from services.inference import shared_pictures
from services.inference.shared_pictures import NUM_AREAS, SharedPictures

RAW, JPEG = common_pb2.IMAGE_ENCODING_RAW_RGB8, common_pb2.IMAGE_ENCODING_JPEG
SIZES = {"front": (6, 8), "wrist": (4, 4)}


def camera(name: str, height: int, width: int) -> Feature:
    return Feature(name=name, kind=FeatureKind.IMAGE, dtype="uint8", shape=(height, width, 3))


CAMERAS = [camera(name, *size) for name, size in SIZES.items()]


@pytest.fixture
def server() -> Iterator[SharedPictures]:
    made = SharedPictures.of(CAMERAS)
    assert made is not None
    yield made
    made.close()


@pytest.fixture
def client(server: SharedPictures) -> SharedMemory:
    found = SharedMemory.find(server.told())
    assert found is not None
    return found


def pictures(seed: int) -> dict[str, npt.NDArray[np.uint8]]:
    random = np.random.default_rng(seed)
    return {name: random.integers(0, 256, (*size, 3), dtype=np.uint8) for name, size in SIZES.items()}


def request(number: int, encoding: common_pb2.ImageEncoding.ValueType = RAW) -> inference_pb2.ActRequest:
    values = codec.encode_values(pictures(number), image_encoding=encoding)
    values.append(common_pb2.NamedValue(name="state", tensor=codec.encode_tensor(np.zeros(3, np.float32))))
    return inference_pb2.ActRequest(request_id=number, observation=common_pb2.Observation(values=values))


def read(server: SharedPictures, sent: inference_pb2.ActRequest) -> dict[str, npt.NDArray[np.uint8]]:
    images = {value.name: value.image for value in sent.observation.values}
    return {one.name: server.picture(images[one.name], one.offset, field=one.name) for one in sent.shared_pictures}


def test_pictures_that_are_left_there_are_read(server: SharedPictures, client: SharedMemory) -> None:
    sent = []
    for number in (1, 2):
        given = request(number)
        one = client.place(given)
        sent.append(one)
        assert given == request(number), "who gave it may send it elsewhere"
        assert one.ByteSize() < given.ByteSize() / 2, "pixels do not travel"
        assert codec.decode_tensor(one.observation.values[-1].tensor).shape == (3,)
    for number, one in enumerate(sent, 1):
        found = read(server, one)
        assert found.keys() == SIZES.keys()
        for name, picture in pictures(number).items():
            np.testing.assert_array_equal(found[name], picture)


def test_what_was_read_is_a_copy(server: SharedPictures, client: SharedMemory) -> None:
    found = read(server, client.place(request(1)))
    client.answered(1)
    for number in range(2, 2 + NUM_AREAS):
        assert client.place(request(number)).shared_pictures
    np.testing.assert_array_equal(found["front"], pictures(1)["front"])


def test_an_area_is_written_again_only_when_its_request_was_answered(client: SharedMemory) -> None:
    for number in range(1, NUM_AREAS + 1):
        assert client.place(request(number)).shared_pictures
    assert client.place(request(9)) == request(9), "it goes as it is"
    client.answered(7)  # Nobody's.
    assert client.place(request(9)) == request(9)
    client.answered(2)
    assert client.place(request(1)) == request(1), "an id that is in flight"
    assert len(client.place(request(9)).shared_pictures) == len(SIZES)


def test_one_stream_at_a_time_has_it_and_the_next_one_all_of_it(client: SharedMemory) -> None:
    assert client.take()
    for number in range(1, NUM_AREAS + 1):
        client.place(request(number))
    assert not client.take()
    client.give_back()
    assert client.take()
    again = [client.place(request(number)) for number in range(20, 21 + NUM_AREAS)]
    assert [len(one.shared_pictures) for one in again] == [len(SIZES)] * NUM_AREAS + [0]


def test_what_is_encoded_or_too_large_stays_in_the_message(client: SharedMemory) -> None:
    assert client.place(request(1, JPEG)) == request(1, JPEG)
    values = codec.encode_values({"front": np.zeros((60, 80, 3), np.uint8)}, image_encoding=RAW)
    large = inference_pb2.ActRequest(request_id=2, observation=common_pb2.Observation(values=values))
    assert client.place(large) == large


@pytest.mark.parametrize(
    ("height", "width", "offset"),
    [
        (6, 8, 0),
        (6, 8, HEADER_BYTES - 1),
        (6, 8, -HEADER_BYTES),
        (6, 8, 1 << 40),
        (6, 8, HEADER_BYTES * (NUM_AREAS + 1) - 6 * 8 * 3 + 1),
        (1 << 20, 1 << 20, HEADER_BYTES),
        (0, 8, HEADER_BYTES),
        (-6, -8, HEADER_BYTES),
    ],
)
def test_a_place_or_a_size_that_cannot_be_is_refused(server: SharedPictures, height: int, width: int, offset: int) -> None:
    image = common_pb2.Image(encoding=RAW, height=height, width=width)
    with pytest.raises(InvalidInput, match="not within the session's shared memory") as refused:
        server.picture(image, offset, field="front")
    assert refused.value.field == "front"


@pytest.mark.parametrize("changed", [{"encoding": JPEG}, {"data": b"\0" * 144}])
def test_a_picture_is_in_one_place(server: SharedPictures, changed: dict[str, object]) -> None:
    image = common_pb2.Image(encoding=RAW, height=6, width=8)
    for name, value in changed.items():
        setattr(image, name, value)
    with pytest.raises(InvalidInput, match="RAW_RGB8 without data"):
        server.picture(image, HEADER_BYTES, field="front")


def test_a_client_cannot_shrink_it_under_the_server(server: SharedPictures) -> None:
    told = server.told()
    memory_fd = os.open(f"/proc/{told.process_id}/fd/{told.descriptor}", os.O_RDWR)
    try:
        for size in (0, told.num_bytes * 2):
            with pytest.raises(PermissionError):
                os.ftruncate(memory_fd, size)
    finally:
        os.close(memory_fd)


@pytest.mark.parametrize(
    "changed",
    [
        {"token": b"another machine!"},
        {"token": b""},
        {"token": None},
        {"num_bytes": 1 << 15},
        {"process_id": 1 << 30},
        {"descriptor": 1 << 20},
        {"areas": [0]},
        {"areas": []},
        {"areas": [1 << 40]},
        {"area_bytes": 0},
    ],
)
def test_memory_that_is_not_the_servers_is_not_taken(server: SharedPictures, changed: dict[str, object]) -> None:
    told = server.told()
    assert SharedMemory.find(told) is not None
    for name, value in changed.items():
        value = told.token[:1] if value is None else value  # Soon guessed.
        told.ClearField(name)
        told.MergeFrom(inference_pb2.SharedMemory(**{name: value}))
    assert SharedMemory.find(told) is None


def test_a_file_of_another_kind_is_not_even_opened(server: SharedPictures, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    told, pipe = server.told(), os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    opened: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", lambda path, flags: opened.append(path))
        told.descriptor = pipe
        assert SharedMemory.find(told) is None
    os.close(pipe)
    assert opened == [], "who opens one may wait for its other end"


def test_memory_that_could_be_shrunk_under_the_client_is_not_taken(server: SharedPictures) -> None:
    told = server.told()
    unsealed = os.memfd_create(NAME)
    os.write(unsealed, told.token)
    os.ftruncate(unsealed, told.num_bytes)
    told.descriptor = unsealed
    assert SharedMemory.find(told) is None
    os.close(unsealed)


def test_memory_larger_than_any_server_makes_is_not_taken() -> None:
    huge = os.memfd_create(NAME, os.MFD_ALLOW_SEALING)
    token = b"sixteen bytes of"
    os.write(huge, token)
    os.ftruncate(huge, MOST_BYTES + 4096)
    fcntl.fcntl(huge, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    told = inference_pb2.SharedMemory(
        process_id=os.getpid(),
        descriptor=huge,
        num_bytes=MOST_BYTES + 4096,
        token=token,
        area_bytes=100,
        areas=[HEADER_BYTES],
    )
    assert SharedMemory.find(told) is None
    told.num_bytes = MOST_BYTES
    os.close(huge)


def test_a_server_without_room_serves_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    full, nowhere = OSError(24, "too many open files"), NotOffered("not on this system")
    for part, broken in (("grow_and_seal", full), ("make_memory", full), ("make_memory", nowhere)):
        with monkeypatch.context() as patch:
            patch.setattr(shared_pictures, part, _raiser(broken))
            assert SharedPictures.of(CAMERAS) is None
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def _raiser(error: Exception) -> Callable[..., object]:
    def fail(*_: object) -> object:
        raise error

    return fail


def test_its_end_leaves_nothing_behind() -> None:
    def open_files() -> int:
        return sum(NAME in str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(NAME)

    gc.collect()
    before = open_files(), mapped()
    server = SharedPictures.of(CAMERAS)
    assert server is not None
    told = server.told()
    client = SharedMemory.find(told)
    assert client is not None
    sent = client.place(request(1))
    server.close()
    server.close()
    assert SharedMemory.find(told) is None
    with pytest.raises(InvalidInput, match="the session has ended"):
        read(server, sent)
    del client
    gc.collect()
    assert (open_files(), mapped()) == before


def test_memory_is_made_only_where_it_is_of_use() -> None:
    state = Feature(name="state", kind=FeatureKind.STATE, dtype="float32", shape=(3,))
    assert SharedPictures.of([state]) is None
    assert SharedPictures.of([camera("huge", 4096, MOST_BYTES // 4096 // 3)]) is None
    assert SharedPictures.of(CAMERAS, left_bytes=HEADER_BYTES) is None


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        ("ipv4:127.0.0.1:50123", True),
        ("ipv6:%5B::1%5D:50123", True),
        ("ipv6:[::1]:50123", True),
        ("unix:", True),
        ("ipv4:192.168.0.7:50123", False),
        ("ipv6:%5Bfe80::1%5D:50123", False),
        ("", False),
    ],
)
def test_who_comes_from_the_same_machine(peer: str, expected: bool) -> None:
    assert is_same_machine(peer) is expected
