"""What is on disk after a crash at any byte, and how it becomes episodes that a store can take."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from actor.recorder import Recorder
from actor.spool import EpisodeLog, EpisodeMeta, Spool
from manyhands import errors
from manyhands.common.v1 import common_pb2
from manyhands.dataset.v1 import dataset_pb2
from manyhands.framelog import LogWriter

PLENTY = 10**9


def meta(uuid: str = "11111111-0000-0000-0000-000000000001", *, discard_incomplete: bool = False) -> EpisodeMeta:
    return EpisodeMeta(
        dataset="reach", episode_uuid=uuid, robot_id="left", spec_digest="ab" * 32, discard_incomplete=discard_incomplete
    )


def frame(number: int) -> dataset_pb2.Frame:
    tensor = common_pb2.Tensor(dtype=common_pb2.DATA_TYPE_UINT8, shape=[20], data=bytes([number]) * 20)
    return dataset_pb2.Frame(task="reach", action=[common_pb2.NamedValue(name="action", tensor=tensor)])


def open_spool(root: Path, **changes: int) -> Spool:
    return Spool(root, **{"limit_bytes": PLENTY, "min_free_bytes": 0, **changes})


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    opened = open_spool(tmp_path / "spool")
    yield opened
    opened.close()


def messages(log: EpisodeLog) -> list[dataset_pb2.AppendEpisodeRequest]:
    return [dataset_pb2.AppendEpisodeRequest.FromString(log.read(index)) for index in range(log.record_count)]


def test_a_log_holds_the_very_stream_that_the_store_wants(spool: Spool) -> None:
    log = spool.begin(meta())
    for number in range(3):
        log.append_frame(frame(number))
    log.end(dataset_pb2.EPISODE_END_SUCCESS)
    *frames, end = messages(log)
    assert [message.frame.sequence for message in frames] == [0, 1, 2]
    digest = hashlib.sha256(b"".join(m.frame.SerializeToString(deterministic=True) for m in frames)).digest()
    assert (end.end.frame_count, end.end.sha256, end.end.reason) == (3, digest, dataset_pb2.EPISODE_END_SUCCESS)
    begin = log.meta.begin().begin
    assert (begin.dataset, begin.robot_id, begin.spec_digest) == ("reach", "left", bytes.fromhex("ab" * 32))


def test_a_crash_at_any_byte_leaves_the_whole_frames_as_an_interrupted_episode(tmp_path: Path) -> None:
    first = open_spool(tmp_path / "spool")
    log = first.begin(meta())
    ends = [log.size_bytes]
    for number in range(3):
        log.append_frame(frame(number))
        ends.append(log.size_bytes)
    log.end(dataset_pb2.EPISODE_END_SUCCESS)
    whole = log.path.read_bytes()
    name = log.path.name
    first.close()
    # Every byte of the second frame and its neighbours; of the rest every ninth.
    lengths = {*range(0, len(whole), 9), *range(ends[1] - 2, ends[2] + 2), *ends, len(whole) - 1, len(whole)}
    for length in sorted(lengths):
        root = tmp_path / "crashed"
        root.mkdir()
        (root / name).write_bytes(whole[:length])
        spool = open_spool(root)
        spool.recover()
        found = spool.oldest(timeout_s=0.0)
        if length < ends[0]:
            assert found is None, "not even its name was written"
            assert not list(root.glob("*.log"))
        else:
            assert found is not None
            assert found.ended
            *frames, last = messages(found)
            if length == len(whole):
                assert last.end.reason == dataset_pb2.EPISODE_END_SUCCESS
            elif length < ends[1]:
                assert last.WhichOneof("part") == "discard", "no frame, no episode"
            else:
                assert last.end.reason == dataset_pb2.EPISODE_END_INTERRUPTED
                assert last.end.frame_count == len(frames) == sum(length >= end for end in ends[1:])
                digest = hashlib.sha256(b"".join(m.frame.SerializeToString(deterministic=True) for m in frames)).digest()
                assert last.end.sha256 == digest
        spool.close()
        shutil.rmtree(root)


def test_an_end_that_was_decided_before_the_crash_is_kept(tmp_path: Path) -> None:
    first = open_spool(tmp_path)
    first.begin(meta()).append_frame(frame(0))
    first.close()
    second = open_spool(tmp_path)
    second.recover({meta().episode_uuid: dataset_pb2.EPISODE_END_SUCCESS})
    log = second.oldest(timeout_s=0.0)
    assert log is not None
    assert messages(log)[-1].end.reason == dataset_pb2.EPISODE_END_SUCCESS
    second.close()


def test_an_episode_that_counts_only_as_a_success_is_discarded_after_a_crash(tmp_path: Path) -> None:
    first = open_spool(tmp_path)
    first.begin(meta(discard_incomplete=True)).append_frame(frame(0))
    first.close()
    second = open_spool(tmp_path)
    second.recover()
    log = second.oldest(timeout_s=0.0)
    assert log is not None
    assert messages(log)[-1].WhichOneof("part") == "discard"
    second.close()


def test_order_survives_restarts(tmp_path: Path) -> None:
    uuids = [f"{number:08d}-0000-0000-0000-000000000000" for number in (7, 3, 5)]
    for uuid in uuids:
        spool = open_spool(tmp_path)
        spool.recover()
        spool.begin(meta(uuid)).append_frame(frame(0))
        spool.close()
    spool = open_spool(tmp_path)
    spool.recover()
    seen = []
    while (log := spool.oldest(timeout_s=0.0)) is not None:
        seen.append(log.meta.episode_uuid)
        spool.remove(log)
    assert seen == uuids
    assert not list(tmp_path.glob("*.log"))
    spool.close()


def test_two_actors_never_share_a_spool(spool: Spool) -> None:
    with pytest.raises(errors.Refused, match="a folder of its own"):
        open_spool(spool.root)


def test_a_refused_episode_is_out_of_the_way_with_its_reason_and_can_come_back(tmp_path: Path) -> None:
    spool = open_spool(tmp_path)
    log = spool.begin(meta())
    log.append_frame(frame(0))
    log.end(dataset_pb2.EPISODE_END_SUCCESS)
    place = spool.refuse(log, "observation.state: differs")
    assert spool.oldest(timeout_s=0.0) is None
    assert "observation.state: differs" in place.with_suffix(".reason.txt").read_text()
    spool.close()
    place.rename(tmp_path / place.name)
    again = open_spool(tmp_path)
    again.recover()
    back = again.oldest(timeout_s=0.0)
    assert back is not None
    assert messages(back)[-1].end.frame_count == 1
    again.close()


def test_counts_of_what_the_store_has_not_acknowledged(spool: Spool) -> None:
    log = spool.begin(meta())
    for number in range(5):
        log.append_frame(frame(number))
    log.acked_count = 3
    assert spool.unacked_frame_count == 2


def test_the_recorder_stops_before_the_limit_and_keeps_what_it_has(tmp_path: Path) -> None:
    spool = open_spool(tmp_path, limit_bytes=1000)
    recorder = Recorder(spool)
    recorder.begin(meta())
    for number in range(30):
        recorder.frame(frame(number))
    with pytest.raises(errors.Overloaded, match="--spool-limit-gb"):
        recorder.flush()
    kept = recorder.end(dataset_pb2.EPISODE_END_INTERRUPTED)
    log = spool.oldest(timeout_s=0.0)
    assert log is not None
    assert kept == log.frame_count > 0
    assert messages(log)[-1].end.reason == dataset_pb2.EPISODE_END_INTERRUPTED
    recorder.close()
    spool.close()


def test_frames_on_their_way_when_the_episode_ends_belong_to_it(spool: Spool) -> None:
    recorder = Recorder(spool)
    recorder.begin(meta())
    for number in range(50):
        recorder.frame(frame(number))
    assert recorder.end(dataset_pb2.EPISODE_END_INTERRUPTED) == 50
    recorder.close()


def test_a_disk_without_room_refuses_before_anything_moves(tmp_path: Path) -> None:
    spool = open_spool(tmp_path, min_free_bytes=2**62)
    recorder = Recorder(spool)
    with pytest.raises(errors.Overloaded, match="free some space"):
        recorder.begin(meta())
    recorder.close()
    spool.close()


def test_a_write_that_fails_is_told_and_nothing_is_written_behind_the_hole(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(spool)
    recorder.begin(meta())
    recorder.frame(frame(0))
    recorder.flush()
    append, calls = EpisodeLog.append_frame, iter([True])

    def full_once(self: EpisodeLog, frame: dataset_pb2.Frame) -> int:
        if next(calls, False):
            raise OSError(28, "No space left on device")
        return append(self, frame)

    monkeypatch.setattr(EpisodeLog, "append_frame", full_once)
    recorder.frame(frame(1))
    with contextlib.suppress(errors.Overloaded):  # It may have been told already.
        recorder.frame(frame(2))
    with pytest.raises(errors.Overloaded, match="No space left"):
        recorder.flush()
    with pytest.raises(errors.Overloaded, match="No space left"):
        recorder.frame(frame(3))
    assert recorder.end(dataset_pb2.EPISODE_END_INTERRUPTED) == 1, "the frame before it is kept, none after it"
    recorder.close()


def test_a_log_of_something_else_is_put_aside_and_never_deleted(tmp_path: Path) -> None:
    with LogWriter(tmp_path / "00000001-x.log") as writer:
        writer.append(json.dumps({"unknown": 1}).encode())
    spool = open_spool(tmp_path)
    spool.recover()
    assert spool.oldest(timeout_s=0.0) is None
    assert (spool.refused / "00000001-x.log").stat().st_size > 0
    spool.close()
