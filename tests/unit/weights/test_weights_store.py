"""Versions on disk: whole or not there, numbered for ever, and no tensor kept that nobody names."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from manyhands import weights_manifest
from manyhands.common.v1 import common_pb2
from manyhands.errors import AlreadyExists, Conflict, InvalidInput, NotFound, Overloaded, Refused
from manyhands.weights.v1 import weights_pb2
from services.weights.store import StoredVersion, WeightsStore

Tensors = Mapping[str, np.ndarray]


def tensors(step: int) -> Tensors:
    return {"head": np.full(4, step, np.float32), "trunk": np.arange(10, dtype=np.float32)}


def manifest_of(content: Tensors, publish_id: str, model: str = "reach") -> weights_pb2.Manifest:
    return weights_manifest.build(
        model=model, policy_type="flow", config_json="{}", spec=None, tensors=content, publish_id=publish_id
    )


def add_tensor(store: WeightsStore, value: np.ndarray) -> bytes:
    raw = weights_manifest.raw_tensor(value)
    with store.writer(raw.sha256, len(bytes(raw.data))) as writer:
        writer.write(0, bytes(raw.data))
        writer.finish()
    return raw.sha256


def publish(
    store: WeightsStore, content: Tensors, publish_id: str, *, model: str = "reach", parent_number: int | None = None
) -> int:
    manifest = manifest_of(content, publish_id, model)
    for name in content:
        add_tensor(store, content[name])
    published = store.publish(manifest, parent_number=parent_number)
    version = published.version if isinstance(published, StoredVersion) else published
    return version.number


def objects_in(root: Path) -> set[str]:
    return {path.name for path in (root / "objects").glob("??/*")}


@pytest.fixture
def reopen(tmp_path: Path) -> Callable[..., WeightsStore]:
    opened: list[WeightsStore] = []

    def reopen(**options: object) -> WeightsStore:
        while opened:
            opened.pop().close()
        opened.append(WeightsStore(tmp_path, **options))  # type: ignore[arg-type]
        return opened[-1]

    return reopen


def test_numbers_count_up_per_model_and_survive_a_restart(reopen: Callable[..., WeightsStore]) -> None:
    store = reopen()
    assert [publish(store, tensors(step), f"run/{step}") for step in (1, 2)] == [1, 2]
    assert publish(store, tensors(1), "run/1", model="drawer") == 1
    store = reopen()
    assert publish(store, tensors(3), "run/3") == 3
    assert [(v.version.model, v.version.number) for v in store.versions()] == [
        ("reach", 1), ("reach", 2), ("drawer", 1), ("reach", 3),
    ]  # fmt: skip
    assert store.get("reach", 0).version.number == 3
    assert store.get("reach", 2).manifest.tensors[0].sha256 == weights_manifest.raw_tensor(tensors(2)["head"]).sha256


def test_publishing_again_answers_the_same_version_also_after_a_restart(reopen: Callable[..., WeightsStore]) -> None:
    store = reopen()
    publish(store, tensors(1), "run/1")
    assert publish(store, tensors(1), "run/1") == 1
    store = reopen()
    assert publish(store, tensors(1), "run/1") == 1
    assert len(store.versions()) == 1
    with pytest.raises(AlreadyExists, match="'run/1' is version 1 of reach"):
        publish(store, tensors(2), "run/1")


def test_a_version_needs_every_tensor(reopen: Callable[..., WeightsStore]) -> None:
    store = reopen()
    add_tensor(store, tensors(1)["trunk"])
    manifest = manifest_of(tensors(1), "run/1")
    assert store.missing([entry.sha256 for entry in manifest.tensors]) == [manifest.tensors[0].sha256]
    with pytest.raises(Refused, match="head: is neither here"):
        store.publish(manifest, parent_number=None)
    assert store.versions() == []
    with pytest.raises(NotFound, match="models with versions: none yet"):
        store.get("reach", 0)


def test_a_tensor_under_a_wrong_shape_is_refused(reopen: Callable[..., WeightsStore]) -> None:
    store = reopen()
    publish(store, tensors(1), "run/1")
    lying = manifest_of(tensors(1), "run/2")
    lying.tensors[0].shape[:] = [400]
    with pytest.raises(InvalidInput, match="head: needs 1600 bytes, the tensor of this sha256 has 16"):
        store.publish(lying, parent_number=None)


def test_parent_must_be_the_newest_when_asked_for(reopen: Callable[..., WeightsStore]) -> None:
    store = reopen()
    assert publish(store, tensors(1), "run/1", parent_number=0) == 1
    with pytest.raises(Conflict, match="parent_number 0 is not the newest version of reach, 1"):
        publish(store, tensors(2), "run/2", parent_number=0)
    assert publish(store, tensors(2), "run/2", parent_number=1) == 2


@pytest.mark.parametrize(
    ("writes", "message"),
    [
        ([(0, b"12345")], "more than the 4 bytes"),
        ([(0, b"12"), (3, b"4")], "offset 3 does not follow; 2 bytes came"),
        ([(0, b"12")], "ended after 2 of 4 bytes"),
        ([(0, b"1234")], "its bytes have the sha256"),
    ],
)
def test_bytes_that_are_not_the_tensor_leave_nothing(
    reopen: Callable[..., WeightsStore], tmp_path: Path, writes: list[tuple[int, bytes]], message: str
) -> None:
    store = reopen()

    def send() -> None:
        with store.writer(bytes(32), 4) as writer:
            for offset, data in writes:
                writer.write(offset, data)
            writer.finish()

    with pytest.raises(InvalidInput, match=message):
        send()
    assert objects_in(tmp_path) == set()
    assert list((tmp_path / "scratch").iterdir()) == []


def test_retention_keeps_the_newest_and_collects_what_only_old_ones_named(
    reopen: Callable[..., WeightsStore], tmp_path: Path
) -> None:
    now_s = 1_000_000.0
    store = reopen(keep_versions=2, wall_clock_s=lambda: now_s)
    for step in (1, 2, 3):
        publish(store, tensors(step), f"run/{step}")
        now_s += 120.0
        store.retire()
    kept = {weights_manifest.raw_tensor(tensors(step)["head"]).sha256.hex() for step in (2, 3)}
    trunk = weights_manifest.raw_tensor(tensors(1)["trunk"]).sha256.hex()
    assert objects_in(tmp_path) == kept | {trunk}
    assert [v.version.number for v in store.versions()] == [2, 3]
    with pytest.raises(NotFound, match="reach has no version 1; it has 2 to 3"):
        store.get("reach", 1)
    # Numbers and publish_ids of what is gone are never given again.
    store = reopen(keep_versions=2)
    assert publish(store, tensors(1), "run/1") == 1
    assert publish(store, tensors(4), "run/4") == 4


def test_retention_spares_what_a_learner_was_told_is_there(reopen: Callable[..., WeightsStore], tmp_path: Path) -> None:
    now_s = 1_000_000.0
    store = reopen(keep_versions=1, wall_clock_s=lambda: now_s)
    publish(store, tensors(1), "run/1")
    head = weights_manifest.raw_tensor(tensors(1)["head"]).sha256
    assert store.missing([head]) == []
    publish(store, tensors(2), "run/2")
    store.retire()
    assert head.hex() in objects_in(tmp_path)
    now_s += 61.0
    with store.pinned([head]):  # A stream that relies on it.
        store.retire()
        assert head.hex() in objects_in(tmp_path)
    store.retire()
    assert head.hex() not in objects_in(tmp_path)


def test_leftovers_of_broken_streams_go_after_the_grace_time(reopen: Callable[..., WeightsStore], tmp_path: Path) -> None:
    store = reopen()
    orphan = add_tensor(store, np.ones(3, np.float32)).hex()
    publish(store, tensors(1), "run/1")
    reopen()
    assert orphan in objects_in(tmp_path)
    for path in (tmp_path / "objects").glob("??/*"):
        os.utime(path, (1.0, 1.0))
    store = reopen()
    assert orphan not in objects_in(tmp_path)
    assert len(objects_in(tmp_path)) == 2
    assert store.get("reach", 0).version.number == 1


def test_a_damaged_version_is_not_served_and_its_number_not_reused(
    reopen: Callable[..., WeightsStore], tmp_path: Path
) -> None:
    store = reopen()
    for step in (1, 2, 3):
        publish(store, tensors(step), f"run/{step}")
    (tmp_path / "manifests/reach/000000000003.manifest").write_bytes(b"\xff\xff torn")
    head = weights_manifest.raw_tensor(tensors(2)["head"]).sha256.hex()
    (tmp_path / "objects" / head[:2] / head).unlink()
    store = reopen()
    assert [v.version.number for v in store.versions()] == [1]
    assert publish(store, tensors(4), "run/4") == 4


def test_room_is_checked_before_anything_is_sent(reopen: Callable[..., WeightsStore]) -> None:
    manifest = manifest_of(tensors(1), "run/1")
    with pytest.raises(InvalidInput, match="has 56 bytes of tensors, over the limit of 50"):
        reopen(max_version_bytes=50).admit(manifest)
    with pytest.raises(Overloaded, match="56 bytes are missing"):
        reopen(spare_bytes=2**62).admit(manifest)
    assert sum(reopen().admit(manifest).values()) == 56


def test_one_process_a_folder(reopen: Callable[..., WeightsStore], tmp_path: Path) -> None:
    store = reopen()
    with pytest.raises(Refused, match="in use by another weights service"):
        WeightsStore(tmp_path)
    assert store.versions() == []


def test_versions_keep_their_order_when_the_wall_clock_was_set_back(
    reopen: Callable[..., WeightsStore], tmp_path: Path
) -> None:
    store = reopen()
    publish(store, tensors(1), "run/1")
    publish(store, tensors(2), "run/2")
    os.utime(tmp_path / "manifests/reach/000000000002.manifest", (5.0, 5.0))
    assert [v.version.number for v in reopen().versions("reach")] == [1, 2]


def test_version_carries_the_digest_of_its_manifest(reopen: Callable[..., WeightsStore]) -> None:
    store = reopen()
    publish(store, tensors(1), "run/1")
    expected = common_pb2.PolicyVersion(
        model="reach", number=1, digest=weights_manifest.digest(manifest_of(tensors(1), "other"))
    )
    assert store.get("reach", 1).version == expected
