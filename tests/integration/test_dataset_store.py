"""The store over real sockets: what a recorder, a trainer and a viewer see."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from dataset_store.reader import DatasetReader
from dataset_store.sampler import Sampler
from dataset_store.verify import verify
from dataset_store.view import TrainingView
from manyhands import codec
from manyhands.clients.dataset import DatasetClient, EpisodeDigest, fetch_snapshot
from manyhands.dataset.v1 import dataset_pb2, dataset_pb2_grpc
from manyhands.errors import AlreadyExists, Conflict, Corrupt, InvalidInput, NotFound, OutOfOrder, Refused
from tests.support.store_lab import (
    CAMERAS,
    StoreProcess,
    check_contents,
    episode_uuid,
    lab_frame,
    lab_spec,
    number_in,
    record,
)
from tests.support.waiting import wait_until

SPEC = lab_spec()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreProcess]:
    with StoreProcess(tmp_path_factory.mktemp("store") / "root", "--publish-delay-s", "0.2") as process:
        yield process


@pytest.fixture
def client(store: StoreProcess) -> Iterator[DatasetClient]:
    with store.client() as client:
        yield client


@pytest.fixture(scope="module")
def published(store: StoreProcess) -> dict[int, int]:
    """Episode lengths of dataset "published"."""
    lengths = {1: 30, 2: 7, 3: 1, 4: 45}
    with store.client() as client:
        client.create_dataset("published", SPEC)
        for number, length in lengths.items():
            with client.open_append() as stream:
                assert record(stream, "published", number, length, spec=SPEC) == 0
            if number == 2:
                client.publish("published")  # Two batches: joined videos, and a file that starts a new one.
        info = client.publish("published")
    assert (info.episode_count, info.frame_count, info.sealed_count, info.recording_count) == (4, 83, 0, 0)
    return lengths


def test_what_was_recorded_is_published_right_and_conformant(store: StoreProcess, published: dict[int, int]) -> None:
    check_contents(store.published_root("published"), published)
    report = verify(store.published_root("published"))
    assert report.problems == ()
    assert (report.num_episodes, report.num_frames) == (4, 83)


def test_nothing_of_an_episode_stays_outside_after_publishing(store: StoreProcess, published: dict[int, int]) -> None:
    left = [p for folder in ("ingest", "staging") for p in (store.root / folder / "published").rglob("*") if p.is_file()]
    assert left == []


def test_episodes_publish_by_themselves(client: DatasetClient) -> None:
    client.create_dataset("background", SPEC)
    with client.open_append() as stream:
        record(stream, "background", 1, 5, spec=SPEC)
        assert client.get_dataset("background").sealed_count == 1
    wait_until(lambda: client.get_dataset("background").episode_count == 1, what="the episode to be published")


def test_creating_the_same_again_is_fine_and_a_difference_is_named(client: DatasetClient) -> None:
    first = client.create_dataset("twice", SPEC)
    assert client.create_dataset("twice", SPEC) == first
    with pytest.raises(AlreadyExists, match="observation has 3 features, asked 2"):
        client.create_dataset("twice", lab_spec(1))
    with pytest.raises(AlreadyExists, match="crf=30"):
        client.create_dataset("twice", SPEC, video=dataset_pb2.VideoEncoding(crf=30))
    assert "twice" in [info.definition.name for info in client.list_datasets()]


@pytest.mark.parametrize("name", ["../up", "", "A", "a/b", "a" * 65])
def test_names_that_could_leave_the_folder_are_refused(client: DatasetClient, name: str) -> None:
    with pytest.raises(InvalidInput, match="dataset"):
        client.create_dataset(name, SPEC)


def test_broken_stream_goes_on_where_the_store_says(client: DatasetClient) -> None:
    client.create_dataset("resume", SPEC)
    with client.open_append() as stream:
        assert stream.begin("resume", episode_uuid(1), robot_id="lab", spec_digest=SPEC.digest) == 0
        for k in range(6):
            stream.send(lab_frame(1, k))
        stream.wait_durable(5)
    with client.open_append() as stream:
        assert record(stream, "resume", 1, 9, spec=SPEC) == 6
    with client.open_append() as stream:  # Sealed already: answered at once, with its count.
        assert record(stream, "resume", 1, 9, spec=SPEC) == 9
        assert stream.is_sealed
    info = client.publish("resume")
    assert (info.episode_count, info.frame_count) == (1, 9)
    with client.open_append() as stream:  # Published too.
        assert record(stream, "resume", 1, 9, spec=SPEC) == 9


def test_frames_that_come_twice_are_kept_once(store: StoreProcess, client: DatasetClient) -> None:
    client.create_dataset("doubles", SPEC)
    digest = EpisodeDigest()
    with client.open_append() as stream:
        stream.begin("doubles", episode_uuid(1), robot_id="lab", spec_digest=SPEC.digest)
        for k in range(8):
            digest.add(lab_frame(1, k))
            for again in range(max(0, k - 2), k + 1):
                stream.send(lab_frame(1, again))
        assert stream.end(8, digest.sha256, dataset_pb2.EPISODE_END_FAILURE) == 8
    client.publish("doubles")
    check_contents(store.published_root("doubles"), {1: 8})


def test_hole_ends_the_stream_and_loses_nothing(client: DatasetClient) -> None:
    client.create_dataset("hole", SPEC)
    with client.open_append() as stream:
        stream.begin("hole", episode_uuid(1), robot_id="lab", spec_digest=SPEC.digest)
        stream.send(lab_frame(1, 0))
        stream.send(lab_frame(1, 2))
        with pytest.raises(OutOfOrder, match="frame 2 came, 1 is next"):
            stream.wait_durable(2)
    with client.open_append() as stream:
        assert stream.begin("hole", episode_uuid(1), robot_id="lab", spec_digest=SPEC.digest) == 1


def test_bad_frame_is_named_and_not_kept(client: DatasetClient) -> None:
    client.create_dataset("bad", SPEC)
    nan = lab_frame(1, 1)
    nan.observation[0].tensor.CopyFrom(codec.encode_tensor(np.array([1, np.nan, 0], np.float32)))
    swapped = lab_frame(1, 1)
    del swapped.observation[:]
    swapped.observation.extend([lab_frame(1, 1).observation[i] for i in (0, 2, 1)])
    larger = lab_frame(1, 1)
    larger.observation[1].image.CopyFrom(codec.encode_image(np.zeros((32, 64, 3), np.uint8)))
    unnamed = lab_frame(1, 1)
    unnamed.source = dataset_pb2.ACTION_SOURCE_POLICY
    for frame, message in (
        (nan, "observation.state: element frame is nan"),
        (swapped, "out of order: got observation.state, observation.images.wrist"),
        (larger, "observation.images.top: is 32x64, the spec says 64x64"),
        (unnamed, "frame.version"),
    ):
        with client.open_append() as stream:
            assert stream.begin("bad", episode_uuid(1), robot_id="lab", spec_digest=SPEC.digest) <= 1
            stream.send(lab_frame(1, 0))
            stream.send(frame)
            with pytest.raises(InvalidInput, match=message):
                stream.wait_durable(1)
    with client.open_append() as stream:
        record(stream, "bad", 1, 3, spec=SPEC)
    assert client.publish("bad").frame_count == 3


def test_end_must_agree_with_the_frames(client: DatasetClient) -> None:
    client.create_dataset("ends", SPEC)
    frame = lab_frame(1, 0)
    right = hashlib.sha256(frame.SerializeToString(deterministic=True)).digest()
    success = dataset_pb2.EPISODE_END_SUCCESS
    for count, sha256, reason, error, message in (
        (2, right, success, OutOfOrder, "counts 2 frames, 1 are here"),
        (1, bytes(32), success, Corrupt, "end.sha256"),
        (1, right, dataset_pb2.EPISODE_END_UNSPECIFIED, InvalidInput, "end.reason"),
    ):
        with client.open_append() as stream:
            stream.begin("ends", episode_uuid(1), robot_id="lab", spec_digest=SPEC.digest)
            stream.send(frame)
            with pytest.raises(error, match=message):
                stream.end(count, sha256, reason)
    assert client.get_dataset("ends").sealed_count == 0


def test_discarded_episode_leaves_nothing(store: StoreProcess, client: DatasetClient) -> None:
    client.create_dataset("discards", SPEC)
    with client.open_append() as stream:
        stream.begin("discards", episode_uuid(1), robot_id="lab", spec_digest=SPEC.digest)
        for k in range(10):
            stream.send(lab_frame(1, k))
        stream.wait_durable(9)
        assert client.get_dataset("discards").recording_count == 1
        stream.discard("the gripper slipped")
        record(stream, "discards", 2, 4, spec=SPEC)  # The same stream goes on with the next episode.
        with pytest.raises(Refused, match="sealed and stays"):
            stream.discard("too late")
    info = client.publish("discards")
    assert (info.episode_count, info.frame_count, info.recording_count) == (1, 4, 0)
    check_contents(store.published_root("discards"), {2: 4})


def test_newer_stream_takes_an_episode_over(client: DatasetClient) -> None:
    client.create_dataset("takeover", SPEC)
    with client.open_append() as old, client.open_append() as new:
        old.begin("takeover", episode_uuid(1), robot_id="lab", spec_digest=SPEC.digest)
        old.send(lab_frame(1, 0))
        old.wait_durable(0)
        assert new.begin("takeover", episode_uuid(1), robot_id="lab", spec_digest=SPEC.digest) == 1
        old.send(lab_frame(1, 1))
        with pytest.raises(Conflict, match="another stream"):
            old.wait_durable(1)
        new.send(lab_frame(1, 1))
        new.wait_durable(1)


def test_begin_is_checked(client: DatasetClient) -> None:
    client.create_dataset("begins", SPEC)
    for dataset, uuid, digest, error, message in (
        ("begins", episode_uuid(1), lab_spec(1).digest, InvalidInput, "begin.spec_digest"),
        ("begins", "../../x", SPEC.digest, InvalidInput, "episode_uuid"),
        ("nowhere", episode_uuid(1), SPEC.digest, NotFound, "there is no dataset 'nowhere'"),
    ):
        with client.open_append() as stream, pytest.raises(error, match=message):
            stream.begin(dataset, uuid, robot_id="lab", spec_digest=digest)


def test_episodes_are_listed_with_where_to_play_them(
    store: StoreProcess, client: DatasetClient, published: dict[int, int]
) -> None:
    episodes = list(client.list_episodes("published"))
    assert [e.index for e in episodes] == [0, 1, 2, 3]
    assert [e.frame_count for e in episodes] == list(published.values())
    assert [list(e.tasks) for e in episodes] == [["task 1"], ["task 2"], ["task 0"], ["task 1"]]
    assert {e.robot_id for e in episodes} == {"lab"}
    span = episodes[1].videos[0]
    assert (span.feature, span.from_timestamp_s, span.to_timestamp_s) == (CAMERAS[0], 1.5, 37 / 20)
    assert episodes[1].videos[0].path != episodes[2].videos[0].path
    assert (store.published_root("published") / span.path).exists()
    assert [e.index for e in client.list_episodes("published", from_index=2)] == [2, 3]


def test_pages_continue(store: StoreProcess, published: dict[int, int]) -> None:
    with grpc.insecure_channel(store.address) as channel:
        stub = dataset_pb2_grpc.DatasetServiceStub(channel)
        request = dataset_pb2.ListEpisodesRequest(dataset="published", page_size=3)
        page = stub.ListEpisodes(request, timeout=5)
        assert ([e.index for e in page.episodes], page.next_index) == ([0, 1, 2], 3)
        request.from_index = page.next_index
        page = stub.ListEpisodes(request, timeout=5)
        assert ([e.index for e in page.episodes], page.next_index) == ([3], 0)


def test_snapshot_is_copied_whole_and_only_what_is_new(
    client: DatasetClient, store: StoreProcess, published: dict[int, int], tmp_path: Path
) -> None:
    root = fetch_snapshot(client, "published", tmp_path)
    check_contents(root, published)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "objects").iterdir()}
    assert fetch_snapshot(client, "published", tmp_path) == root
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "objects").iterdir()} == before


def test_interrupted_copy_goes_on_and_damage_is_found(
    client: DatasetClient, published: dict[int, int], tmp_path: Path
) -> None:
    snapshot = client.get_snapshot("published")
    objects = tmp_path / "objects"
    objects.mkdir()
    video, data = (next(f for f in snapshot.files if f.path.endswith(end)) for end in ("000.mp4", "000.parquet"))
    whole = b"".join(client.read_shard("published", video.path))
    (objects / f"{video.sha256.hex()}.part").write_bytes(whole[:1000])
    (objects / f"{data.sha256.hex()}.part").write_bytes(b"x" * 10)
    with pytest.raises(Corrupt, match="has digest"):
        fetch_snapshot(client, "published", tmp_path)
    check_contents(fetch_snapshot(client, "published", tmp_path), published)  # The damaged part was thrown away.


def test_ranges_of_shards_and_nothing_else(client: DatasetClient, store: StoreProcess, published: dict[int, int]) -> None:
    path = client.get_snapshot("published").files[0].path
    content = (store.published_root("published") / path).read_bytes()
    assert b"".join(client.read_shard("published", path)) == content
    assert b"".join(client.read_shard("published", path, offset=10, length=7)) == content[10:17]
    for stranger in ("../../catalogue.sqlite", "/etc/passwd", "meta/../meta/info.json", "meta", ""):
        with pytest.raises(NotFound, match="not in the snapshot"):
            list(client.read_shard("published", stranger))
    with pytest.raises(InvalidInput, match="offset"):
        list(client.read_shard("published", path, offset=len(content) + 1))


def test_unpublished_dataset_has_no_snapshot(client: DatasetClient, tmp_path: Path) -> None:
    client.create_dataset("empty", SPEC)
    with pytest.raises(NotFound, match="nothing of dataset 'empty' is published"):
        fetch_snapshot(client, "empty", tmp_path)


def test_samples_are_the_samplers_and_go_on_anywhere(
    client: DatasetClient, store: StoreProcess, published: dict[int, int]
) -> None:
    reader = DatasetReader(store.published_root("published"))

    def ask(rank: int, position: int, count: int = 0) -> list[dataset_pb2.SampleResponse]:
        request = dataset_pb2.SampleRequest(
            dataset="published", seed=5, epoch=1, position=position, rank=rank, world_size=2, horizon=4, count=count
        )
        request.image_features.append(CAMERAS[1])
        return list(client.sample(request))

    whole = [ask(0, 0), ask(1, 0)]
    seen = sorted((s.episode_index, s.frame_index) for rank in whole for s in rank)
    assert seen == [(e.index, frame) for e in reader.episodes for frame in range(e.num_frames)]
    assert ask(1, 10, 5) == whole[1][10:15]
    expected = Sampler(num_frames=83, seed=5, rank=1, world_size=2).in_epoch(1, 0, 100)
    assert [reader.episodes[s.episode_index].from_index + s.frame_index for s in whole[1]] == expected.tolist()
    for sample in whole[0][:20]:
        state, picture = codec.decode_values(sample.observation).values()
        episode, length = int(state[0]), published[int(state[0])]
        assert state[1] == sample.frame_index
        assert 65535 - number_in(picture.view(np.uint8)) == episode * 256 + sample.frame_index
        steps = np.arange(sample.frame_index, sample.frame_index + 4)
        np.testing.assert_array_equal(codec.decode_tensor(sample.is_pad), steps >= length)
        np.testing.assert_array_equal(codec.decode_tensor(sample.actions)[:, 0], np.minimum(steps, length - 1))
        assert sample.task == f"task {episode % 3}"


def test_training_view_of_a_fetched_copy(client: DatasetClient, published: dict[int, int], tmp_path: Path) -> None:
    root = fetch_snapshot(client, "published", tmp_path)
    view = TrainingView(root, horizon=3, cameras=[CAMERAS[0]], image_size=(32, 32), cache_dir=tmp_path / "view")
    assert view.spec == SPEC
    batch = view.batch(view.sampler(seed=1).batch(0, 83))
    assert sorted(batch.indices) == list(range(83))
    states = batch.observation["observation.state"]
    for row in range(83):
        episode, frame = int(states[row, 0]), int(states[row, 1])
        steps = np.arange(frame, frame + 3)
        assert batch.tasks[row] == f"task {episode % 3}"
        np.testing.assert_array_equal(batch.is_pad[row], steps >= published[episode])
        np.testing.assert_array_equal(batch.actions[row, :, 0], np.minimum(steps, published[episode] - 1))
        picture = np.kron(batch.observation[CAMERAS[0]][row, :, :, 0], np.ones((2, 2), np.uint8))
        assert number_in(np.repeat(picture[:, :, None], 3, axis=2)) == episode * 256 + frame


def test_second_process_on_one_folder_is_refused(store: StoreProcess, published: dict[int, int]) -> None:
    with pytest.raises(AssertionError, match="instead of READY"):
        StoreProcess(store.root).start()


def test_stock_lerobot_opens_it(store: StoreProcess, published: dict[int, int]) -> None:
    """LEROBOT_PYTHON names an interpreter with lerobot (0.4.4 or main); see dataset_store/FORMAT.md."""
    python = os.environ.get("LEROBOT_PYTHON")
    if not python:
        pytest.skip("set LEROBOT_PYTHON to an interpreter that has lerobot installed")
    script = Path(__file__).with_name("read_with_lerobot.py")
    output = subprocess.run(
        [python, str(script), str(store.published_root("published"))], capture_output=True, text=True, timeout=150
    )
    assert output.returncode == 0, output.stderr[-2000:]
    lines = [line.split() for line in output.stdout.splitlines() if line.startswith("FRAME")]
    shown = [(int(a), int(b), int(c), int(d)) for _, a, b, c, d in lines]
    assert shown == [(e * 256 + k, 65535 - (e * 256 + k), e, k) for e, length in published.items() for k in range(length)]
