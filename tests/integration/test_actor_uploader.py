"""From spool to store over a real socket that breaks wherever it can."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from actor.recorder import Recorder
from actor.spool import EpisodeMeta, Spool
from actor.uploader import Uploader
from manyhands import errors
from manyhands.clients.dataset import DatasetClient
from manyhands.dataset.v1 import dataset_pb2, dataset_pb2_grpc
from tests.support.actor_peers import MemoryStore, Server, abort
from tests.support.waiting import wait_until

UUIDS = [f"{number:08d}-0000-4000-8000-000000000000" for number in range(3)]
FRAMES = 4


class BreakingStore(MemoryStore):
    """Cuts one stream after cut_after messages, before or after it answered the last of them; refuses some episodes."""

    def __init__(self) -> None:
        super().__init__()
        self.cut_after = -1
        self.cut_before_answer = False
        self.refuse_uuid = ""
        self.streams = 0

    def AppendEpisode(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        self.streams += 1

        def watched() -> Iterator[Any]:
            for request in requests:
                if request.WhichOneof("part") == "begin" and request.begin.episode_uuid == self.refuse_uuid:
                    abort(context, errors.InvalidInput("spec_digest is not the dataset's", field="spec_digest"))
                yield request

        for count, answer in enumerate(super().AppendEpisode(watched(), context), start=1):
            if count == self.cut_after and self.cut_before_answer:
                self.cut_after = -1
                abort(context, errors.Unreachable("cut"))
            yield answer
            if count == self.cut_after:
                self.cut_after = -1
                abort(context, errors.Unreachable("cut"))


@pytest.fixture
def store() -> Iterator[tuple[Server, BreakingStore]]:
    servicer = BreakingStore()
    server = Server(dataset_pb2_grpc.add_DatasetServiceServicer_to_server, servicer)
    yield server, servicer
    server.stop()


def record(spool: Spool) -> None:
    recorder = Recorder(spool)
    for uuid in UUIDS:
        recorder.begin(
            EpisodeMeta(dataset="d", episode_uuid=uuid, robot_id="r", spec_digest="ab" * 32, discard_incomplete=False)
        )
        for number in range(FRAMES):
            recorder.frame(dataset_pb2.Frame(task=f"{uuid} {number}"))
        recorder.end(dataset_pb2.EPISODE_END_SUCCESS)
    recorder.close()


@pytest.mark.parametrize("cut_before_answer", [False, True])
def test_a_stream_that_breaks_after_any_message_costs_and_repeats_nothing(
    tmp_path: Path, store: tuple[Server, BreakingStore], cut_before_answer: bool
) -> None:
    server, servicer = store
    num_answers = len(UUIDS) * (FRAMES + 2)  # Resume, acks, Sealed.
    for cut_after in range(1, num_answers + 1):
        servicer.episodes.clear()
        servicer.seals.clear()
        servicer.cut_after, servicer.cut_before_answer, servicer.streams = cut_after, cut_before_answer, 0
        spool = Spool(tmp_path / str(cut_after), limit_bytes=10**9, min_free_bytes=0)
        record(spool)
        uploader = Uploader(spool, DatasetClient(server.address), on_change=lambda: None)
        uploader.start()
        assert spool.wait_until_empty(10.0), uploader.detail
        uploader.close()
        spool.close()
        assert servicer.problems == []
        assert servicer.seals == UUIDS
        for uuid in UUIDS:
            tasks = [frame.task for frame in servicer.episodes[uuid].frames]
            assert tasks == [f"{uuid} {number}" for number in range(FRAMES)]
        if cut_after < num_answers:
            assert servicer.streams == 2, "the cut was where it was meant to be"


def test_an_episode_that_the_store_never_takes_does_not_hold_up_the_others(
    tmp_path: Path, store: tuple[Server, BreakingStore]
) -> None:
    server, servicer = store
    servicer.refuse_uuid = UUIDS[1]
    spool = Spool(tmp_path, limit_bytes=10**9, min_free_bytes=0)
    record(spool)
    details: list[str] = []
    uploader = Uploader(spool, DatasetClient(server.address), on_change=lambda: details.append(uploader.detail))
    uploader.start()
    assert spool.wait_until_empty(10.0)
    wait_until(lambda: servicer.seals == [UUIDS[0], UUIDS[2]])
    uploader.close()
    kept = list((tmp_path / "refused").glob("*.log"))
    assert len(kept) == 1
    assert UUIDS[1] in kept[0].name
    assert "spec_digest is not the dataset's" in kept[0].with_suffix(".reason.txt").read_text()
    assert any(UUIDS[1] in detail and str(kept[0]) in detail for detail in details)
    spool.close()
