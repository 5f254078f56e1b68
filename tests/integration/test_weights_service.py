"""The weights service as a process, over real sockets: what a learner publishes and services read."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.local import Topology
from manyhands import channel, weights_manifest
from manyhands.clients.weights import PublishedVersion, VersionWatch, WeightsClient, pieces
from manyhands.common.v1 import common_pb2
from manyhands.errors import Corrupt, InvalidInput, ManyhandsError, NotFound, Overloaded
from manyhands.weights.v1 import weights_pb2, weights_pb2_grpc
from manyhands.weights_manifest import PIECE_BYTES, RawTensor
from services.weights.servicer import FETCHED_PIECE_BYTES
from tests.support.waiting import wait_until

BIG = np.arange(PIECE_BYTES // 4 + 1000, dtype=np.float32)  # Two pieces.
BFLOAT16 = (common_pb2.DATA_TYPE_BFLOAT16, (2, 2), bytes(range(8)))


@pytest.fixture
def topology(tmp_path: Path) -> Iterator[Topology]:
    with Topology(tmp_path / "logs", environment={"OMP_NUM_THREADS": "1"}) as topology:
        yield topology


def start(topology: Topology, tmp_path: Path, *flags: str, address: str = "127.0.0.1:0") -> str:
    command = ["weights", "--root", str(tmp_path / "weights"), "--address", address, *flags]
    return topology.start("weights", command).address


@pytest.fixture
def address(topology: Topology, tmp_path: Path) -> str:
    return start(topology, tmp_path)


@pytest.fixture
def client(address: str) -> Iterator[WeightsClient]:
    with WeightsClient(address) as client:
        yield client


def publish(client: WeightsClient, step: int, *, model: str = "reach", **tensors: object) -> common_pb2.PolicyVersion:
    content = {"head": np.full(4, step, np.float32), "trunk": BIG, **tensors}
    return client.publish(
        model=model,
        policy_type="flow",
        config_json="{}",
        spec=None,
        tensors=content,  # type: ignore[arg-type]
        publish_id=f"run/{step}",
        metrics={"train/step": step},
    )


def test_what_is_published_is_fetched_bit_for_bit(client: WeightsClient) -> None:
    version = publish(client, 1, empty=np.zeros((0, 3), np.float32), scalar=np.int64(7), half=BFLOAT16, tied=BIG)
    assert (version.model, version.number) == ("reach", 1)
    manifest = client.get_manifest("reach")
    assert (manifest.number, manifest.publish_id, dict(manifest.metrics)) == (1, "run/1", {"train/step": 1.0})
    assert weights_manifest.digest(manifest) == version.digest
    fetched = client.fetch(manifest)
    assert sorted(fetched) == ["empty", "half", "head", "scalar", "tied", "trunk"]
    np.testing.assert_array_equal(fetched["trunk"].array(), BIG)
    np.testing.assert_array_equal(fetched["tied"].array(), BIG)
    assert fetched["empty"].array().shape == (0, 3)
    assert fetched["scalar"].array() == 7
    assert (fetched["half"].dtype, fetched["half"].shape, bytes(fetched["half"].data)) == BFLOAT16


def test_an_unchanged_tensor_is_neither_sent_nor_fetched_again(client: WeightsClient, topology: Topology) -> None:
    publish(client, 1)
    held = {entry.sha256 for entry in client.get_manifest("reach").tensors}
    second = {"head": np.full(4, 2, np.float32), "trunk": BIG}
    by_digest = {weights_manifest.raw_tensor(value).sha256: name for name, value in second.items()}
    assert [by_digest[sha256] for sha256 in client.find_missing(list(by_digest))] == ["head"]
    publish(client, 2)
    assert f"(run/2): 16 new of {16 + BIG.nbytes} bytes" in topology.services["weights"].log_path.read_text()
    assert sorted(client.fetch(client.get_manifest("reach"), have=held)) == ["head"]


def test_a_reader_gets_small_pieces_in_order(address: str, client: WeightsClient) -> None:
    """Each is copied several times while a reader's other threads wait for its interpreter."""
    large = np.arange(PIECE_BYTES // 2 + 200_007, dtype=np.float32)  # Three reads of the file, the last of two pieces.
    publish(client, 1, trunk=large)
    raw = weights_manifest.raw_tensor(large)
    with channel.connect(address) as raw_channel:
        stub = weights_pb2_grpc.WeightsServiceStub(raw_channel)
        got = [response.piece for response in stub.Fetch(weights_pb2.FetchRequest(sha256=[raw.sha256]), timeout=10)]
    assert b"".join(piece.data for piece in got) == bytes(raw.data)
    assert max(len(piece.data) for piece in got) == FETCHED_PIECE_BYTES <= 1024 * 1024
    assert [piece.offset for piece in got] == list(range(0, large.nbytes, FETCHED_PIECE_BYTES))
    assert [piece.last for piece in got] == [False] * (len(got) - 1) + [True]


def test_watch_tells_many_of_old_and_new_versions_and_a_slow_one_harms_nobody(address: str, client: WeightsClient) -> None:
    publish(client, 1)
    with channel.connect(address) as slow_channel:
        # Opened and not read: its versions wait in its own stream.
        slow = weights_pb2_grpc.WeightsServiceStub(slow_channel).Watch(weights_pb2.WatchRequest(model="reach"))
        watches = [client.watch("reach", after_number=after) for after in [0] * 10 + [1]]
        seen: list[list[int]] = [[] for _ in watches]

        def follow(index: int, watch: VersionWatch) -> None:
            for published in watch:
                seen[index].append(published.version.number)
                if published.version.number == 12:
                    return

        threads = [threading.Thread(target=follow, args=item, daemon=True) for item in enumerate(watches)]
        for thread in threads:
            thread.start()
        publish(client, 1, model="drawer")
        for step in range(2, 13):
            publish(client, step)
        for thread in threads:
            thread.join(timeout=10)
        for watch in watches:
            watch.close()
        assert seen == [list(range(1, 13))] * 10 + [list(range(2, 13))]
        assert [next(slow).version.number for _ in range(12)] == list(range(1, 13))
        slow.cancel()


def test_kill_9_loses_no_version_and_watchers_go_on(topology: Topology, tmp_path: Path) -> None:
    address = start(topology, tmp_path)
    with WeightsClient(address, patience_s=20) as client:
        seen: list[PublishedVersion] = []
        watch = client.watch("")
        watcher = threading.Thread(target=lambda: seen.extend(watch), daemon=True)
        watcher.start()
        publish(client, 1)
        publish(client, 1, model="drawer")
        topology.kill("weights")
        start(topology, tmp_path, address=address)
        assert publish(client, 1).number == 1
        assert publish(client, 2).number == 2
        versions = [(item.version.model, item.version.number) for item in client.list_versions()]
        assert versions == [("reach", 1), ("drawer", 1), ("reach", 2)]
        np.testing.assert_array_equal(client.fetch(client.get_manifest("reach", 1))["trunk"].array(), BIG)
        deadline = time.monotonic() + 15
        while len(seen) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        watch.close()
        watcher.join(timeout=5)
        assert [(item.version.model, item.version.number) for item in seen] == versions
        assert 0 <= seen[-1].age_s < 15


def test_kill_9_in_the_middle_of_publishing_keeps_whole_tensors_and_no_version(topology: Topology, tmp_path: Path) -> None:
    address = start(topology, tmp_path)
    tensors = {"first": np.ones(8, np.float32), "second": BIG}
    manifest = manifest_of(tensors)
    first, second = (weights_manifest.raw_tensor(value) for value in tensors.values())
    may_end = threading.Event()

    def half() -> Iterator[weights_pb2.PublishRequest]:
        yield header_of(manifest)
        yield from pieces_of(first)
        yield next(pieces_of(second))
        may_end.wait(20)

    with WeightsClient(address, patience_s=20) as client, channel.connect(address) as raw_channel:
        call = weights_pb2_grpc.WeightsServiceStub(raw_channel).Publish.future(half())
        deadline = time.monotonic() + 10
        while client.find_missing([first.sha256]) and time.monotonic() < deadline:
            time.sleep(0.02)
        topology.kill("weights")
        may_end.set()
        assert call.exception(timeout=10) is not None
        start(topology, tmp_path, address=address)
        assert client.list_versions() == []
        assert client.find_missing([first.sha256, second.sha256]) == [second.sha256]
        assert list((tmp_path / "weights/scratch").iterdir()) == []
        version = client.publish(
            model="reach", policy_type="flow", config_json="{}", spec=None, tensors=tensors, publish_id="run/1"
        )
        assert version.number == 1


def test_reading_a_retired_version_says_so(topology: Topology, tmp_path: Path) -> None:
    with WeightsClient(start(topology, tmp_path, "--keep-versions", "1"), patience_s=1) as client:
        publish(client, 1)
        old = client.get_manifest("reach")
        publish(client, 2)
        with pytest.raises(NotFound, match="reach has no version 1"):
            client.get_manifest("reach", 1)
        assert [item.version.number for item in client.list_versions("reach")] == [2]
        assert sorted(client.fetch(old, have={old.tensors[0].sha256})) == ["trunk"]


def manifest_of(tensors: dict[str, np.ndarray], publish_id: str = "run/1") -> weights_pb2.Manifest:
    return weights_manifest.build(
        model="reach", policy_type="flow", config_json="{}", spec=None, tensors=tensors, publish_id=publish_id
    )


def header_of(manifest: weights_pb2.Manifest) -> weights_pb2.PublishRequest:
    return weights_pb2.PublishRequest(header=weights_pb2.PublishHeader(manifest=manifest))


def pieces_of(raw: RawTensor) -> Iterator[weights_pb2.PublishRequest]:
    return (weights_pb2.PublishRequest(piece=piece) for piece in pieces(raw.sha256, raw.data))


def piece(sha256: bytes, data: bytes, *, offset: int = 0, last: bool = True) -> weights_pb2.PublishRequest:
    return weights_pb2.PublishRequest(piece=weights_pb2.TensorPiece(sha256=sha256, offset=offset, data=data, last=last))


ONES = np.ones(2, np.float32)
ONES_SHA = hashlib.sha256(ONES.tobytes()).digest()
HEADER = header_of(manifest_of({"weight": ONES}))
ABSURD = header_of(manifest_of({"weight": ONES}))
ABSURD.header.manifest.tensors[0].shape[:] = [1 << 40, 1 << 20]
TOO_MANY_BYTES = header_of(manifest_of({"weight": ONES}))
TOO_MANY_BYTES.header.manifest.tensors[0].shape[:] = [1 << 29]


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], "first message of the stream must be the header"),
        ([piece(ONES_SHA, ONES.tobytes())], "first message of the stream must be the header"),
        ([HEADER, HEADER], "only pieces follow the header"),
        ([ABSURD], r"weight\.shape: .*over the limit"),
        ([TOO_MANY_BYTES], "raise --max-version-gib"),
        ([HEADER, piece(bytes(32), b"1")], "the manifest names no such tensor"),
        ([HEADER, piece(b"short", b"1")], r"piece\.sha256: a sha256 has 32 bytes"),
        ([HEADER, piece(ONES_SHA, bytes(8))], f"{ONES_SHA.hex()}: its bytes have the sha256"),
        ([HEADER, piece(ONES_SHA, bytes(9))], f"{ONES_SHA.hex()}: has more than the 8 bytes"),
        ([HEADER, piece(ONES_SHA, b"12", offset=4)], f"{ONES_SHA.hex()}: offset 4 does not follow"),
        ([HEADER, piece(ONES_SHA, ONES.tobytes()[:4], last=False)], "the stream ended after 4 bytes"),
        ([HEADER, piece(ONES_SHA, bytes(PIECE_BYTES + 1))], r"piece\.data: has 4194305 bytes"),
        ([HEADER], "weight: is neither here nor came"),
    ],
)
def test_hostile_streams_are_refused_by_name(
    hostile_address: str, requests: list[weights_pb2.PublishRequest], message: str
) -> None:
    with channel.connect(hostile_address) as raw_channel:
        stub = weights_pb2_grpc.WeightsServiceStub(raw_channel)
        with pytest.raises(ManyhandsError, match=message), channel.translated_errors():
            stub.Publish(iter(requests), timeout=10)
        assert list(stub.ListVersions(weights_pb2.ListVersionsRequest(), timeout=10).versions) == []
        assert list(stub.FindMissing(weights_pb2.FindMissingRequest(sha256=[ONES_SHA]), timeout=10).sha256) == [ONES_SHA]


