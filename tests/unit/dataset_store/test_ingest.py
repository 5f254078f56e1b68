"""The store without sockets: unusual specs, limits, episodes that change hands."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from dataset_store.definition import Definition, VideoSettings
from dataset_store.ingest import AppendSession
from dataset_store.reader import DatasetReader
from dataset_store.store import Store, StoreLimits
from dataset_store.verify import verify
from dataset_store.view import TrainingView
from manyhands import codec
from manyhands.common.v1 import common_pb2
from manyhands.dataset.v1 import dataset_pb2
from manyhands.errors import Conflict, Corrupt, InvalidInput, Overloaded, Refused
from manyhands.spec import Feature, FeatureKind, Spec
from tests.support.store_lab import check_contents, episode_uuid, lab_frame, lab_spec
from tests.unit.dataset_store.test_publishing import DATASET, NEVER, SPEC, ingest, open_store

Request = dataset_pb2.AppendEpisodeRequest


def begin(number: int, spec: Spec = SPEC) -> dataset_pb2.AppendEpisodeRequest:
    return Request(
        begin=dataset_pb2.Begin(dataset=DATASET, episode_uuid=episode_uuid(number), robot_id="lab", spec_digest=spec.digest)
    )


def taken(session: AppendSession, *requests: dataset_pb2.AppendEpisodeRequest) -> list[str | None]:
    responses, error = session.process(requests)
    if error is not None:
        raise error
    return [response.WhichOneof("part") for response in responses]


def test_no_cameras_mixed_dtypes_and_several_actions(tmp_path: Path) -> None:
    spec = Spec(
        observation=(
            Feature(name="observation.state", kind=FeatureKind.STATE, dtype="float64", shape=(1,)),
            Feature(name="observation.contact", kind=FeatureKind.STATE, dtype="bool", shape=(3,)),
        ),
        action=(
            Feature(name="action.arm", kind=FeatureKind.ACTION, dtype="float32", shape=(2,), element_names=("a", "b")),
            Feature(name="action.gripper", kind=FeatureKind.ACTION, dtype="float32", shape=(1,)),
        ),
        control_rate_hz=30.0,
    )
    store = Store(tmp_path, NEVER)
    store.create_dataset(Definition(name=DATASET, spec=spec, video=VideoSettings()))
    version = common_pb2.PolicyVersion(model="flow", number=3, digest=bytes(32))
    frames = []
    for k in range(5):
        frame = dataset_pb2.Frame(
            sequence=k,
            task="pick" if k < 3 else "place",
            observation=codec.encode_values(
                {"observation.state": np.array([k / 3]), "observation.contact": np.array([k % 2 == 0, True, False])}
            ),
            action=codec.encode_values(
                {"action.arm": np.array([k, -k], np.float32), "action.gripper": np.array([k * 10], np.float32)}
            ),
            source=dataset_pb2.ACTION_SOURCE_POLICY if k else dataset_pb2.ACTION_SOURCE_HOLD,
            version=version if k else None,
        )
        if k == 4:
            wanted = {"action.arm": np.array([9, 9], np.float32), "action.gripper": np.array([8], np.float32)}
            frame.proposed_action.extend(codec.encode_values(wanted))
        frames.append(frame)
    sha256 = hashlib.sha256(b"".join(frame.SerializeToString(deterministic=True) for frame in frames)).digest()
    end = dataset_pb2.End(frame_count=5, sha256=sha256, reason=dataset_pb2.EPISODE_END_TIME_LIMIT)
    taken(AppendSession(store), begin(1, spec), *(Request(frame=frame) for frame in frames), Request(end=end))
    store.publish(DATASET)
    store.close()
    root = tmp_path / "datasets" / DATASET
    assert verify(root).problems == ()
    reader = DatasetReader(root)
    assert reader.spec == spec
    np.testing.assert_array_equal(reader.columns["observation.state"], np.arange(5) / 3)
    assert reader.columns["observation.contact"].tolist()[1] == [False, True, False]
    assert reader.columns["x.source"].tolist() == [3, 1, 1, 1, 1]
    assert reader.columns["x.policy_number"].tolist() == [-1, 3, 3, 3, 3]
    assert reader.columns["x.proposed.action.arm"].tolist()[3:] == [[3, -3], [9, 9]]
    assert reader.tasks == ["pick", "place"]
    batch = TrainingView(root, horizon=2).batch(np.array([3, 4]))
    assert batch.actions.tolist() == [[[3, -3, 30], [4, -4, 40]], [[4, -4, 40], [4, -4, 40]]]
    assert batch.is_pad.tolist() == [[False, False], [False, True]]
    assert batch.tasks == ["place", "place"]


def test_stream_that_lost_an_episode_cannot_discard_it(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    old, new = AppendSession(store), AppendSession(store)
    assert taken(old, begin(1), Request(frame=lab_frame(1, 0))) == ["resume", "ack"]
    assert taken(new, begin(1)) == ["resume"]
    with pytest.raises(Conflict):
        taken(old, Request(discard=dataset_pb2.Discard(reason="mine")))
    old.close()
    assert taken(new, Request(frame=lab_frame(1, 1))) == ["ack"]
    store.close()


def test_idle_episodes_make_room_and_go_on_from_their_log(tmp_path: Path) -> None:
    store = Store(tmp_path, StoreLimits(publish_delay_s=1e9, min_free_mib=0, max_live_episodes=2))
    store.create_dataset(Definition(name=DATASET, spec=SPEC, video=VideoSettings()))
    sessions = [AppendSession(store) for _ in range(3)]
    for number, session in enumerate(sessions[:2]):
        taken(session, begin(number), Request(frame=lab_frame(number, 0)))
    with pytest.raises(Overloaded, match="2 episodes are being recorded"):
        taken(sessions[2], begin(2))
    sessions[0].close()  # Its robot went away: its log stays, its place does not.
    taken(sessions[2], begin(2))
    sessions[1].close()
    responses, error = AppendSession(store).process([begin(0)])
    assert error is None
    assert responses[0].resume.next_sequence == 1
    store.close()


def test_limits_are_refused_before_anything_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path, StoreLimits(publish_delay_s=1e9, min_free_mib=0, max_episode_frames=2))
    store.create_dataset(Definition(name=DATASET, spec=SPEC, video=VideoSettings()))
    session = AppendSession(store)
    taken(session, begin(1), Request(frame=lab_frame(1, 0)), Request(frame=lab_frame(1, 1)))
    with pytest.raises(InvalidInput, match="limit of 2 frames"):
        taken(session, Request(frame=lab_frame(1, 2)))
    huge = lab_frame(2, 0)
    huge.observation[1].image.data = bytes(200_000)
    with pytest.raises(InvalidInput, match="bytes are over this dataset's"):
        taken(AppendSession(store), begin(2), Request(frame=huge))
    with pytest.raises(InvalidInput, match=r"frame\.task"):
        taken(AppendSession(store), begin(2), Request(frame=lab_frame(2, 0, task="x" * 5000)))
    with pytest.raises(Refused, match="frame came before Begin"):
        taken(AppendSession(store), Request(frame=lab_frame(1, 0)))
    store.close()
    full = Store(tmp_path, StoreLimits(publish_delay_s=1e9, min_free_mib=10**9))
    with pytest.raises(Overloaded, match="--min-free-mib") as refusal:
        taken(AppendSession(full), begin(3))
    assert refusal.value.retry_after_s
    full.close()


def test_one_uuid_is_one_robots(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    taken(AppendSession(store), begin(1), Request(frame=lab_frame(1, 0)))
    other = begin(1)
    other.begin.robot_id = "another"
    with pytest.raises(InvalidInput, match="in use by robot 'lab'"):
        taken(AppendSession(store), other)
    store.close()
    store = open_store(tmp_path)
    with pytest.raises(InvalidInput, match="begun by robot 'lab'"):
        taken(AppendSession(store), other)
    store.close()


def test_log_with_bit_rot_is_never_published_short(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    ingest(store, 1, 6)
    ingest(store, 2, 3)
    log = tmp_path / "ingest" / DATASET / f"{episode_uuid(1)}.log"
    content = bytearray(log.read_bytes())
    content[len(content) // 2] ^= 1
    log.write_bytes(content)
    with pytest.raises(Corrupt, match="6 were sealed"):
        store.publish(DATASET)
    info = store.info(DATASET)
    assert (info.sealed_count, info.episode_count) == (1, 1)
    store.close()
    check_contents(tmp_path / "datasets" / DATASET, {2: 3})  # The others do not wait for it.


@pytest.mark.parametrize(
    ("spec", "video", "message"),
    [
        (lab_spec(0), dataset_pb2.VideoEncoding(codec="mpeg2"), "codec 'mpeg2' is not offered"),
        (lab_spec(0), dataset_pb2.VideoEncoding(crf=99), "crf"),
        (lab_spec(0), dataset_pb2.VideoEncoding(preset="fastest"), "preset 'fastest'"),
        (lab_spec(0), dataset_pb2.VideoEncoding(keyframe_interval=-1), "keyframe_interval"),
        (
            Spec(
                observation=(Feature(name="cam", kind=FeatureKind.IMAGE, dtype="uint8", shape=(63, 64, 3)),),
                action=lab_spec().action,
                control_rate_hz=20.0,
            ),
            None,
            "even height and width",
        ),
        (Spec(observation=(), action=lab_spec().action, control_rate_hz=12.5), None, "whole number"),
        (
            Spec(
                observation=(Feature(name="index", kind=FeatureKind.STATE, dtype="float32", shape=(1,)),),
                action=lab_spec().action,
                control_rate_hz=20.0,
            ),
            None,
            "rename the feature",
        ),
    ],
)
def test_definitions_that_cannot_be_stored(spec: Spec, video: dataset_pb2.VideoEncoding | None, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Definition.from_proto(dataset_pb2.DatasetDefinition(name="x", spec=spec.to_proto(), video=video))
