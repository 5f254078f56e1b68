"""What a version of a policy is made of: a sorted list of named tensors, each known by the sha256 of its bytes.

A version's digest covers the model, the policy's type and configuration, the spec and every tensor, and nothing that says
when or by whom it was published: equal weights have equal digests wherever they come from.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from . import codec
from .common.v1 import common_pb2
from .errors import InvalidInput
from .spec import Spec
from .weights.v1 import weights_pb2

DIGEST_BYTES = 32
PIECE_BYTES = 4 * 1024 * 1024
MAX_TENSORS = 100_000
# The largest single tensor known here is a 257k x 2048 embedding: 1 GiB in bfloat16.
MAX_TENSOR_BYTES = 8 * 1024**3
MAX_CONFIG_BYTES = 1024 * 1024
MAX_METRICS = 1000
# A manifest travels in one message, and messages end at 32 MiB.
MAX_MANIFEST_BYTES = 24 * 1024 * 1024

_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_MAX_NAME_LENGTH = 512
_MAX_PUBLISH_ID_LENGTH = 256


@dataclass(frozen=True, kw_only=True)
class RawTensor:
    """A tensor as it travels and as it is stored.

    Attributes:
        dtype: common_pb2.DataType; DATA_TYPE_BFLOAT16 where numpy has no name for it.
        shape: Extents; () for a scalar.
        data: Little-endian bytes in C order, exactly as many as dtype and shape need.
    """

    dtype: int
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview

    def array(self) -> npt.NDArray[np.generic]:
        """A view of the bytes, no copy; bfloat16 as uint16 bits. Writable where data is."""
        return np.frombuffer(self.data, dtype=codec.numpy_dtype_of(self.dtype)).reshape(self.shape)

    @property
    def sha256(self) -> bytes:
        return hashlib.sha256(self.data).digest()


TensorLike = npt.NDArray[np.generic] | RawTensor | tuple[int, Sequence[int], bytes]
"""A numpy array, a RawTensor, or (DataType, shape, little-endian bytes), which is how bfloat16 comes."""


def raw_tensor(value: TensorLike, *, field: str = "tensor") -> RawTensor:
    """value as it travels; a C-contiguous little-endian array is viewed, anything else copied.

    Raises:
        InvalidInput: A dtype that cannot travel, or bytes that do not fit dtype and shape; names field.
    """
    if isinstance(value, tuple):
        dtype, shape, data = value
        value = RawTensor(dtype=dtype, shape=tuple(int(extent) for extent in shape), data=data)
    if isinstance(value, RawTensor):
        num_bytes = tensor_bytes(value.dtype, value.shape, field=field)
        given = memoryview(value.data).nbytes
        if given != num_bytes:
            raise InvalidInput(f"{given} bytes do not fit shape {value.shape}, which needs {num_bytes}", field=field)
        return value
    array = np.asarray(value)
    data_type = int(codec.data_type_of(array.dtype.name))
    # ascontiguousarray makes a scalar one-dimensional: the shape is taken before.
    contiguous = np.ascontiguousarray(array, dtype=codec.numpy_dtype_of(data_type))
    view = contiguous.reshape(-1).view(np.uint8).data if contiguous.size else memoryview(b"")
    return RawTensor(dtype=data_type, shape=array.shape, data=view)


def tensor_bytes(dtype: int, shape: Sequence[int], *, field: str) -> int:
    """How many bytes dtype and shape need; InvalidInput for an unknown dtype or a shape no tensor has."""
    item = codec.numpy_dtype_of(dtype, field=f"{field}.dtype").itemsize
    extents = tuple(shape)
    if len(extents) > 8 or any(extent < 0 for extent in extents):
        raise InvalidInput(f"shape {extents[:9]} must have at most 8 extents, none negative", field=f"{field}.shape")
    # Python integers: no overflow. NumPy has a limit for empty arrays as well.
    spanned = math.prod(max(extent, 1) for extent in extents) * item
    if spanned > MAX_TENSOR_BYTES:
        raise InvalidInput(
            f"shape {extents} spans {spanned} bytes, over the limit of {MAX_TENSOR_BYTES} for one tensor",
            field=f"{field}.shape",
        )
    return math.prod(extents) * item


def entry_bytes(entry: weights_pb2.TensorEntry) -> int:
    return tensor_bytes(entry.dtype, entry.shape, field=entry.name)


def build(
    *,
    model: str,
    policy_type: str,
    config_json: str,
    spec: Spec | None,
    tensors: Mapping[str, TensorLike],
    publish_id: str,
    metrics: Mapping[str, float] | None = None,
) -> weights_pb2.Manifest:
    """The manifest of tensors, checked. Hashes every tensor, about 1.5 GB a second and core.

    Raises:
        InvalidInput: Names what cannot be published.
    """

    def entry(name: str) -> weights_pb2.TensorEntry:
        raw = raw_tensor(tensors[name], field=name)
        return weights_pb2.TensorEntry(name=name, dtype=raw.dtype, shape=raw.shape, sha256=raw.sha256)  # type: ignore[arg-type]

    # Hashing leaves the interpreter to others.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        entries = list(pool.map(entry, sorted(tensors)))
    manifest = weights_pb2.Manifest(
        model=model,
        policy_type=policy_type,
        config_json=config_json,
        tensors=entries,
        spec=spec.to_proto() if spec is not None else None,
        publish_id=publish_id,
        metrics=dict(metrics or {}),
    )
    check(manifest)
    return manifest


def digest(manifest: weights_pb2.Manifest) -> bytes:
    """sha256 (32 bytes) of the deterministic serialisation without publish_id, number and metrics."""
    content = weights_pb2.Manifest(
        model=manifest.model,
        policy_type=manifest.policy_type,
        config_json=manifest.config_json,
        tensors=manifest.tensors,
        spec=manifest.spec if manifest.HasField("spec") else None,
    )
    return hashlib.sha256(content.SerializeToString(deterministic=True)).digest()


def version_of(manifest: weights_pb2.Manifest) -> common_pb2.PolicyVersion:
    return common_pb2.PolicyVersion(model=manifest.model, number=manifest.number, digest=digest(manifest))


def digests(manifest: weights_pb2.Manifest) -> dict[bytes, int]:
    """Bytes of each distinct tensor by its sha256, in the order of the names."""
    return {entry.sha256: entry_bytes(entry) for entry in manifest.tensors}


def check_model_name(model: str, *, field: str = "model") -> None:
    if not _MODEL.fullmatch(model):
        raise InvalidInput(
            f"{model[:80]!r} must be 1 to 64 letters, digits, '_', '-' or '.', the first a letter or digit", field=field
        )


def check_digest(sha256: bytes, *, field: str = "sha256") -> None:
    if len(sha256) != DIGEST_BYTES:
        raise InvalidInput(f"a sha256 has {DIGEST_BYTES} bytes, not {len(sha256)}", field=field)


def check(manifest: weights_pb2.Manifest) -> None:
    """Raises InvalidInput, naming the entry, unless this manifest can be published. Allocates nothing for its tensors."""
    if manifest.ByteSize() > MAX_MANIFEST_BYTES:
        raise InvalidInput(
            f"is {manifest.ByteSize()} bytes, over the limit of {MAX_MANIFEST_BYTES}; shorten names or configuration",
            field="manifest",
        )
    check_model_name(manifest.model, field="manifest.model")
    check_model_name(manifest.policy_type, field="manifest.policy_type")
    if not 0 < len(manifest.publish_id) <= _MAX_PUBLISH_ID_LENGTH or not manifest.publish_id.isprintable():
        raise InvalidInput(
            f"{manifest.publish_id[:40]!r} must be 1 to {_MAX_PUBLISH_ID_LENGTH} printable characters; use run and step",
            field="manifest.publish_id",
        )
    _check_config(manifest.config_json)
    if manifest.HasField("spec"):
        Spec.from_proto(manifest.spec)
    if len(manifest.metrics) > MAX_METRICS:
        raise InvalidInput(f"{len(manifest.metrics)} metrics, at most {MAX_METRICS}", field="manifest.metrics")
    _check_entries(manifest.tensors)


def _check_config(config_json: str) -> None:
    if len(config_json) > MAX_CONFIG_BYTES:
        raise InvalidInput(
            f"has {len(config_json)} characters, over the limit of {MAX_CONFIG_BYTES}", field="manifest.config_json"
        )
    try:
        config = json.loads(config_json)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"is not JSON: {error}", field="manifest.config_json") from None
    if not isinstance(config, dict):
        raise InvalidInput(f"must be a JSON object, not {type(config).__name__}", field="manifest.config_json")


def _check_entries(entries: Sequence[weights_pb2.TensorEntry]) -> None:
    if not 0 < len(entries) <= MAX_TENSORS:
        raise InvalidInput(f"has {len(entries)} tensors; a version has 1 to {MAX_TENSORS}", field="manifest.tensors")
    previous = ""
    sizes: dict[bytes, int] = {}
    for entry in entries:
        name = entry.name
        if not 0 < len(name) <= _MAX_NAME_LENGTH or not name.isprintable():
            raise InvalidInput(
                f"name {name[:40]!r} must be 1 to {_MAX_NAME_LENGTH} printable characters", field="manifest.tensors"
            )
        if name == previous:
            raise InvalidInput("comes twice in the manifest", field=name)
        if name < previous:
            raise InvalidInput(f"comes after {previous!r}; tensors are sorted by name", field=name)
        previous = name
        check_digest(entry.sha256, field=f"{name}.sha256")
        num_bytes = entry_bytes(entry)
        if sizes.setdefault(entry.sha256, num_bytes) != num_bytes:
            raise InvalidInput(
                f"has {num_bytes} bytes, another tensor of the same sha256 has {sizes[entry.sha256]}", field=name
            )