@pytest.fixture(scope="module")
def hostile_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("hostile")
    with Topology(folder / "logs") as topology:
        yield start(topology, folder, "--max-version-gib", "1")


def test_hostile_reads_are_refused_by_name(hostile_address: str) -> None:
    with WeightsClient(hostile_address, patience_s=0) as client:
        with pytest.raises(InvalidInput, match="a sha256 has 32 bytes, not 12"):
            client.find_missing([b"../../passwd"])
        with pytest.raises(NotFound, match=r"no version of '\.\./\.\.'"):
            client.get_manifest("../..")
        with pytest.raises(InvalidInput, match="must be 0"):
            client.get_manifest("reach", -1)
        with pytest.raises(NotFound, match=f"tensor {ONES_SHA.hex()} is not here"):
            client.fetch(manifest_of({"weight": ONES}))


def test_one_learner_too_many_is_told_to_come_again(topology: Topology, tmp_path: Path) -> None:
    address = start(topology, tmp_path, "--max-publishing", "1")
    tensors = {"first": np.ones(8, np.float32), "second": np.zeros(8, np.float32)}
    first, second = (weights_manifest.raw_tensor(value) for value in tensors.values())
    may_end = threading.Event()

    def waiting() -> Iterator[weights_pb2.PublishRequest]:
        yield header_of(manifest_of(tensors))
        yield from pieces_of(first)
        may_end.wait(20)
        yield from pieces_of(second)

    with channel.connect(address) as raw_channel, WeightsClient(address) as client:
        stub = weights_pb2_grpc.WeightsServiceStub(raw_channel)
        publishing = stub.Publish.future(waiting(), timeout=30)
        wait_until(lambda: not client.find_missing([first.sha256]))
        with pytest.raises(Overloaded) as refused, channel.translated_errors():
            stub.Publish(iter([]), timeout=10)
        assert refused.value.retry_after_s == 1.0
        may_end.set()
        assert publishing.result(timeout=10).version.number == 1


