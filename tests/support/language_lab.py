"""Language columns for a published root, as another program would write them after the recording."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Rows = Sequence[Mapping[str, Any]]
_FIELDS = [("role", pa.string()), ("content", pa.string()), ("style", pa.string())]
_REST = [("camera", pa.string()), ("tool_calls", pa.list_(pa.string()))]
PERSISTENT = pa.list_(pa.struct([*_FIELDS, ("timestamp", pa.float32()), *_REST]))
EVENTS = pa.list_(pa.struct([*_FIELDS, *_REST]))
FEATURE = {"dtype": "language", "shape": [1], "names": None}
# Before those, in info.json and in the files.
_LAST = 5


def annotate(
    root: Path, persistent: Callable[[int], Rows], events: Callable[[int, int], Rows], *, one_group: bool = False
) -> None:
    """Rewrites the data files of root with both columns.

    Args:
        persistent: Of an episode.
        events: Of an episode's frame.
        one_group: Each file as one row group, as other writers have it.
    """
    for path in sorted((root / "data").glob("*/*.parquet")):
        file = pq.ParquetFile(path)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        table = file.read()
        pairs = list(zip(table["episode_index"].to_pylist(), table["frame_index"].to_pylist(), strict=True))
        columns = {
            "language_persistent": pa.array([_stored(persistent(episode)) for episode, _ in pairs], PERSISTENT),
            "language_events": pa.array([_stored(events(*pair)) for pair in pairs], EVENTS),
        }
        at = table.num_columns - _LAST
        for name, values in reversed(columns.items()):
            table = table.add_column(at, name, values)
        with pq.ParquetWriter(path, table.schema) as writer:
            for size in [table.num_rows] if one_group else sizes:
                writer.write_table(table.slice(0, size), row_group_size=size)
                table = table.slice(size)
    info = json.loads((root / "meta/info.json").read_text())
    features = list(info["features"].items())
    features[-_LAST:-_LAST] = [(name, FEATURE) for name in ("language_persistent", "language_events")]
    info["features"] = dict(features)
    (root / "meta/info.json").write_text(json.dumps(info))


def row(role: str, content: str | None, style: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, "style": style, **more}


def say(text: str) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "say", "arguments": {"text": text}}}
    return {"role": "assistant", "content": None, "style": None, "tool_calls": [call]}


def _stored(rows: Rows) -> list[dict[str, Any]]:
    return [
        {**entry, "tool_calls": [json.dumps(call) for call in entry["tool_calls"]] if entry.get("tool_calls") else None}
        for entry in rows
    ]
