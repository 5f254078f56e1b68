"""What may be a version, and when two versions are the same."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from manyhands import weights_manifest
from manyhands.common.v1 import common_pb2
from manyhands.errors import InvalidInput
from manyhands.spec import Feature, FeatureKind, Spec
from manyhands.weights.v1 import weights_pb2
from manyhands.weights_manifest import RawTensor

SPEC = Spec(
    observation=(Feature(name="observation.state", kind=FeatureKind.STATE, dtype="float32", shape=(3,)),),
    action=(Feature(name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(2,)),),
    control_rate_hz=10.0,
)


def build(**changes: object) -> weights_pb2.Manifest:
    content: dict[str, object] = {
        "model": "reach",
        "policy_type": "flow",
        "config_json": '{"width": 8}',
        "spec": SPEC,
        "tensors": {"b.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.bias": np.zeros(2, np.int64)},
        "publish_id": "run-1/100",
        "metrics": {"train/loss": 0.5},
    }
    return weights_manifest.build(**{**content, **changes})  # type: ignore[arg-type]


def test_entries_are_sorted_and_known_by_the_sha256_of_their_little_endian_bytes() -> None:
    manifest = build()
    assert [entry.name for entry in manifest.tensors] == ["a.bias", "b.weight"]
    weight = manifest.tensors[1]
    assert (weight.dtype, list(weight.shape)) == (common_pb2.DATA_TYPE_FLOAT32, [2, 3])
    assert weight.sha256 == hashlib.sha256(np.arange(6, dtype="<f4").tobytes()).digest()


def test_big_endian_strided_and_scalar_arrays_hash_as_their_values() -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    plain = build(tensors={"w": np.ascontiguousarray(values[:, ::2])})
    strided = build(tensors={"w": values[:, ::2]})
    big_endian = build(tensors={"w": values[:, ::2].astype(">f4")})
    assert plain.tensors[0] == strided.tensors[0] == big_endian.tensors[0]
    scalar = build(tensors={"step": np.float64(3.0)}).tensors[0]
    assert list(scalar.shape) == []
    assert scalar.sha256 == hashlib.sha256(np.array(3.0, "<f8").tobytes()).digest()


def test_bfloat16_comes_as_raw_bytes() -> None:
    bits = np.array([0x3F80, 0x4000], dtype="<u2")
    manifest = build(tensors={"w": (common_pb2.DATA_TYPE_BFLOAT16, (2,), bits.tobytes())})
    assert manifest.tensors[0].dtype == common_pb2.DATA_TYPE_BFLOAT16
    raw = RawTensor(dtype=common_pb2.DATA_TYPE_BFLOAT16, shape=(2,), data=bits.tobytes())
    np.testing.assert_array_equal(raw.array(), bits)
    with pytest.raises(InvalidInput, match=r"weight: 3 bytes do not fit"):
        build(tensors={"weight": (common_pb2.DATA_TYPE_BFLOAT16, (2,), b"abc")})


def test_digest_covers_the_content_and_nothing_about_its_publishing() -> None:
    manifest = build()
    same = build(publish_id="run-2/7", metrics={})
    same.number = 12
    assert weights_manifest.digest(manifest) == weights_manifest.digest(same)
    others = [
        build(model="drawer"),
        build(policy_type="pi052"),
        build(config_json='{"width": 9}'),
        build(spec=None),
        build(tensors={"b.weight": np.ones((2, 3), np.float32), "a.bias": np.zeros(2, np.int64)}),
        build(tensors={"b.weight": np.arange(6, dtype=np.float32), "a.bias": np.zeros(2, np.int64)}),
    ]
    assert len({weights_manifest.digest(other) for other in [manifest, *others]}) == 7


def test_digest_is_the_one_recorded_when_the_contract_was_made() -> None:
    # Another value here means that old versions lose their names.
    assert weights_manifest.digest(build()).hex() == "0727c52fa797b82bacba2584962b374d6eb2e6c75c4e9b8c85fb730fb4795238"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "../etc"}, "manifest.model: '../etc' must be"),
        ({"model": ""}, "manifest.model"),
        ({"policy_type": "a/b"}, "manifest.policy_type"),
        ({"publish_id": ""}, "manifest.publish_id"),
        ({"publish_id": "a\nb"}, "manifest.publish_id"),
        ({"config_json": "not json"}, "manifest.config_json: is not JSON"),
        ({"config_json": "[" * 100_000}, "manifest.config_json"),
        ({"config_json": "[1]"}, "must be a JSON object"),
        ({"tensors": {}}, "has 0 tensors"),
        ({"tensors": {"w": np.array(["text"])}}, "w: .*cannot travel|cannot travel"),
        ({"tensors": {"a\x00b": np.zeros(1)}}, "printable"),
        ({"metrics": {f"m{i}": 0.0 for i in range(1001)}}, "manifest.metrics"),
    ],
)  # fmt: skip
def test_what_cannot_be_published_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        build(**changes)


def entry(name: str = "w", **changes: object) -> weights_pb2.TensorEntry:
    fields: dict[str, object] = {"dtype": common_pb2.DATA_TYPE_FLOAT32, "shape": [2], "sha256": bytes(32)}
    return weights_pb2.TensorEntry(name=name, **{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry("gamma"), entry("alpha")], "alpha: comes after 'gamma'"),
        ([entry("alpha"), entry("alpha")], "alpha: comes twice"),
        ([entry(sha256=b"short")], r"w\.sha256: a sha256 has 32 bytes, not 5"),
        ([entry(shape=[2**40, 2**40, 2**40])], r"w\.shape: .*over the limit"),
        ([entry(shape=[0, 2**40, 2**40])], r"w\.shape: .*over the limit"),  # NumPy refuses these too, in words of its own.
        ([entry(shape=[-1])], r"w\.shape: .*none negative"),
        ([entry(shape=[1] * 9)], r"w\.shape: .*at most 8 extents"),
        ([entry(dtype=99)], r"w\.dtype: data type 99"),
        ([entry("alpha"), entry("gamma", shape=[3])], "gamma: has 12 bytes, another tensor of the same sha256 has 8"),
    ],
)
def test_hostile_manifests_are_refused_without_allocating(entries: list[weights_pb2.TensorEntry], message: str) -> None:
    manifest = build()
    del manifest.tensors[:]
    manifest.tensors.extend(entries)
    with pytest.raises(InvalidInput, match=message):
        weights_manifest.check(manifest)


def test_a_spec_whose_digest_lies_is_refused() -> None:
    manifest = build()
    manifest.spec.control_rate_hz = 20.0
    with pytest.raises(InvalidInput, match=r"spec\.digest"):
        weights_manifest.check(manifest)
