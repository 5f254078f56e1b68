"""Records the bytes of messages that have no recording yet: python tests/contract/record.py

Recordings are what older releases sent, so they are never written again. Where a message has grown, --grown records its
new form beside the old one (Name.2.binpb and so on).
"""

from __future__ import annotations

import json
import sys

from google.protobuf import json_format
from messages import RECORDED, area_of, contract_messages, variants


def main(arguments: list[str]) -> int:
    num_written = 0
    for descriptor in contract_messages():
        folder = RECORDED / area_of(descriptor)
        folder.mkdir(parents=True, exist_ok=True)
        for choice, message in enumerate(variants(descriptor)):
            name = f"{descriptor.name}-{choice}" if choice else descriptor.name
            recordings = sorted(folder.glob(f"{name}.binpb")) + sorted(folder.glob(f"{name}.[0-9]*.binpb"))
            content = message.SerializeToString(deterministic=True)
            if any(recording.read_bytes() == content for recording in recordings):
                continue
            if recordings:
                if "--grown" not in arguments:
                    continue
                name = f"{name}.{len(recordings) + 1}"
            expected = json_format.MessageToDict(message, preserving_proto_field_name=True)
            (folder / f"{name}.binpb").write_bytes(content)
            (folder / f"{name}.json").write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            num_written += 1
    print(f"{num_written} recordings written")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
