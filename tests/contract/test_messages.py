"""Every message survives the wire, and what older releases sent still means the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor import Descriptor

from .messages import PROTO_FILES, RECORDED, area_of, contract_messages, variants

MESSAGES = {str(descriptor.full_name): descriptor for descriptor in contract_messages()}
RECORDINGS = sorted(RECORDED.rglob("*.binpb"))


def test_every_proto_file_has_messages_here() -> None:
    areas = {path.parts[-3] for path in PROTO_FILES}
    assert areas == {area_of(descriptor) for descriptor in MESSAGES.values()}
    assert len(areas) >= 8


@pytest.mark.parametrize("descriptor", MESSAGES.values(), ids=MESSAGES.keys())
def test_filled_message_comes_back_equal(descriptor: Descriptor) -> None:
    cls = message_factory.GetMessageClass(descriptor)
    set_fields: set[str] = set()
    for message in variants(descriptor):
        assert cls.FromString(message.SerializeToString()) == message
        set_fields |= {field.name for field, _ in message.ListFields()}
    # Otherwise the equality above would say nothing about the fields left out.
    assert set_fields == {field.name for field in descriptor.fields}


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recorded_bytes_still_mean_the_same(recording: Path) -> None:
    message_name = recording.stem.split(".")[0].split("-")[0]
    descriptor = MESSAGES.get(f"manyhands.{recording.parent.name}.v1.{message_name}")
    assert descriptor is not None, f"{message_name} was sent by an older release; messages are deprecated, never removed"
    message = message_factory.GetMessageClass(descriptor).FromString(recording.read_bytes())
    content = json_format.MessageToDict(message, preserving_proto_field_name=True)
    assert content == json.loads(recording.with_suffix(".json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("descriptor", MESSAGES.values(), ids=MESSAGES.keys())
def test_every_message_is_recorded(descriptor: Descriptor) -> None:
    path = RECORDED / area_of(descriptor) / f"{descriptor.name}.binpb"
    assert path.exists(), f"run  python tests/contract/record.py  and commit {path.name}"
