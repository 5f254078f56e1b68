"""Every message of every contract, and one filled with distinct values in all of its fields."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, FileDescriptor, ServiceDescriptor
from google.protobuf.message import Message

ROOT = Path(__file__).resolve().parents[2]
RECORDED = Path(__file__).parent / "recorded"
PROTO_FILES = sorted((ROOT / "protos").rglob("*.proto"))


def area_of(descriptor: Descriptor) -> str:
    """ "robot" of manyhands.robot.v1.Describe."""
    return str(descriptor.full_name).split(".")[1]


def contract_files() -> list[FileDescriptor]:
    files: list[FileDescriptor] = []
    for path in PROTO_FILES:
        module = ".".join(path.relative_to(ROOT / "protos").with_suffix("").parts) + "_pb2"
        files.append(importlib.import_module(module).DESCRIPTOR)
    return files


def contract_messages() -> list[Descriptor]:
    def with_nested(descriptor: Descriptor) -> list[Descriptor]:
        nested = [child for child in descriptor.nested_types if not child.GetOptions().map_entry]
        return [descriptor, *(found for child in nested for found in with_nested(child))]

    return [found for file in contract_files() for top in file.message_types_by_name.values() for found in with_nested(top)]


def contract_enums() -> list[EnumDescriptor]:
    return [enum for file in contract_files() for enum in file.enum_types_by_name.values()]


def contract_services() -> list[ServiceDescriptor]:
    return [service for file in contract_files() for service in file.services_by_name.values()]


def rpc_names() -> list[str]:
    """As "/manyhands.robot.v1.RobotService/Hold"."""
    return [f"/{service.full_name}/{method.name}" for service in contract_services() for method in service.methods]


def variants(descriptor: Descriptor) -> list[Message]:
    """descriptor filled with distinct values; once for each member of its widest oneof, so that every field is set once."""
    widest = max((len(oneof.fields) for oneof in descriptor.oneofs), default=1)
    return [_filled(descriptor, choice, depth=0) for choice in range(widest)]


def _filled(descriptor: Descriptor, choice: int, depth: int) -> Message:
    message: Any = message_factory.GetMessageClass(descriptor)()
    for field in descriptor.fields:
        oneof = field.containing_oneof
        if oneof is not None and list(oneof.fields).index(field) != choice % len(oneof.fields):
            continue
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        if is_map:
            value_field = field.message_type.fields_by_name["value"]
            for number in (1, 2):
                getattr(message, field.name)[f"{field.name}-{number}"] = _scalar(value_field, number)
        elif field.is_repeated and field.message_type is not None:
            # Two entries, and for oneofs inside them two members.
            getattr(message, field.name).extend(_filled(field.message_type, number, depth + 1) for number in (0, 1))
        elif field.is_repeated:
            getattr(message, field.name).extend(_scalar(field, number) for number in (1, 2))
        elif field.message_type is not None:
            assert depth < 12, f"{descriptor.full_name} holds itself"
            getattr(message, field.name).CopyFrom(_filled(field.message_type, choice, depth + 1))
        else:
            setattr(message, field.name, _scalar(field, 0))
    return message  # type: ignore[no-any-return]


def _scalar(field: FieldDescriptor, number: int) -> Any:
    """A value that names its field and is no default."""
    seed = field.number * 10 + number + 1
    if field.enum_type is not None:
        values = [value.number for value in field.enum_type.values if value.number != 0]
        return values[seed % len(values)]
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        text = f"{field.name}-{seed}"
        return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return True
    if field.cpp_type in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return seed + 0.25
    # Beyond 32 bits where the type allows it: a field narrowed by mistake shows.
    return seed + 2**36 if field.cpp_type in (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64) else seed