def test_bytes_damaged_on_the_service_s_disk_are_not_handed_out_as_weights(client: WeightsClient, tmp_path: Path) -> None:
    publish(client, 1)
    manifest = client.get_manifest("reach")
    name = next(entry.sha256 for entry in manifest.tensors if entry.name == "head").hex()
    (tmp_path / "weights/objects" / name[:2] / name).write_bytes(bytes(16))
    with pytest.raises(Corrupt, match="head: 16 of 16 bytes came, with sha256"):
        client.fetch(manifest)


def test_an_end_of_the_service_is_quick_and_watchers_are_let_go(topology: Topology, address: str) -> None:
    with channel.connect(address) as raw_channel, WeightsClient(address) as client:
        watch = weights_pb2_grpc.WeightsServiceStub(raw_channel).Watch(weights_pb2.WatchRequest(model="reach"))
        publish(client, 1)
        assert next(watch).version.number == 1
        started = time.monotonic()
        topology.stop("weights")
        assert time.monotonic() - started < 5
        assert topology.services["weights"].process.returncode == 0
        assert list(watch) == [], "the stream ends by itself; a cut one raises"


def test_the_service_answers_health(address: str) -> None:
    with grpc.insecure_channel(address) as raw_channel:
        stub = health_pb2_grpc.HealthStub(raw_channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(service="manyhands.weights.v1.WeightsService"), timeout=5)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
