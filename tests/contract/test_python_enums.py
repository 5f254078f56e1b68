"""Python's enums and tables know every value of the wire's enums, so that a value added to a proto is not forgotten."""

from __future__ import annotations

import enum
import pkgutil
from importlib import import_module

import numpy as np
import pytest

import manyhands
from manyhands import codec
from manyhands.common.v1 import common_pb2
from manyhands.spec import FeatureKind

from .messages import contract_enums

PROTO_ENUMS = {wire.name: wire for wire in contract_enums()}


def _python_enums() -> dict[str, type[enum.Enum]]:
    """Enums in manyhands that carry the name of an enum of the contracts."""
    found: dict[str, type[enum.Enum]] = {}
    for module_info in pkgutil.walk_packages(manyhands.__path__, "manyhands."):
        if module_info.name.endswith(("_pb2", "_pb2_grpc", "__main__")):
            continue
        for name, value in vars(import_module(module_info.name)).items():
            if isinstance(value, type) and issubclass(value, enum.Enum) and name in PROTO_ENUMS:
                found[name] = value
    return found


PYTHON_ENUMS = _python_enums()


def test_feature_kind_is_among_those_compared() -> None:
    assert PYTHON_ENUMS["FeatureKind"] is FeatureKind


@pytest.mark.parametrize("name", sorted(PYTHON_ENUMS))
def test_python_enum_has_every_value_of_the_contract(name: str) -> None:
    # 0 is "unspecified", which some Python enums give a name of their own and others refuse.
    wire = {value.number for value in PROTO_ENUMS[name].values if value.number != 0}
    assert {member.value for member in PYTHON_ENUMS[name] if member.value != 0} == wire


def test_every_data_type_has_a_numpy_dtype_of_its_size() -> None:
    sizes = {"BOOL": 1, "UINT8": 1, "INT8": 1, "INT16": 2, "UINT16": 2, "INT32": 4, "INT64": 8}
    sizes |= {"FLOAT16": 2, "BFLOAT16": 2, "FLOAT32": 4, "FLOAT64": 8}
    assert {f"DATA_TYPE_{name}" for name in sizes} == set(common_pb2.DataType.keys()) - {"DATA_TYPE_UNSPECIFIED"}
    for name, size in sizes.items():
        assert codec.numpy_dtype_of(common_pb2.DataType.Value(f"DATA_TYPE_{name}")).itemsize == size


def test_every_image_encoding_is_written_and_read() -> None:
    pixels = np.full((4, 6, 3), 128, dtype=np.uint8)
    for number in common_pb2.ImageEncoding.values():
        if number != common_pb2.IMAGE_ENCODING_UNSPECIFIED:
            image = codec.encode_image(pixels, number)
            assert np.abs(codec.decode_image(image).astype(int) - pixels).max() <= 2
