"""The store is killed with -9 while several recorders write: what was acknowledged is there, once, and right."""

from __future__ import annotations

import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dataset_store.verify import verify
from manyhands.clients.dataset import AppendStream, DatasetClient, EpisodeDigest
from manyhands.dataset.v1 import dataset_pb2
from manyhands.errors import Overloaded, TooLate, Unreachable
from tests.support.store_lab import StoreProcess, check_contents, episode_uuid, lab_frame, lab_spec, record
from tests.support.waiting import wait_until

SPEC = lab_spec()
DATASET = "killed"


class Recorder(threading.Thread):
    """Records episodes one after the other, whatever happens to the store, as an actor with a spool does.

    It notes every acknowledgement, and forgets no frame before.
    """

    def __init__(self, number: int, address: str, stopping: threading.Event) -> None:
        super().__init__(name=f"recorder-{number}", daemon=True)
        self.sealed: dict[int, int] = {}
        self.lost: list[str] = []
        self.num_broken_streams = 0
        self.error: Exception | None = None
        self._number = number
        self._address = address
        self._stopping = stopping

    def run(self) -> None:
        try:
            episode = self._number * 60
            with DatasetClient(self._address) as client:
                while not self._stopping.is_set():
                    length = random.Random(episode).randint(5, 40)
                    self._record(client, episode, length)
                    self.sealed[episode] = length
                    episode += 1
        except Exception as error:
            self.error = error

    def _record(self, client: DatasetClient, episode: int, length: int) -> None:
        durable = -1
        while True:
            stream = client.open_append()
            try:
                start = stream.begin(DATASET, episode_uuid(episode), robot_id="lab", spec_digest=SPEC.digest, timeout_s=20)
                if start <= durable:
                    self.lost.append(f"episode {episode}: {durable} was acknowledged, the store wants {start}")
                if stream.is_sealed:
                    return
                digest = EpisodeDigest()
                for sequence in range(length):
                    frame = lab_frame(episode, sequence)
                    digest.add(frame)
                    if sequence >= start:
                        stream.send(frame)
                        time.sleep(0.002)
                    durable = max(durable, stream.durable_sequence)
                stream.end(digest.frame_count, digest.sha256, dataset_pb2.EPISODE_END_SUCCESS)
                return
            except (Unreachable, TooLate):
                durable = max(durable, stream.durable_sequence)
                self.num_broken_streams += 1
                time.sleep(0.05)
            finally:
                stream.close()


def test_kill_at_random_moments_loses_and_doubles_nothing(tmp_path: Path) -> None:
    chance = random.Random(20261122)
    stopping = threading.Event()
    with StoreProcess(tmp_path / "store", "--publish-delay-s", "0.1") as store:
        with store.client() as client:
            client.create_dataset(DATASET, SPEC)
        recorders = [Recorder(number, store.address, stopping) for number in range(3)]
        for recorder in recorders:
            recorder.start()
        for _ in range(8):
            time.sleep(chance.uniform(0.1, 1.5))  # The moment of the kill is what is varied here.
            store.kill()
            store.start()
        stopping.set()
        for recorder in recorders:
            recorder.join(timeout=60)
            assert recorder.error is None
            assert recorder.lost == []
        sealed = {episode: length for recorder in recorders for episode, length in recorder.sealed.items()}
        assert sum(recorder.num_broken_streams for recorder in recorders) >= 8, "the kills hit nobody"
        assert len(sealed) >= 20
        with store.client() as client:
            info = client.publish(DATASET)
        assert (info.episode_count, info.frame_count) == (len(sealed), sum(sealed.values()))
        assert (info.sealed_count, info.recording_count) == (0, 0)
        check_contents(store.published_root(DATASET), sealed)
        report = verify(store.published_root(DATASET))
        assert report.problems == ()
        assert report.notes == ()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 6 MiB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("mounting a tmpfs needs root; the file size limit test covers the store's side")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk_refuses_clearly_and_goes_on_when_there_is_space(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    with StoreProcess(small_disk / "store", "--publish-delay-s", "600") as store, store.client() as client:
        client.create_dataset(DATASET, SPEC)
        with client.open_append() as stream:
            record(stream, DATASET, 1, 40, spec=SPEC)
        ballast.write_bytes(bytes(psutil.disk_usage(str(small_disk)).free - 300_000))
        acknowledged = fill(client, episode=2, num_frames=2000)
        assert 5 < acknowledged < 1999
        assert fill(client, episode=2, num_frames=2000) == acknowledged, "still full, and still there"
        ballast.unlink()
        with client.open_append() as stream:
            assert record(stream, DATASET, 2, acknowledged + 20, spec=SPEC) > acknowledged
        client.publish(DATASET)
        check_contents(store.published_root(DATASET), {1: 40, 2: acknowledged + 20})
        assert verify(store.published_root(DATASET)).problems == ()


def test_limited_file_size_is_an_error_that_passes(tmp_path: Path) -> None:
    with StoreProcess(tmp_path / "store", "--publish-delay-s", "600") as store, store.client() as client:
        client.create_dataset(DATASET, SPEC)
        process = psutil.Process(store.pid)
        unlimited = process.rlimit(psutil.RLIMIT_FSIZE)
        process.rlimit(psutil.RLIMIT_FSIZE, (400_000, unlimited[1]))
        acknowledged = fill(client, episode=1, num_frames=2000)
        assert 5 < acknowledged < 1999
        process.rlimit(psutil.RLIMIT_FSIZE, unlimited)
        with client.open_append() as stream:
            assert record(stream, DATASET, 1, acknowledged + 20, spec=SPEC) > acknowledged
        client.publish(DATASET)
        check_contents(store.published_root(DATASET), {1: acknowledged + 20})


def fill(client: DatasetClient, *, episode: int, num_frames: int) -> int:
    """Records until the store refuses; returns the last acknowledged sequence."""
    with client.open_append() as stream:
        start = stream.begin(DATASET, episode_uuid(episode), robot_id="lab", spec_digest=SPEC.digest)
        with pytest.raises(Overloaded, match="disk is full") as refusal:
            _send(stream, episode, range(start, num_frames))
        assert refusal.value.retry_after_s
        return stream.durable_sequence


def _send(stream: AppendStream, episode: int, sequences: range) -> None:
    for sequence in sequences:
        stream.send(lab_frame(episode, sequence))
    stream.wait_durable(sequences[-1])


def test_publishing_waits_for_space(small_disk: Path) -> None:
    with StoreProcess(small_disk / "store", "--publish-delay-s", "0.1") as store, store.client() as client:
        client.create_dataset(DATASET, SPEC)
        with client.open_append() as stream:
            stream.begin(DATASET, episode_uuid(1), robot_id="lab", spec_digest=SPEC.digest)
            digest = EpisodeDigest()
            for sequence in range(60):
                frame = lab_frame(1, sequence)
                digest.add(frame)
                stream.send(frame)
            stream.wait_durable(59)
            ballast = small_disk / "ballast"
            # Enough for the catalogue, which is small and written first, not for videos and parquet.
            ballast.write_bytes(bytes(psutil.disk_usage(str(small_disk)).free - 60_000))
            stream.end(digest.frame_count, digest.sha256, dataset_pb2.EPISODE_END_SUCCESS)
        with pytest.raises(Overloaded, match="disk is full"):
            client.publish(DATASET, timeout_s=20)
        assert client.get_dataset(DATASET).sealed_count == 1
        ballast.unlink()
        wait_until(lambda: client.get_dataset(DATASET).episode_count == 1, what="the episode to be published by itself")
        check_contents(store.published_root(DATASET), {1: 60})
