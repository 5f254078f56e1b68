"""Publishing in one process: killed at every step, limits of a batch, what a live reader sees."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dataset_store.definition import Definition, VideoSettings
from dataset_store.ingest import AppendSession
from dataset_store.reader import DatasetReader
from dataset_store.store import Store, StoreLimits
from dataset_store.verify import verify
from dataset_store.video import Pixels, VideoWriter
from manyhands.dataset.v1 import dataset_pb2
from manyhands.errors import Cancelled
from tests.support.store_lab import check_contents, episode_uuid, lab_frame, lab_spec, number_in

SPEC = lab_spec()
NEVER = StoreLimits(publish_delay_s=1e9, min_free_mib=0)
DATASET = "steps"
# Two videos, episodes, data, tasks, statistics, info.
RENAMES_OF_A_BATCH = 7


class Killed(BaseException):
    """Stands for the end of the process: nothing of ours catches it."""


def ingest(store: Store, episode: int, num_frames: int) -> None:
    session = AppendSession(store)
    frames = [lab_frame(episode, sequence) for sequence in range(num_frames)]
    sha256 = hashlib.sha256(b"".join(frame.SerializeToString(deterministic=True) for frame in frames)).digest()
    begin = dataset_pb2.Begin(dataset=DATASET, episode_uuid=episode_uuid(episode), robot_id="lab", spec_digest=SPEC.digest)
    end = dataset_pb2.End(frame_count=num_frames, sha256=sha256, reason=dataset_pb2.EPISODE_END_SUCCESS)
    request = dataset_pb2.AppendEpisodeRequest
    responses, error = session.process([request(begin=begin), *(request(frame=frame) for frame in frames), request(end=end)])
    assert error is None
    assert [response.WhichOneof("part") for response in responses] == ["resume", "ack", "sealed"]


def open_store(root: Path) -> Store:
    store = Store(root, NEVER)
    store.create_dataset(Definition(name=DATASET, spec=SPEC, video=VideoSettings()))
    return store


def files_of(root: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(root)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.suffix in (".mp4", ".parquet") and path.name != "tasks.parquet"
    }


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", range(RENAMES_OF_A_BATCH))
def test_killed_at_any_rename_and_finished_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, when: str
) -> None:
    store = open_store(tmp_path)
    root = store.published_root(DATASET)
    ingest(store, 1, 6)
    store.publish(DATASET)
    ingest(store, 2, 5)
    ingest(store, 3, 1)
    for episode in (2, 3):  # Encoding renames too; it is over before the counting starts.
        store._wait_encoded(DATASET, store.catalogue.find(DATASET, episode_uuid(episode)))  # type: ignore[arg-type]
    real_rename = Path.rename
    count = iter(range(1000))

    def rename(path: Path, target: Path) -> Path:
        dies = next(count) == step
        if dies and when == "before":
            raise Killed
        renamed = real_rename(path, target)
        if dies:
            raise Killed
        return renamed

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(Killed):
        store.publish(DATASET)
    monkeypatch.undo()
    store.close()
    is_visible = step == RENAMES_OF_A_BATCH - 1 and when == "after"
    check_contents(root, {1: 6, 2: 5, 3: 1} if is_visible else {1: 6})
    assert verify(root).problems == ()
    before = files_of(root)

    store = open_store(tmp_path)
    ingest(store, 4, 3)
    store.publish(DATASET)
    store.close()
    check_contents(root, {1: 6, 2: 5, 3: 1, 4: 3})
    assert verify(root).problems == ()
    after = files_of(root)
    assert {path: after[path] for path in before} == before, "a published path was written again"
    order = [episode.uuid for episode in DatasetReader(root).episodes]
    assert order == [episode_uuid(number) for number in (1, 2, 3, 4)]


def test_killed_before_the_catalogue_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    ingest(store, 1, 6)

    def die(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(store.catalogue, "mark_published", die)
    with pytest.raises(Killed):
        store.publish(DATASET)
    store.close()
    root = tmp_path / "datasets" / DATASET
    before = files_of(root)
    store = open_store(tmp_path)
    info = store.publish(DATASET)
    store.close()
    assert (info.episode_count, info.sealed_count, info.recording_count) == (1, 0, 0)
    assert files_of(root) == before


def test_statistics_do_not_depend_on_how_it_was_published(tmp_path: Path) -> None:
    def statistics(root: Path, publish_after: Callable[[int], bool], *, reopen: bool) -> dict[str, dict[str, list[float]]]:
        store = open_store(root)
        for episode in (1, 2, 3):
            ingest(store, episode, 5 + episode)
            if publish_after(episode):
                store.publish(DATASET)
                if reopen:
                    store.close()
                    store = open_store(root)
        store.publish(DATASET)
        store.close()
        content = DatasetReader(root / "datasets" / DATASET).statistics
        return {name: {key: value.round(9).tolist() for key, value in entry.items()} for name, entry in content.items()}

    at_once = statistics(tmp_path / "once", lambda _: False, reopen=False)
    assert statistics(tmp_path / "each", lambda _: True, reopen=False) == at_once
    assert statistics(tmp_path / "reopened", lambda _: True, reopen=True) == at_once


def test_encoding_lost_in_a_restart_is_made_from_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    monkeypatch.setattr(store._pool, "submit", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        ingest(store, 1, 9)
    monkeypatch.undo()
    store.close()
    store = open_store(tmp_path)
    ingest(store, 1, 9)
    store.publish(DATASET)
    store.close()
    check_contents(tmp_path / "datasets" / DATASET, {1: 9})


def test_closing_does_not_wait_for_the_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write = VideoWriter.write

    def slow(writer: VideoWriter, pixels: Pixels) -> None:
        time.sleep(0.05)  # 20 s for this episode.
        real_write(writer, pixels)

    monkeypatch.setattr(VideoWriter, "write", slow)
    store = open_store(tmp_path)
    ingest(store, 1, 200)
    with ThreadPoolExecutor(1) as pool:
        publishing = pool.submit(store.publish, DATASET)
        began = time.monotonic()
        store.interrupt()
        with pytest.raises(Cancelled, match="store is closing"):
            publishing.result(timeout=10)
        store.close()
    assert time.monotonic() - began < 5.0
    monkeypatch.undo()
    store = open_store(tmp_path)
    store.publish(DATASET)
    store.close()
    check_contents(tmp_path / "datasets" / DATASET, {1: 200})


def test_large_batches_are_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    for episode in range(5):
        ingest(store, episode, 4)
    monkeypatch.setattr("dataset_store.publisher._MAX_BATCH_EPISODES", 2)
    store.publish(DATASET)
    store.close()
    root = tmp_path / "datasets" / DATASET
    assert [episode.videos["observation.images.top"].path[-12:] for episode in DatasetReader(root).episodes] == [
        f"file-{number:03d}.mp4" for number in (0, 0, 1, 1, 2)
    ]
    check_contents(root, dict.fromkeys(range(5), 4))
    assert verify(root).problems == ()


@pytest.mark.parametrize("codec", ["h264", "libsvtav1"])
@pytest.mark.parametrize("keyframe_interval", [1, 15])
def test_any_encoding_can_be_joined_and_read_at_random(tmp_path: Path, codec: str, keyframe_interval: int) -> None:
    store = Store(tmp_path, NEVER)
    video = VideoSettings(
        codec=codec, crf=30, preset={"h264": "veryfast", "libsvtav1": "12"}[codec], keyframe_interval=keyframe_interval
    )
    store.create_dataset(Definition(name=DATASET, spec=SPEC, video=video))
    lengths = {1: 9, 2: 1, 3: 20}
    for episode, length in lengths.items():
        ingest(store, episode, length)
    store.publish(DATASET)
    store.close()
    root = tmp_path / "datasets" / DATASET
    assert verify(root).problems == ()
    check_contents(root, lengths)
    reader = DatasetReader(root)
    for episode, frame in ((2, 19), (0, 3), (2, 5), (1, 0), (2, 18), (0, 8)):
        shown = number_in(next(reader.pictures("observation.images.top", episode, [frame])))
        assert shown == (episode + 1) * 256 + frame


def test_reader_that_is_open_keeps_what_it_saw(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    ingest(store, 1, 6)
    store.publish(DATASET)
    reader = DatasetReader(store.published_root(DATASET))
    first = [pixels.copy() for pixels in reader.pictures("observation.images.top", 0)]
    ingest(store, 2, 6)
    store.publish(DATASET)
    store.close()
    assert (reader.num_episodes, reader.num_frames) == (1, 6)
    for before, now in zip(first, reader.pictures("observation.images.top", 0), strict=True):
        assert (before == now).all()
